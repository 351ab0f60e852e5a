"""Where the pairs lie in a tree of named arrays, and which way round. Knows no framework."""

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import NamedTuple, TypeAlias

from rlora.core.errors import PairingError, ShapeError
from rlora.core.factors import Array

Names: TypeAlias = Sequence[tuple[str, str]]
Pairs: TypeAlias = Names | Callable[[Mapping[str, Array]], Iterable[tuple[str, str]]] | None
"""Names of the A and the B of each pair, or what finds them among all leaves by name."""

WORD = re.compile(r"(?:\w+_)?lora_(?:kernel_|embeddings_)?[aA]")
"""What stands for A in a name: PEFT and levanter, flax nnx, mlx, Keras, qwix."""


class Layout(NamedTuple):
    """Where a pair lies among the leaves, and how."""

    a: int
    b: int
    turned: bool
    """Whether a is (n, r) and b is (r, m), as where the model computes ``x @ a @ b``."""


def find_layouts(
    leaves: Mapping[str, Array], pairs: Pairs = None, turned: bool | None = None
) -> list[Layout]:
    """The pairs among named arrays, found by their names unless they are given.

    Parameters
    ----------
    leaves : mapping of str to array
        In the order in which the positions of a `Layout` count.
    pairs : sequence of (str, str), or callable, optional
        The names of A and B of each pair, or what gives them for `leaves`.
    turned : bool, optional
        See `Layout`; by default the shapes tell, and the names where both ways fit.

    Raises
    ------
    PairingError
        When there is no pair, or one of a pair is missing.
    ShapeError
        When the factors of a pair do not fit together.
    """
    if pairs is None:
        found = [(name, partner) for name in leaves if (partner := _partner(name)) is not None]
    else:
        found = list(pairs(leaves) if callable(pairs) else pairs)
    place = {name: i for i, name in enumerate(leaves)}
    layouts = []
    for a, b in found:
        missing = next((name for name in (a, b) if name not in place), None)
        if missing is not None:
            msg = f"{missing!r}, of the pair {a!r} and {b!r}, is not among the parameters"
            raise PairingError(msg)
        layouts.append(Layout(place[a], place[b], _is_turned(a, leaves[a], b, leaves[b], turned)))
    if not layouts:
        msg = (
            f"no LoRA pair among {len(leaves)} leaves, such as {', '.join([*leaves][:5])}; "
            f"name them with pairs=[(name of A, name of B), ...]"
        )
        raise PairingError(msg)
    return layouts


def _partner(name: str) -> str | None:
    """The name of the B that belongs to an A of this name."""
    words = name.split(".")
    for i, word in enumerate(words):
        if WORD.fullmatch(word):
            words[i] = word[:-1] + ("b" if word.endswith("a") else "B")
            return ".".join(words)
    return None


def _is_turned(a: str, A: Array, b: str, B: Array, turned: bool | None) -> bool:
    """Whether a pair is a (..., n, r) and b (..., r, m); a ShapeError if it is neither."""
    both = f"{a!r} of shape {tuple(A.shape)} and {b!r} of shape {tuple(B.shape)}"
    fits = _fits(A, B)
    if not fits or turned not in {None, *fits}:
        msg = (
            f"{both} are no pair of factors: A is (..., r, n) and B (..., m, r), or turned "
            f"a (..., n, r) and b (..., r, m)"
        )
        raise ShapeError(msg)
    if turned is not None or len(fits) == 1:
        return fits[0] if turned is None else turned
    word = next((word for word in a.split(".") if WORD.fullmatch(word)), None)
    if word is None:
        msg = f"{both} fit either way round: say turned=True or turned=False"
        raise ShapeError(msg)
    return word.endswith("a")


def _fits(A: Array, B: Array) -> list[bool]:
    """The values of `turned` with which these shapes are a pair."""
    if min(A.ndim, B.ndim) < 2:
        return []
    if A.ndim != B.ndim:  # several axes in or out, as in an einsum
        return [True] if A.shape[-1] == B.shape[0] else []
    if A.shape[:-2] != B.shape[:-2]:
        return []
    ranks = {False: (A.shape[-2], B.shape[-1]), True: (A.shape[-1], B.shape[-2])}
    return [turned for turned, (one, other) in ranks.items() if one == other]

"""Registry of the names and layouts that libraries give to the two factors.

Plug-ins add to it by the entry points ``rlora.conventions``: a `Convention`, or several.
"""

import re
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from importlib.metadata import entry_points
from typing import Any, NamedTuple

from rlora.core.errors import PairingError, ShapeError
from rlora.core.layout import Layout, Shape, Views

ENTRY_POINT_GROUP = "rlora.conventions"

LINEAR = Layout("r n*", "m r 1*")
"""Also kernels of convolutions."""
STACK = Layout("e* r n", "e* m r")
TURNED = Layout("e* n r", "e* r m")
"""Factors of a model that computes ``x @ a @ b``."""
EINSUM = Layout("n* r", "r m*")
GROUPED = Layout("(e r) n*", "(e m) r 1*")
"""A convolution of e groups, or e blocks: each block of r rows of A meets its own rows of B."""


@dataclass(frozen=True)
class Convention:
    """Names and layouts of the two factors in one library.

    Parameters
    ----------
    name : str
        Of the library, for the report.
    a, b : str
        What stands for the factor A (fan-in) and B (fan-out) in a parameter's name: regular
        expressions over whole components, dots included, without back-references. The rest of
        the name, and the text of groups such as ``(?P<owner>...)``, must agree.
    layouts : tuple of Layout
        How the factors may lie; of those that fit, the first in which the rank is no larger than
        both outer sides.
    if_low_rank : tuple of Layout
        Further ones, which count only where the rank is no larger than both outer sides.

    Raises
    ------
    PairingError
        When `a` or `b` is no regular expression.

    Examples
    --------
    >>> import numpy as np
    >>> import rlora
    >>> from rlora.pairing import Convention, Layout
    >>> mine = Convention("mine", "reduce", "expand", (Layout("n r", "r m"),))
    >>> report = rlora.find_pairs(
    ...     {"q.reduce": np.ones((64, 4)), "q.expand": np.zeros((4, 32))}, pairs=mine
    ... )
    >>> [(pair.name, pair.rank, pair.shape_b) for pair in report]
    [('q', 4, (32, 4))]
    """

    name: str
    a: str
    b: str
    layouts: tuple[Layout, ...] = (LINEAR, GROUPED, STACK)
    if_low_rank: tuple[Layout, ...] = ()

    def __post_init__(self) -> None:
        for side, pattern in (("a", self.a), ("b", self.b)):
            try:
                re.compile(pattern)
            except re.error as error:
                msg = (
                    f"{side}={pattern!r} of the convention {self.name!r} must be a regular "
                    f"expression: {error}; put a backslash before what stands for itself"
                )
                raise PairingError(msg) from error

    def fit(self, shape_a: Shape, shape_b: Shape) -> tuple[Views, ...] | None:
        """The views of the best of the layouts that fit these shapes."""
        # Blocks of two matrices may be of unequal size, which no shape tells; groups are equal.
        matrices = len(shape_a) == len(shape_b) == 2
        layouts = [layout for layout in self.layouts if not (matrices and layout is GROUPED)]
        fits = [views for layout in layouts if (views := _try(layout, shape_a, shape_b))]
        others = [views for x in self.if_low_rank if (views := _try(x, shape_a, shape_b))]
        low = filter(is_low_rank, [*fits, *others])
        return next(low, fits[0] if fits else None)


TURNED_FIRST = (TURNED, EINSUM, LINEAR, STACK)

CONVENTIONS = (
    # Of tensors that a layer has itself people write ``x @ A.T @ B.T``, and also ``x @ A @ B``.
    Convention("loralib, litgpt", r"lora_A$", r"lora_B$", if_low_rank=(TURNED,)),
    Convention("PEFT", r"lora_A(?=\.)", r"lora_B(?=\.)"),
    # PEFT's letters, exchanged: it starts the factor beside the vocabulary at zero, as B is here,
    # so W is (vocabulary, width), as the layer keeps it.
    Convention("PEFT embedding", r"lora_embedding_B", r"lora_embedding_A", (TURNED,)),
    Convention("layers of one's own", r"lora_down$", r"lora_up$", if_low_rank=(TURNED,)),
    Convention("kohya, OneTrainer, LyCORIS", r"lora_down(?=\.)", r"lora_up(?=\.)"),
    Convention("diffusers", r"lora\.down", r"lora\.up"),
    Convention("diffusers, old", r"(?P<owner>\w+_lora)\.down", r"(?P<owner>\w+_lora)\.up"),
    Convention("torchtune", r"lora_a(?=\.weight$)", r"lora_b(?=\.weight$)"),
    Convention(
        "torchtune experts",
        r"lora_(?P<owner>gate|up|down)_a",
        r"lora_(?P<owner>gate|up|down)_b",
        (Layout("e n r", "e r m"),),
    ),
    Convention(
        "NeMo, Megatron",
        r"(?P<owner>adapter(?:\.adapter_\w+)?)\.linear_in",
        r"(?P<owner>adapter(?:\.adapter_\w+)?)\.linear_out",
    ),
    Convention("flax, mlx", r"lora_a", r"lora_b", TURNED_FIRST),
    Convention(
        "Keras",
        r"lora_(?P<owner>kernel|embeddings)_a",
        r"lora_(?P<owner>kernel|embeddings)_b",
        TURNED_FIRST,
    ),
    Convention("qwix", r"(?P<owner>\w+)_lora_a", r"(?P<owner>\w+)_lora_b", TURNED_FIRST),
)

DIAGONAL = r"lora_E"
"""AdaLoRA's diagonal: the product is ``B diag(E) A``."""

SIBLINGS = (
    (r"lora_mid", "Tucker factors (LyCORIS) are three tensors, not a pair"),
    (r"lora_diag", "KaSA's diagonal stands between its factors"),
)
"""Further tensors of a layer that make a proposed pair something else than a product."""

NEAR_MISSES = (
    (r"hada_[wt]\d(?:_[ab])?", "LoHa is an entrywise product of two pairs"),
    (r"lokr_[wt]\d(?:_[ab])?", "LoKr is a Kronecker product"),
    (r"vera_(?:lambda_[bd]|[AB])", "VeRA trains vectors between frozen random matrices"),
    (r"poly_lora_[AB]", "Poly mixes stacked skills"),
    (r"randlora_\w+", "RandLoRA trains diagonals of a sum of random products"),
    (r"vblora_\w+", "VB-LoRA composes its factors of a bank of vectors"),
)
"""Names of other adapters whose tensors are no factors of a product."""


class Proposal(NamedTuple):
    """A parameter's name, taken apart: its layer, its adapter, the rest."""

    layer: str
    """Its name, empty for the model itself."""
    adapter: str | None
    tail: str
    text: tuple[str, ...]
    """Text of the groups in the pattern."""

    @property
    def label(self) -> str:
        """The layer, and the adapter if it has a name."""
        return f"{self.layer} ({self.adapter})".strip() if self.adapter else self.layer


def propose(name: str, pattern: str) -> Proposal | None:
    """Layer and adapter of a parameter whose name has this pattern in whole components."""
    return next((proposal for _, proposal in proposals(name, pattern)), None)


def proposals(name: str, pattern: str) -> Iterator[tuple[int, Proposal]]:
    """The same for every place in the name that has the pattern, with the place."""
    for found in _compiled(pattern).finditer(name):
        head, tail = name[: found.start()], name[found.end() :]
        text = tuple(found.groupdict().values())
        parts = [part for part in tail.split(".") if part]
        if parts and parts[-1] in ("weight", "value"):  # torch's parameter, flax's
            parts.pop()
        layer = ".".join(part for part in (head, *text) if part)
        yield found.start(), Proposal(layer, ".".join(parts) or None, tail, text)


def first_place(name: str, patterns: tuple[str, ...], start: int = 0) -> int | None:
    """The first place, from `start` on, where a name has one of these patterns."""
    found = _compiled(_any_of(patterns)).search(name, start)
    return None if found is None else found.start()


@cache
def _any_of(patterns: tuple[str, ...]) -> str:
    nameless = (re.sub(r"\(\?P<\w+>", "(?:", pattern) for pattern in patterns)
    return f"(?:{'|'.join(nameless)})"


def registered() -> tuple[Convention, ...]:
    """The conventions of plug-ins, then those known here."""
    return (*_plugins(), *CONVENTIONS)


@cache
def _compiled(pattern: str) -> re.Pattern[str]:
    return re.compile(rf"(?:^|\.){pattern}(?=\.|$)")


@cache
def _plugins() -> tuple[Convention, ...]:
    found: list[Convention] = []
    for entry in entry_points(group=ENTRY_POINT_GROUP):
        try:
            value: Any = entry.load()
            conventions = (value,) if isinstance(value, Convention) else tuple(value)
            if not all(isinstance(convention, Convention) for convention in conventions):
                msg = f"expected Conventions, got {value!r}"
                raise TypeError(msg)
        except Exception as error:  # a plug-in may raise anything
            msg = f"the plug-in {entry.name} = {entry.value} is left out: {error}"
            warnings.warn(msg, RuntimeWarning, stacklevel=2)
        else:
            found += conventions
    return tuple(found)


def _try(layout: Layout, shape_a: Shape, shape_b: Shape) -> tuple[Views, ...] | None:
    try:
        return layout.views(shape_a, shape_b)
    except ShapeError:
        return None


def is_low_rank(views: tuple[Views, ...]) -> bool:
    """Return whether no rank is larger than a side of its product."""
    return all(a.shape[-2] <= min(a.shape[-1], b.shape[-2]) for a, b in views)


Known = Mapping[str, Layout | str]
"""Layouts of layers by name, or the reason why they are no pair, as the modules declare them."""

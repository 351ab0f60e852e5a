"""Which tensors form a pair: names propose, shapes decide. Knows no framework.

Anything with a ``shape`` will do as a tensor: arrays, parameters, entries of a safetensors header.
"""

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from math import prod
from typing import Any

from rlora.core.errors import PairingError


@dataclass(frozen=True)
class Convention:
    """How one library names the two factors.

    Parameters
    ----------
    name : str
        Of the library, for the report.
    a, b : str
        What stands for the factor A (fan-in) and B (fan-out) in a parameter's name: regular
        expressions over whole components, dots included. The rest of the name must agree.
    """

    name: str
    a: str
    b: str


CONVENTIONS = (
    Convention("PEFT", r"lora_A", r"lora_B"),  # also loralib: parameters without .weight
    Convention("PEFT embedding", r"lora_embedding_A", r"lora_embedding_B"),
    Convention("kohya", r"lora_down", r"lora_up"),
    Convention("diffusers", r"lora\.down", r"lora\.up"),
    Convention("diffusers, old", r"(?P<owner>\w+_lora)\.down", r"(?P<owner>\w+_lora)\.up"),
    Convention("torchtune", r"lora_a", r"lora_b"),
)

NEAR_MISSES = (
    ("lora_mid", "Tucker factors (LyCORIS) are three tensors, not a pair"),
    ("lora_E", "AdaLoRA's diagonal stands between its factors"),
    ("lora_diag", "KaSA's diagonal stands between its factors"),
)
"""Siblings with which a proposed pair is not a plain product B A."""


@dataclass(frozen=True)
class Pair:
    """Two parameters that form a product B A.

    Parameters
    ----------
    name : str
        The layer, and the adapter if it has a name.
    a, b : str
        Names of the parameters in the roles of A and B.
    shape_a, shape_b : tuple of int
        Their shapes as (r, n) and (m, r); kernels of convolutions flattened.
    """

    name: str
    a: str
    b: str
    shape_a: tuple[int, int]
    shape_b: tuple[int, int]

    @property
    def rank(self) -> int:
        """The r of both factors."""
        return self.shape_a[0]


@dataclass(frozen=True)
class PairReport:
    """What was paired, what is left to the plain update, and what was refused and why.

    Parameters
    ----------
    pairs : tuple of Pair
        In the order in which the A factors came.
    plain : tuple of str
        Names that belong to no LoRA layout.
    refused : dict of str to str
        Names that look like LoRA factors but are not a pair, with the reason. They get the plain
        update too.
    """

    pairs: tuple[Pair, ...] = ()
    plain: tuple[str, ...] = ()
    refused: Mapping[str, str] = field(default_factory=dict)

    def __iter__(self) -> Iterator[Pair]:
        return iter(self.pairs)

    def __len__(self) -> int:
        return len(self.pairs)

    def __str__(self) -> str:
        lines = [
            f"{len(self.pairs)} pairs, {len(self.plain)} parameters updated plainly, "
            f"{len(self.refused)} refused"
        ]
        kinds: dict[str, list[str]] = {}
        for pair in self.pairs:
            (r, n), (m, _) = pair.shape_a, pair.shape_b
            kinds.setdefault(f"{m} x {n}, rank {r}", []).append(pair.name)
        for kind, names in kinds.items():
            lines.append(f"  pair {kind}: {len(names)} times, {_some(names)}")
        if self.plain:
            lines.append(f"  plain: {_some(self.plain)}")
        lines += [f"  refused {name}: {why}" for name, why in self.refused.items()]
        return "\n".join(lines)


def find_pairs(
    named: Mapping[str, Any] | Iterable[tuple[str, Any]], *, adapter: str | None = None
) -> PairReport:
    """Find the LoRA pairs among named tensors.

    Known layouts: PEFT (linear, embedding, convolution) and loralib, kohya and OneTrainer,
    diffusers old and new, torchtune. The order of the names does not matter.

    Parameters
    ----------
    named : mapping of str to array, or iterable of (str, array)
        Names with anything that has a ``shape``.
    adapter : str, optional
        Only pairs of this adapter, where names carry one (``...lora_A.<adapter>.weight``).

    Returns
    -------
    PairReport
        Print it to see what was found.

    Raises
    ------
    PairingError
        When two tensors have one name.

    Examples
    --------
    >>> import numpy as np
    >>> import rlora
    >>> q = "model.layers.0.self_attn.q_proj"
    >>> report = rlora.find_pairs({
    ...     f"{q}.lora_B.default.weight": np.zeros((576, 8)),
    ...     f"{q}.lora_A.default.weight": np.ones((8, 576)),
    ...     "score.weight": np.zeros((2, 576)),
    ... })
    >>> print(report)
    1 pairs, 1 parameters updated plainly, 0 refused
      pair 576 x 576, rank 8: 1 times, model.layers.0.self_attn.q_proj (default)
      plain: score.weight
    """
    items = list(named.items() if isinstance(named, Mapping) else named)
    shapes = {name: tuple(tensor.shape) for name, tensor in items}
    if len(shapes) != len(items):
        doubled = sorted({n for n, _ in items if sum(n == other for other, _ in items) > 1})
        msg = f"two tensors have the name {doubled[0]!r}; give each its own"
        raise PairingError(msg)
    pairs: list[Pair] = []
    refused: dict[str, str] = {}
    seen: set[str] = set()
    for a, b, layer, named_adapter in _proposals(shapes):
        seen |= {a, b} & shapes.keys()
        if a not in shapes or b not in shapes:
            alone = a if a in shapes else b
            refused[alone] = f"its partner {b if alone == a else a} is not among the parameters"
        elif adapter is not None and named_adapter != adapter:
            why = f"belongs to adapter {named_adapter!r}, not {adapter!r}"
            refused |= {a: why, b: why}
        elif near := _near_miss(a, shapes):
            refused |= {a: near, b: near}
        else:
            found = _fit(layer, a, shapes[a], b, shapes[b])
            if isinstance(found, Pair):
                pairs.append(found)
            else:
                refused |= {a: found, b: found}
    return PairReport(tuple(pairs), tuple(n for n in shapes if n not in seen), refused)


def _proposals(shapes: Mapping[str, Any]) -> Iterator[tuple[str, str, str, str | None]]:
    """(name of A, name of B, layer, adapter), once each, whether or not both exist."""
    done: set[str] = set()
    for name in shapes:
        for convention in CONVENTIONS:
            split = _split(name, convention)
            if split is None:
                continue
            a, b, layer, adapter = split
            if a not in done:
                done.add(a)
                yield a, b, layer, adapter
            break


def _split(name: str, convention: Convention) -> tuple[str, str, str, str | None] | None:
    """A parameter's name as that of A, that of B, the layer and the adapter."""
    for mine in (convention.a, convention.b):
        found = re.search(rf"(?:^|\.){mine}(?=\.|$)", name)
        if found is None:
            continue
        owner = found.groupdict().get("owner")
        head, tail = name[: found.start()], name[found.end() :]

        def spell(pattern: str, head: str = head, tail: str = tail, owner: Any = owner) -> str:
            word = pattern.replace(r"(?P<owner>\w+_lora)", owner or "").replace("\\", "")
            return f"{head}.{word}{tail}" if head else f"{word}{tail}"

        parts = [part for part in tail.split(".") if part not in ("", "weight")]
        layer = ".".join(part for part in (head, owner) if part) or name
        adapter = ".".join(parts) or None
        label = f"{layer} ({adapter})" if adapter else layer
        return spell(convention.a), spell(convention.b), label, adapter
    return None


def _near_miss(a: str, shapes: Mapping[str, Any]) -> str | None:
    for sibling, why in NEAR_MISSES:
        for word in ("lora_A", "lora_down"):
            other = re.sub(rf"(^|\.){word}(?=\.|$)", rf"\1{sibling}", a)
            if other != a and other in shapes:
                return why
    return None


def _fit(
    layer: str, a: str, shape_a: tuple[int, ...], b: str, shape_b: tuple[int, ...]
) -> Pair | str:
    """The pair, or why the two are none. The names' roles are turned where only that fits."""
    flat_a, flat_b = flatten_kernel(shape_a), flatten_kernel(shape_b)
    if flat_a is None or flat_b is None or 0 in (*flat_a, *flat_b):
        return f"shapes {shape_a} and {shape_b} are not two matrices or convolution kernels"
    if flat_a[0] == flat_b[1] and prod(shape_b[2:]) == 1:
        return Pair(layer, a, b, flat_a, flat_b)
    if flat_b[0] == flat_a[1] and prod(shape_a[2:]) == 1:
        return Pair(layer, b, a, flat_b, flat_a)
    return (
        f"shapes {shape_a} and {shape_b} share no rank: A must be (r, n) and B (m, r); "
        f"stacked blocks, grouped convolutions and turned layouts need explicit pairs of views"
    )


def flatten_kernel(shape: tuple[int, ...]) -> tuple[int, int] | None:
    """Rows and columns of a factor; a convolution's kernel belongs to its input side."""
    return (shape[0], prod(shape[1:])) if 2 <= len(shape) <= 5 else None


def nothing_paired(names: Iterable[str], report: PairReport) -> PairingError:
    """The error for parameters among which there is no pair; it shows the names it saw."""
    names = list(names)
    known = ", ".join(f"{c.a}/{c.b}".replace("\\", "") for c in CONVENTIONS if "(" not in c.a)
    why = "".join(f"\n  refused {name}: {w}" for name, w in list(report.refused.items())[:5])
    msg = (
        f"no LoRA pair among {len(names)} parameters: {_some(names) or 'none given'}; known names "
        f"are {known}; give pairs=[(A, B), ...] for others, and check that the adapter is "
        f"trainable{why}"
    )
    return PairingError(msg)


def _some(names: Iterable[str], limit: int = 3) -> str:
    names = list(names)
    rest = len(names) - limit
    return ", ".join(names[:limit]) + (f" and {rest} more" if rest > 0 else "")

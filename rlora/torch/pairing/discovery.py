"""Pairs of torch parameters: found by name, declared by module attributes, or given by hand."""

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any, Literal, TypeAlias

from torch import Tensor, nn

from rlora.core.errors import NamespaceError, PairingError, ShapeError
from rlora.core.layout import Layout
from rlora.pairing import (
    Convention,
    Known,
    Pair,
    PairReport,
    Source,
    find_pairs as find_named_pairs,
    is_factor,
    nothing_paired,
)
from rlora.pairing.find import check_source
from rlora.pairing.report import number_of
from rlora.torch.pairing.modules import in_group, models_in, what_modules_know
from rlora.torch.pairing.pairs import TensorPair, memory, moves, params_of
from rlora.torch.pairing.param_groups import misfit, trainable
from rlora.torch.pairing.sharding_checks import check_layouts, check_whole

ByHand: TypeAlias = tuple[Tensor, Tensor] | tuple[Tensor, Tensor, Layout]
"""A and B, and how they lie where that is not (r, n) and (m, r)."""

Pairs: TypeAlias = Iterable[ByHand] | Source | Literal["by_order"] | None
"""Pairs by hand, or where names of pairs come from; by default from the known conventions."""


def find_pairs(
    params: nn.Module | Iterable[tuple[str, Tensor]],
    *,
    adapter: str | None = None,
    pairs: Source | None = None,
) -> PairReport:
    """The pairs that an optimizer of `rlora.torch` would find, without building it.

    Parameters
    ----------
    params : Module or iterable of (str, Tensor)
        A model, or its ``named_parameters()``. Of a model, only trainable parameters count, and
        the frozen partners of trainable factors; and its modules tell what shapes cannot: the
        experts of PEFT, the blocks of loralib and litgpt, activations between the factors.
    adapter : str, optional
        Only pairs of this adapter.
    pairs : Convention or several, sequence of names, or callable
        See `rlora.find_pairs`.

    Returns
    -------
    PairReport
        Print it to see what was found.

    Raises
    ------
    ShardingError
        When factors have been flattened or cut by a sharding scheme.

    Examples
    --------
    >>> import torch, rlora.torch
    >>> layer = torch.nn.Module()
    >>> layer.lora_A = torch.nn.Parameter(torch.ones(4, 16))
    >>> layer.lora_B = torch.nn.Parameter(torch.zeros(32, 4))
    >>> len(rlora.torch.find_pairs(layer))
    1
    """
    given = params if isinstance(params, nn.Module) else list(params)
    known = what_modules_know(models_in(given))
    named = trainable(given, pairs, known) if isinstance(given, nn.Module) else given
    return match(named, known, adapter, pairs)[1]


def split_source(pairs: Pairs) -> tuple[list[Any], Source | None]:
    """Pairs by hand, or where their names come from."""
    check_source(pairs)
    if pairs is None or callable(pairs) or isinstance(pairs, Convention):
        return [], pairs
    given: list[Any] = list(pairs)
    check_source(given)
    names = [isinstance(x, Convention) or isinstance(x[0], str) for x in given]
    return ([], given) if names and all(names) else (given, None)


def pairs_in_groups(
    groups: Sequence[Sequence[tuple[str | None, Tensor]]],
    by_hand: Iterable[Any],
    source: Source | None,
    *,
    by_name: bool,
    known: Known | None,
    adapter: str | None,
) -> tuple[list[TensorPair], PairReport]:
    """The pairs given by hand, and if asked for those of groups whose parameters have names."""
    members = [member for group in groups for member in group]
    kept = ByMemory()
    pairs, report = check_explicit(by_hand, [p for _, p in members], kept)
    taken = {id(p) for p in params_of(pairs)}
    named = [
        [(name, p) for name, p in group if name is not None and id(p) not in taken]
        for group in groups
    ]
    if by_name and any(named):
        pairs, report = match(told_apart(named, known, source), known, adapter, source, kept)
        nameless = [
            f"parameter {i}"
            for i, (name, p) in enumerate(members)
            if name is None and id(p) not in taken
        ]
        report = replace(report, plain=(*report.plain, *nameless))
    check_layouts(pairs)
    return pairs, report


def told_apart(
    groups: Sequence[Sequence[tuple[str, Tensor]]], known: Known | None, source: Source | None
) -> list[tuple[str, Tensor]]:
    """Named tensors of all groups; names that several groups have say the group.

    And so does such a factor's partner. One without a partner in its own group keeps its name.
    """
    named = [item for group in groups for item in group]
    count = Counter(name for name, _ in named)
    doubled = {name for name in count if count[name] > 1}
    if not doubled or any(len(dict(group)) < len(group) for group in groups):
        return named
    given: Any = [source] if source is None or isinstance(source, Convention) else source
    if callable(source) or any(not isinstance(x, Convention | None) for x in given):
        return named  # whoever gives names of pairs knows which
    found = list[tuple[str, Tensor]]()
    for i, group in enumerate(groups):
        report = find_named_pairs(group, pairs=source, known=known)
        alone = {name for name in report.refused if source is not None or is_factor(name)}
        pairs = [{pair.a, pair.b, pair.diagonal or pair.a} for pair in report]
        told = (doubled - alone).union(*(names for names in pairs if names & doubled))
        found += [(in_group(i, n) if n in told else n, p) for n, p in group]
    return found


def match(
    named: Sequence[tuple[str, Tensor]],
    known: Known | None,
    adapter: str | None = None,
    source: Source | None = None,
    kept: "ByMemory | None" = None,
) -> tuple[list[TensorPair], PairReport]:
    """The pairs `kept` before and those among named tensors; the reason of those that cannot be."""
    check_whole(named)
    report = find_named_pairs(named, adapter=adapter, pairs=source, known=known)
    tensors = dict(named)
    refused, kept = dict(report.refused), kept or ByMemory()
    for pair in report:
        a, b = tensors[pair.a], tensors[pair.b]
        diagonal = None if pair.diagonal is None else tensors[pair.diagonal]
        if why := misfit(a, b):
            refused |= {pair.a: why, pair.b: why}
        elif _same_memory(a, b):
            why = "the two share their memory: a factor cannot be its own partner"
            refused |= {pair.a: why, pair.b: why}
        else:
            kept.add(pair, TensorPair(a, b, pair.views, diagonal))
    plain = tuple(name for name in report.plain if moves(tensors[name]))
    frozen, pairs = frozen_in(kept.pairs, kept.pairs.values()), list(kept.pairs.values())
    return pairs, PairReport(tuple(kept.pairs), plain, refused, kept.tied, frozen)


def frozen_in(names: Iterable[Pair], pairs: Iterable[TensorPair]) -> tuple[str, ...]:
    """The names of factors that no step can move, neither they nor what is tied to them."""
    found = list[str]()
    for name, pair in zip(names, pairs, strict=True):
        for factor, side in zip((name.a, name.b), pair.sides, strict=True):
            if not any(map(moves, side)):
                found.append(factor)
    return tuple(found)


def ties_hold(pairs: Iterable[TensorPair]) -> bool:
    """Return whether the tied parameters of each pair, and no others, lie in its memory.

    Moving a model, or copying it, gives each of two parameters of one memory its own.
    """
    sides = [set(map(memory, side)) for pair in pairs for side in pair.sides]
    return all(len(side) == 1 for side in sides) and len(set().union(*sides)) == len(sides)


def _same_memory(a: Tensor, b: Tensor) -> bool:
    return a.numel() == b.numel() and memory(a) == memory(b)


class ByMemory:
    """Pairs by the memory of their factors: one that has that of another is tied to it."""

    def __init__(self) -> None:
        self.pairs: dict[Pair, TensorPair] = {}
        self.tied: dict[str, str] = {}
        self._owners: dict[int, tuple[Pair, int]] = {}  # the pair, and the side in it

    def add(self, pair: Pair, found: TensorPair) -> None:
        a, b = found.A, found.B
        known_a, known_b = self._owners.get(memory(a)), self._owners.get(memory(b))
        if known_a is None and known_b is None:
            self._owners |= {memory(a): (pair, 0), memory(b): (pair, 1)}
            self.pairs[pair] = found
            return
        first, turned = _owner_of_both(pair, known_a, known_b)
        self.pairs[first] = self.pairs[first].with_tied(*((b, a) if turned else (a, b)))
        names = (first.b, first.a) if turned else (first.a, first.b)
        self.tied |= dict(zip((pair.a, pair.b), names, strict=True))


Owner: TypeAlias = tuple[Pair, int] | None
"""The pair that has a memory already, and the side on which."""


def _owner_of_both(pair: Pair, of_a: Owner, of_b: Owner) -> tuple[Pair, bool]:
    """The pair that has the memory of both factors of another, and whether in swapped roles."""
    if of_a is None or of_b is None or of_a[0] is not of_b[0]:
        msg = (
            f"{pair.a} or {pair.b} shares its memory with a factor of another pair, but its "
            f"partner does not: a tied factor has no single partner; leave one of the pairs out"
        )
        raise PairingError(msg)
    return of_a[0], of_a[1] == 1


def check_explicit(
    pairs: Iterable[Any], members: Sequence[Tensor], kept: ByMemory | None = None
) -> tuple[list[TensorPair], PairReport]:
    """Pairs given by hand: every one must be right, and among the parameters, and there once."""
    known = {id(p) for p in members}
    used: set[int] = set()
    kept = kept or ByMemory()
    for i, pair in enumerate(pairs):
        where = f"pairs[{i}]"
        if not (isinstance(pair, (tuple, list)) and len(pair) in (2, 3)):
            msg = f"{where} must be (A, B) or (A, B, Layout), got {type(pair).__name__}"
            raise PairingError(msg)
        a, b, layout = (*pair, Layout())[:3]
        if missing := [letter for letter, p in (("A", a), ("B", b)) if id(p) not in known]:
            msg = f"{' and '.join(missing)} of {where} is not among the optimizer's parameters"
            raise PairingError(msg)
        if _same_memory(a, b):
            msg = f"the two of {where} share their memory: a factor cannot be its own partner"
            raise PairingError(msg)
        if used & {id(a), id(b)}:
            msg = f"{where} has a factor of another pair; a tied factor has no single partner"
            raise PairingError(msg)
        used |= {id(a), id(b)}
        try:
            views = layout.views(tuple(a.shape), tuple(b.shape))
        except ShapeError as error:
            msg = (
                f"{where} does not fit: A is {tuple(a.shape)} and B is {tuple(b.shape)}, but A "
                f"must be (r, n) and B (m, r) with the same r, or lie as a Layout says ({error})"
            )
            raise ShapeError(msg) from error
        if why := misfit(a, b):
            msg = f"{where}: {why}"
            raise NamespaceError(msg)
        kept.add(Pair(where, f"{where}[0]", f"{where}[1]", views), TensorPair(a, b, views))
    plain = [f"parameter {i}" for i, p in enumerate(members) if id(p) not in used and moves(p)]
    frozen, checked = frozen_in(kept.pairs, kept.pairs.values()), list(kept.pairs.values())
    return checked, PairReport(tuple(kept.pairs), tuple(plain), tied=kept.tied, frozen=frozen)


def no_pair(names: Sequence[str | None], report: PairReport, kind: str) -> PairingError:
    """The error for parameters among which there is no pair, or that have no names."""
    if report.refused or not names or any(name is not None for name in names):
        return nothing_paired((name for name in names if name is not None), report)
    msg = (
        f"no LoRA pair among {number_of(len(names), 'parameter')} without names; give the model, "
        f"its named_parameters(), groups of (name, tensor), or pairs=[(A, B), ...], or "
        f"pairs='by_order' where every A comes before its B; in transformers' Trainer "
        f"optimizer_cls_and_kwargs=(lambda: {kind}, {{...}}) hands over the model"
    )
    return PairingError(msg)


def without_diagonals(
    pairs: Sequence[TensorPair], report: PairReport
) -> tuple[list[TensorPair], PairReport]:
    """Pairs that are plain products; of the others, which an optimizer cannot take, the reason."""
    plain = tuple(pair for pair in report if pair.diagonal is None)
    refused = {
        name: f"the diagonal {pair.diagonal} stands between the factors; ScaledAdamW can take it"
        for pair in report
        if pair.diagonal is not None
        for name in (pair.a, pair.b)
    }
    kept = [pair for pair in pairs if pair.diagonal is None]
    frozen = tuple(name for name in report.frozen if name not in refused)
    return kept, replace(report, pairs=plain, refused={**report.refused, **refused}, frozen=frozen)

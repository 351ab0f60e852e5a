"""Pairs and names after somebody has changed the groups of an optimizer by hand."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, NamedTuple

from torch import Tensor

from rlora.core.errors import PairingError
from rlora.pairing import PairReport
from rlora.torch.pairing.pairs import TensorPair, groups_by_id, moves
from rlora.torch.pairing.sharding_checks import check_swap


def rename(groups: list[dict[str, Any]], names: Iterable[str | None]) -> None:
    """Give groups whose parameters were changed by hand the names of those they have."""
    rest = iter(names)
    for group in groups:
        own = [next(rest) for _ in group["params"]]
        if group.pop("param_names", None) is not None and None not in own:
            group["param_names"] = own


def successors(old: Sequence[Tensor], now: Sequence[Tensor]) -> dict[int, Tensor]:
    """The parameter that stands in the place of each old one, by the id of that.

    Of as many as before, others at the same positions are successors. Else each is its own, and
    those that have gone are missing.
    """
    known = set(map(id, old))
    if len(now) == len(old) and all(
        p is q or id(p) not in known for p, q in zip(now, old, strict=True)
    ):
        return {id(q): p for p, q in zip(now, old, strict=True)}
    return {id(p): p for p in now}


class Followed(NamedTuple):
    """Names and pairs after groups may have been changed by hand."""

    names: list[str | None]
    pairs: list[TensorPair | None]
    """None for those that have gone."""
    successor: dict[int, Tensor]
    """See `successors`."""

    def check(self, old: Sequence[Tensor], pairs: Sequence[TensorPair]) -> None:
        """ShardingError where somebody has put other parameters in the place of `pairs`.

        PairingError where one factor alone of one of them has gone.
        """
        strangers = self.successor.keys() - set(map(id, old))
        check_swap(strangers=len(strangers), gone=self.pairs.count(None))
        for pair, kept in zip(pairs, self.pairs, strict=True):
            if kept is None and {id(pair.A), id(pair.B)} & self.successor.keys():
                shapes = f"{tuple(pair.A.shape)} and {tuple(pair.B.shape)}"
                msg = (
                    f"one of the factors {shapes} of a pair has been taken out of the parameter "
                    "groups: take out both, or freeze one by requires_grad_(False), without a .grad"
                )
                raise PairingError(msg)

    def still_there(self, report: PairReport) -> tuple[list[TensorPair], PairReport]:
        """The pairs that have not gone, and the report of them."""
        kept = [(x, pair) for x, pair in zip(report, self.pairs, strict=True) if pair is not None]
        return [pair for _, pair in kept], replace(report, pairs=tuple(x for x, _ in kept))

    def by_hand(self, pairs: Iterable[Any]) -> list[Any]:
        """The pairs given by hand that are still there, of the parameters that stand for theirs."""
        return [
            (self.successor[id(a)], self.successor[id(b)], *layout)
            for a, b, *layout in pairs
            if {id(a), id(b)} <= self.successor.keys()
        ]


def followed(
    old: Sequence[Tensor],
    names: Sequence[str | None],
    pairs: Sequence[TensorPair],
    now: Sequence[Tensor],
) -> Followed:
    """The names and pairs of the parameters that groups have now, from those that they had.

    Training libraries swap parameters for others at the same positions, and people take parameters
    of a deleted adapter out of the groups: neither may shift a pair.
    """
    successor = successors(old, now)
    name_of = {id(successor.get(id(p))): x for p, x in zip(old, names, strict=True)}
    replaced = [pair.replaced(lambda p: successor.get(id(p))) for pair in pairs]
    return Followed([name_of.get(id(p)) for p in now], replaced, successor)


def pairs_of_copy(state: Mapping[str, Any]) -> list[TensorPair]:
    """The pairs in what a copy of an optimizer is made of: those of its last step, and of now."""
    members, names, pairs = (state[x] for x in ("_members", "_names", "_pairs"))
    now = [p for group in state["param_groups"] for p in group["params"]]
    found = followed(members, names, pairs, now).pairs
    return [*pairs, *(pair for pair in found if pair is not None)]


def with_partners(
    groups: Sequence[dict[str, Any]], pairs: Iterable[TensorPair], before: Sequence[Tensor]
) -> list[Tensor]:
    """The parameters of groups; those at the last step, `before`, say their order.

    Frozen factors that somebody has taken out are put back into the groups of their partners,
    which their Grams precondition: libraries, and people, keep what is trainable. Where there are
    as many as before, others may stand in their places.
    """
    now = [p for group in groups for p in group["params"]]
    if len(now) >= len(before):
        return now
    place = {id(p): i for i, p in enumerate(before)}
    home = groups_by_id(groups)
    for pair in pairs:
        for p, partner in ((pair.A, pair.B), (pair.B, pair.A)):
            if id(p) not in home and id(partner) in home and not moves(p):
                home[id(p)] = home[id(partner)]
                group = groups[home[id(p)]]
                everyone = [*group["params"], p]
                group["params"] = sorted(everyone, key=lambda q: place.get(id(q), len(place)))
    return [p for group in groups for p in group["params"]]


def named_anew(groups: list[dict[str, Any]], names: Iterable[str | None]) -> list[str | None]:
    """`names`, and those that groups appended by hand bring along; the groups get them too."""
    rest, found = iter(names), list[str | None]()
    for group in groups:
        own = [next(rest) for _ in group["params"]]
        given = group.get("param_names", own)
        found += own if any(own) or len(given) != len(own) else given
    rename(groups, found)
    return found


FOLLOWED = ("_members", "_names", "_pairs", "report", "_by_hand", "_known", "_given")
"""Attributes of an optimizer that follow its groups."""


@contextmanager
def undone_if_refused(optimizer: Any) -> Iterator[None]:
    """Put back an optimizer's groups, names and pairs where a change of them is refused."""
    count, before = len(optimizer.param_groups), {x: getattr(optimizer, x) for x in FOLLOWED}
    try:
        yield
    except Exception:  # ambiguous names, factors that do not fit
        del optimizer.param_groups[count:]
        vars(optimizer).update(before)
        raise

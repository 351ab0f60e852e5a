"""Record of a watched optimizer's step, and the transfer of its figures to the host."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from rlora.core.diagnostics import step_norms
from rlora.core.dispatch import get_backend
from rlora.core.errors import ShardingError
from rlora.core.factors import Factors, indices_by_rank
from rlora.core.layout import read_pairs
from rlora.core.rank_group import RankGroup
from rlora.pairing import PairReport
from rlora.torch.monitor.run_warnings import peaks
from rlora.torch.pairing.pairs import TensorPair, is_distributed, params_of

GRACE = 100
"""Steps that do not count as growth: the first ones from zero make up for a small partner, by as
much as 45 times Adam's step, in Riemannion's."""


@dataclass
class Watch:
    """Record of a watched optimizer: its pairs as the last step found them.

    Parameters
    ----------
    weights : dict of Tensor to float
        For factors A the size of a change of B A that is as large as the base weight, ``|W0| / s``.
    """

    weights: Mapping[Tensor, float] = field(default_factory=dict)
    pairs: list[TensorPair] = field(default_factory=list)
    before: list[TensorPair] = field(default_factory=list)
    moving: list[tuple[bool, bool]] = field(default_factory=list)
    names: list[str] = field(default_factory=list)
    start: list[Tensor] = field(default_factory=list)
    """The largest entries of A and B of every pair when watching began."""
    pulled: dict[int, Tensor | None] = field(default_factory=dict)
    """For factors narrower than float32 (2k is the A of pair k, 2k + 1 its B) which entries have a
    gradient; None where results are rounded at random, or the learning rate is 0."""
    reach: float | Tensor = 0.0
    """The sum of the learning rates since, and `GRACE` steps: as far as Adam moves an entry."""
    kinds: list[tuple[torch.dtype, torch.device]] = field(default_factory=list)

    def note(
        self, pairs: list[TensorPair], report: PairReport, groups: Sequence[dict[str, Any]] = ()
    ) -> None:
        """Copy the parameters, and see which factors have gradients."""
        now = [p for pair in pairs for p in stored(pair)]
        kinds = [(p.dtype, p.device) for p in now]  # a model may be moved
        if pairs is not self.pairs or kinds != self.kinds:
            refuse_shards(pairs)
            self.before = [blank(pair) for pair in pairs]
            self.pairs, self.kinds, self.names = pairs, kinds, [pair.name for pair in report]
            self.start, self.reach = peaks([p.detach() for pair in pairs for p in pair[:2]]), 0.0
            steps = 1 + GRACE
        else:
            steps = 1
        if now:
            torch._foreach_copy_([p for pair in self.before for p in stored(pair)], now)
        self.moving = [pair.has_gradients() for pair in pairs]
        self.pulled = pulled(pairs, groups)
        rates = [group["lr"] for group in groups]
        numbers = [rate for rate in rates if not isinstance(rate, Tensor)]
        self.reach += steps * max(numbers, default=0.0)
        for rate in rates:
            if isinstance(rate, Tensor):  # its value is not waited for
                self.reach = self.reach + steps * rate


def read(
    watch: Watch, more: Sequence[Tensor] = ()
) -> tuple[list[tuple[list[int], Tensor, Tensor]], list[float]]:
    """For all layers of one rank: whose they are, their Grams (2K, r, r), norms of the step (6, K).

    And the values of more scalars. The one place where the host waits for the device, and once.
    """
    owners = [i for i, pair in enumerate(watch.before) for _ in pair.views]
    metric = [factors for pair in watch.before for factors in pair.factors()]
    old, new = ([x for pair in xs for x in products(pair)] for xs in (watch.before, watch.pairs))
    ranks, parts = indices_by_rank(metric), list[Tensor]()
    for members in ranks:
        like = metric[members[0]].A
        backend = get_backend(like)
        dtype = torch.float32 if like.device.type == "mps" else torch.float64
        grams, start, now = ([x[i] for i in members] for x in (metric, old, new))
        with backend.exact(like):
            parts.append(RankGroup(backend, grams, dtype=dtype).gram(grams))
            parts.append(step_norms(RankGroup(backend, now, dtype=dtype), start))
    wide = [x.to(parts[0].device, parts[0].dtype).reshape(-1) for x in (*parts, *more)]
    flat = torch.cat(wide).cpu().double()
    *pieces, rest = torch.split(flat, [*(x.numel() for x in parts), len(more)])
    rows = [
        (
            [i for k in members for i in [owners[k]] * math.prod(metric[k].A.shape[:-2])],
            S.view(like.shape),
            sizes.view(6, -1),
        )
        for members, like, S, sizes in zip(
            ranks, parts[::2], pieces[::2], pieces[1::2], strict=True
        )
    ]
    return rows, rest.tolist()


def stored(pair: TensorPair) -> list[Tensor]:
    """The tensors in which a pair lies."""
    return [p.detach() for p in (pair.A, pair.B, pair.diagonal) if p is not None]


def blank(pair: TensorPair) -> TensorPair:
    """A pair of the same kind in new memory."""
    A, B, *diagonal = map(torch.empty_like, stored(pair))
    return TensorPair(A, B, pair.views, diagonal[0] if diagonal else None)


def products(pair: TensorPair) -> list[Factors]:
    """The factors whose products are what the layer adds; a diagonal counts once, with B."""
    A, B = pair.A.detach(), pair.B.detach()
    return read_pairs(
        pair.views, A, B if pair.diagonal is None else B * pair.diagonal.detach().view(-1)
    )


def pulled(pairs: list[TensorPair], groups: Sequence[dict[str, Any]]) -> dict[int, Tensor | None]:
    """`Watch.pulled` of these pairs."""
    rates = {
        p: 0.0 if group["stochastic_rounding"] and p.dtype == torch.bfloat16 else group["lr"]
        for group in groups
        for p in group["params"]
    }
    factors = [p for pair in pairs for p in pair[:2]]
    found: dict[int, Tensor | None] = {}
    for at, p in enumerate(factors):
        rate = rates.get(p, 0.0)
        if p.itemsize >= 4 or p.grad is None:
            continue
        if isinstance(rate, Tensor):  # its value is not waited for
            found[at] = (p.grad != 0) & (rate != 0).to(p.device)
        else:
            found[at] = p.grad != 0 if rate else None
    return found


def lost(watch: Watch) -> dict[int, Tensor]:
    """The share of `Watch.pulled` that has not moved, for each of its factors."""
    old, new = ([p for pair in xs for p in pair[:2]] for xs in (watch.before, watch.pairs))
    shares = {}
    for at, there in watch.pulled.items():
        if there is None:
            shares[at] = torch.zeros((), device=old[at].device)
        else:
            stayed = (old[at] == new[at].detach()) & there
            shares[at] = stayed.sum() / there.sum().clamp(min=1)
    return shares


def refuse_shards(pairs: list[TensorPair]) -> None:
    """ShardingError for DTensors: a Gram of one shard says nothing of the factor."""
    for p in params_of(pairs):
        if is_distributed(p):
            msg = (
                f"diagnostics need whole factors, got a DTensor of shape {tuple(p.shape)}; "
                f"look at them in a run without sharding"
            )
            raise ShardingError(msg)

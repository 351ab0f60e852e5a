"""The step of pairs whose factors are DTensors, as FSDP2 makes them.

Of pieces of A along n, and of B along m, the Grams ``A Aᵀ`` and ``Bᵀ B`` add up. So every process
forms the Grams of its pieces, one all-reduce sums those of all pairs, and the directions ``P G``
are made of pieces again. FSDP2 cuts A along its rank axis by default: then pieces of
rows are exchanged for pieces of columns first, and the directions go back.

Which collectives run depends on layouts, options and frozen factors alone, never on which trained
factors have a gradient or an empty piece: all processes call the same ones in the same order.
"""

from collections.abc import Iterable, Sequence
from math import prod
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from rlora.core.backend import Backend
from rlora.core.factors import Factors
from rlora.core.placement import Preconditioners, RankGrams
from rlora.torch.pairing.pairs import TensorPair, cut_dims, local, mesh_of, moves
from rlora.torch.step.dtensor_exchange import Exchange, piece_of_grad
from rlora.torch.step.kernels import Kernel
from rlora.torch.step.listwise import FactorUpdate, ListStep


class ShardedStep(ListStep):
    """The step of pairs of one group, dtype and layout, on this process's pieces of them.

    Parameters
    ----------
    optimizer, group, kernel, updates
        As `ListStep` has them; the pairs are of DTensors.
    summed : list of int
        The dimensions of the mesh over which the Grams are summed.
    """

    def __init__(
        self,
        optimizer: Any,
        group: dict[str, Any],
        kernel: type[Kernel],
        updates: list[FactorUpdate],
        summed: list[int],
    ) -> None:
        super().__init__(optimizer, group, kernel, updates)
        factors: list[tuple[Any, int]]
        factors = [(pair[side], side) for side in (0, 1) for pair in self.pairs]
        self.of_factors = Exchange(factors)
        self.of_updates = Exchange([(update.param, update.side) for update in self.updates])
        # Replicated entries are counted once, where the coordinates are 0.
        mesh = mesh_of(factors[0][0])
        self.counted_elsewhere = [
            any(mesh.get_local_rank(d) and p.placements[d].is_replicate() for d in summed)
            for p, _ in factors
        ]
        # A kernel that is not contiguous, as channels_last ones, is flattened by a copy.
        flat = all(p.ndim == 2 or local(p).is_contiguous() for p, _ in factors)
        self.stays, self.plain = flat and not self.of_factors.places, True

    def factors(self) -> list[Factors]:
        """The pieces, of which each has whole columns of A or whole rows of B."""
        pieces = [local(pair[side]).flatten(1) for side in (0, 1) for pair in self.pairs]
        pieces = self.of_factors.to_columns(pieces)
        count = len(self.pairs)
        return [Factors(*pair) for pair in zip(pieces[:count], pieces[count:], strict=True)]

    def sizes(self) -> list[tuple[int, int]]:
        return [(pair.B.shape[0], prod(pair.A.shape[1:])) for pair in self.pairs]

    def gradients(self) -> list[Tensor]:
        """The pieces of the gradients; zeros where this process has none, to be dropped later."""
        return [piece_of_grad(update.param) for update in self.updates]

    def grams(self) -> list[RankGrams]:
        """The Grams of the pieces, to be summed."""
        grams = super().grams()
        count = len(self.pairs)
        for members, _, S in grams:
            places = [*(i + count for i in members), *members]  # those of the partners
            for k, place in enumerate(places):
                if self.counted_elsewhere[place]:
                    S[k] = 0.0
        return grams

    def _apply(
        self, backend: Backend, P: list[Factors] | None, stored: Sequence[Tensor]
    ) -> Sequence[Tensor]:
        if P is None:
            return stored
        columns = self.of_updates.to_columns([x.flatten(1) for x in stored])  # kernels as matrices
        done = self.of_updates.to_rows(list(super()._apply(backend, P, columns)))
        return [x.reshape(own.shape) for x, own in zip(done, self.own, strict=True)]


class ShardedSteps:
    """All pairs on one mesh: their Grams are summed together."""

    def __init__(self, steps: list[ShardedStep], groups: list[Any]) -> None:
        self.steps, self.groups = steps, groups

    def prepare(self) -> list[Preconditioners]:
        """Do everything that may fail, and all that processes do together before the kernels."""
        grams = [step.grams() for step in self.steps]
        by_dtype: dict[torch.dtype, list[Tensor]] = {}
        for part in grams:
            for gram in part:
                by_dtype.setdefault(gram.S.dtype, []).append(gram.S)
        for stacks in by_dtype.values():
            self._sum(stacks)
        return [step.direct(part) for step, part in zip(self.steps, grams, strict=True)]

    def _sum(self, stacks: list[Tensor]) -> None:
        """Over all processes, in place, the upper halves in one message."""
        halves = [torch.triu_indices(*S.shape[1:], device=S.device) for S in stacks]
        message: Any = torch.cat(
            [S[:, i, j].reshape(-1) for S, (i, j) in zip(stacks, halves, strict=True)]
        )
        for group in self.groups:
            dist.all_reduce(message, group=group)
        sizes = [len(S) * half.shape[1] for S, half in zip(stacks, halves, strict=True)]
        for S, (i, j), sums in zip(stacks, halves, message.split(sizes), strict=True):
            S[:, i, j] = S[:, j, i] = sums.view(len(S), -1)

    def finish(self, prepared: list[Preconditioners]) -> None:
        """The rest of every step."""
        for step, P in zip(self.steps, prepared, strict=True):
            step.finish(P)


def sharded_steps(
    optimizer: Any,
    kernel: type[Kernel],
    pairs: Iterable[TensorPair],
    group_of: dict[int, int],
    sides: str,
) -> list[ShardedSteps]:
    """For each mesh the steps of the factors in `sides`.

    The `pairs` are of DTensors, each with both factors on one mesh; `group_of` has the place of a
    parameter's group by its id; `sides`, "A", "B" or "AB", says which factors are to be updated.
    """
    by_mesh: dict[Any, list[TensorPair]] = {}
    for pair in pairs:
        by_mesh.setdefault(mesh_of(pair.A), []).append(pair)
    work = []
    for mesh, members in by_mesh.items():
        factors = [p for pair in members for p in pair[:2]]
        summed = sorted({d for p in factors for axis in (0, 1) for d in cut_dims(p, axis)})
        steps = [
            ShardedStep(optimizer, optimizer.param_groups[key[0]], kernel, updates, summed)
            for key, updates in _updates(members, group_of, sides).items()
        ]
        work.append(ShardedSteps(steps, [mesh.get_group(d) for d in summed]))
    return work


def _updates(
    pairs: list[TensorPair], group_of: dict[int, int], sides: str
) -> dict[Any, list[FactorUpdate]]:
    """The factors of one mesh by group, dtype and the dimension along which a rank axis is cut."""
    updates: dict[Any, list[FactorUpdate]] = {}
    for pair in pairs:
        exchanged = [d for side in (0, 1) for d in cut_dims(pair[side], side)]
        for side, (letter, p) in enumerate(zip("AB", pair[:2], strict=True)):
            if letter not in sides or not moves(p):
                continue
            key = (group_of[id(p)], p.dtype, *exchanged[:1])
            updates.setdefault(key, []).append(FactorUpdate(pair, side, p.grad is not None))
    return updates

"""All pairs of one recipe at once: Grams, preconditioners, and directions for the stand-ins."""

from collections.abc import Sequence
from itertools import accumulate
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from rlora.core.backend import Backend, Workspace
from rlora.core.dispatch import get_backend
from rlora.core.factors import Factors
from rlora.core.linalg import DampingMode
from rlora.core.placement import (
    Placement,
    Preconditioners,
    RankGrams,
    gram_powers,
    rank_grams,
)
from rlora.torch.pairs import TensorPair
from rlora.torch.rounding import store


class Recipe(NamedTuple):
    """The hyperparameters of one factor's preconditioner, as its group has them."""

    damping: float
    damping_mode: DampingMode
    placement: Placement
    compute_dtype: str | None
    stochastic_rounding: bool


def recipe_of(group: dict[str, Any]) -> Recipe:
    """The preconditioner's hyperparameters of a parameter group."""
    return Recipe(*(group[name] for name in Recipe._fields))


class Job(NamedTuple):
    """A factor to be updated, the tensor that stands in for it, its group, and where it belongs."""

    param: Tensor
    stand_in: Tensor
    group: dict[str, Any]
    pair: TensorPair
    side: int
    live: bool = True
    """False for a factor without gradient that takes part in what processes do together."""

    def read(self, stored: Tensor) -> list[Tensor]:
        """The factors in what has the shape of the parameter."""
        return [views[self.side].read(stored) for views in self.pair.views]

    def write(self, factors: Sequence[Tensor]) -> Tensor:
        """The inverse of `read`."""
        parts = [v[self.side].write(x) for v, x in zip(self.pair.views, factors, strict=True)]
        return parts[0] if len(parts) == 1 else torch.cat(parts)


class Batch:
    """All pairs of one recipe, dtype and device: one computation of Grams and directions.

    Parameters
    ----------
    recipe : Recipe
        Hyperparameters of the factors to be updated.
    in_place : bool
        Whether the stand-ins have the memory of their parameters.
    pairs : list of TensorPair
        Both factors of every pair.
    left, right : list of (int, Job)
        The A and the B factors to be updated, with the position of their pair.
    """

    def __init__(
        self,
        recipe: Recipe,
        in_place: bool,
        pairs: list[TensorPair],
        left: list[tuple[int, Job]],
        right: list[tuple[int, Job]],
    ) -> None:
        self.recipe = recipe
        self.pairs = pairs
        self.A, self.B = [job for _, job in left], [job for _, job in right]
        self.jobs = self.A + self.B
        ends = [*accumulate((len(pair.views) for pair in pairs), initial=0)]
        self.left, self.right = (
            [k for i, _ in side for k in range(ends[i], ends[i + 1])] for side in (left, right)
        )
        self.copied = recipe.placement == "before" and not in_place
        self.keeps_directions = pairs[0].A.device.type == "cpu"  # in the workspace
        self.workspace: Workspace = {}
        self.plain = all(view.is_plain for pair in pairs for both in pair.views for view in both)
        # Reading a dense parameter gives a view, which stays valid.
        dense = all(p.is_contiguous() for pair in pairs for p in (pair.A, pair.B))
        self.stays = (self.plain or dense) and all(pair.middle is None for pair in pairs)
        self.params: list[Factors] = []

    def factors(self) -> list[Factors]:
        """Both factors of every pair."""
        return [factors for pair in self.pairs for factors in pair.factors()]

    def grads(self) -> list[Tensor]:
        """The gradients of the factors to be updated."""
        return [cast("Tensor", job.pair.gradient(job.side)) for job in self.jobs]

    def prepare(self) -> Preconditioners:
        """Give every stand-in its value and its gradient; return the preconditioners."""
        return self.direct(self.grams())

    def sizes(self) -> list[tuple[int, int]]:
        """The m and n of every pair."""
        return [(pair.B.shape[-2], pair.A.shape[-1]) for pair in self.params]

    def grams(self) -> list[RankGrams]:
        """The Grams of both factors of every pair."""
        if not (self.stays and self.params):
            self.params = self.factors()
        like, dtype = self.params[0].A, self.recipe.compute_dtype
        backend = get_backend(like)
        with backend.exact(like):
            return rank_grams(backend, self.params, compute_dtype=dtype, workspace=self.workspace)

    def direct(self, grams: list[RankGrams]) -> Preconditioners:
        """Do as `prepare`, from Grams that are given."""
        backend = get_backend(self.params[0].A)
        grads = self.grads()
        with backend.exact(self.params[0].A):
            P = gram_powers(
                grams,
                self.sizes(),
                placement=self.recipe.placement,
                damping=self.recipe.damping,
                damping_mode=self.recipe.damping_mode,
            )
            if P.first is not None:
                grads = self._precondition(backend, P.first, grads)
        for job, direction in zip(self.jobs, grads, strict=True):
            _set_grad(job.stand_in, direction)
        if self.recipe.placement != "before":
            torch._foreach_zero_([job.stand_in for job in self.jobs])
        elif self.copied:
            torch._foreach_copy_(
                [job.stand_in for job in self.jobs], [job.param for job in self.jobs]
            )
        return P

    def finish(self, P: Preconditioners) -> None:
        """Finish the step after the parent: apply the second half, or copy the result back."""
        if not self.keeps_directions:
            for job in self.jobs:
                job.stand_in.grad = None
        if P.second is not None:
            self._move(P.second)
        elif self.copied:
            params, results = zip(*(job[:2] for job in self.jobs), strict=True)
            store(params, results, self.jobs[0].group)

    def _move(self, P: list[Factors]) -> None:
        # The parent has written its whole update into zeros; its decay has seen a zero parameter.
        backend = get_backend(self.params[0].A)
        with backend.exact(self.params[0].A):
            moves = self._precondition(backend, P, [job.stand_in for job in self.jobs])
        by_group: dict[int, list[tuple[Job, Tensor]]] = {}
        for job, move in zip(self.jobs, moves, strict=True):
            if job.live:
                by_group.setdefault(id(job.group), []).append((job, move))
        for members in by_group.values():
            group, dtype = members[0][0].group, members[0][1].dtype
            params, steps = [job.param for job, _ in members], [move for _, move in members]
            wide = [p.to(dtype) for p in params]  # the parameters themselves where they are wide
            torch._foreach_mul_(wide, 1 - group["lr"] * group["weight_decay"])
            torch._foreach_add_(wide, steps)
            if wide[0] is not params[0]:
                store(params, wide, group)

    def _precondition(
        self, backend: Backend, P: list[Factors], stored: list[Tensor]
    ) -> list[Tensor]:
        """``P_A G`` for the A factors and ``G P_B`` for the B factors, in the order of the jobs."""
        seen = (
            stored
            if self.plain
            else [x for job, G in zip(self.jobs, stored, strict=True) for x in job.read(G)]
        )
        of_A, of_B = seen[: len(self.left)], seen[len(self.left) :]
        left = backend.apply_left([P[i].A for i in self.left], of_A, self.workspace)
        right = backend.apply_right(of_B, [P[i].B for i in self.right], self.workspace)
        if self.plain:
            return left + right
        done = iter(left + right)
        return [job.write([next(done) for _ in job.pair.views]) for job in self.jobs]


def _set_grad(stand_in: Tensor, direction: Tensor) -> None:
    if direction.dtype != stand_in.dtype:
        direction = direction.to(stand_in.dtype)
    if direction.shape != stand_in.shape:
        direction = direction.view(stand_in.shape)
    if direction.stride() != stand_in.stride():
        direction = torch.empty_like(stand_in).copy_(direction)
    if stand_in.grad is not direction:
        stand_in.grad = direction

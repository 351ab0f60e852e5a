"""One step of an optimizer over stand-ins: who they are, and how their directions are made.

A stand-in of a parameter in a pair is a tensor that the parent optimizer steps in its place. It is
made once and serves until parameters, gradients' presence or hyperparameters change.
"""

from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from itertools import accumulate
from typing import Any, NamedTuple, Protocol, cast

import torch
from torch import Tensor

from rlora.core.backend import Backend, Workspace
from rlora.core.dispatch import get_backend
from rlora.core.factors import Factors
from rlora.core.linalg import DampingMode, preconditioners
from rlora.methods.scaled import Placement
from rlora.torch.pairs import TensorPair

Groups = list[dict[str, Any]]


class Recipe(NamedTuple):
    """The hyperparameters of one factor's preconditioner, as its group has them."""

    damping: float
    damping_mode: DampingMode
    placement: Placement
    compute_dtype: str | None


class Job(NamedTuple):
    """A factor to be moved, the tensor that stands in for it, its group, and where it belongs."""

    param: Tensor
    stand_in: Tensor
    group: dict[str, Any]
    pair: TensorPair
    side: int

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
        Of the factors to be moved.
    pairs : list of TensorPair
        Both factors of every pair.
    left, right : list of (int, Job)
        The A and the B factors to be moved, with the position of their pair.
    """

    def __init__(
        self,
        recipe: Recipe,
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
        in_place = _in_place(self.jobs[0].param, recipe.placement)
        self.copied = recipe.placement == "before" and not in_place
        self.keeps_directions = self.jobs[0].param.device.type == "cpu"  # in the workspace
        self.workspace: Workspace = {}
        self.plain = all(view.is_plain for pair in pairs for both in pair.views for view in both)
        # Of dense parameters every reading is a view, which stays true.
        dense = all(p.is_contiguous() for pair in pairs for p in (pair.A, pair.B))
        self.stays = (self.plain or dense) and all(pair.middle is None for pair in pairs)
        self.params = self.factors()

    def factors(self) -> list[Factors]:
        """Both factors of every pair."""
        return [factors for pair in self.pairs for factors in pair.factors()]

    def prepare(self) -> list[Factors]:
        """Give every stand-in its value and its gradient; return the preconditioners."""
        backend = get_backend(self.params[0].A)
        if not self.stays:
            self.params = self.factors()
        grads = [cast("Tensor", job.pair.gradient(job.side)) for job in self.jobs]
        with backend.exact(self.params[0].A):
            P = preconditioners(
                backend,
                self.params,
                damping=self.recipe.damping,
                damping_mode=self.recipe.damping_mode,
                exponent=-0.5 if self.recipe.placement == "both" else -1.0,
                compute_dtype=self.recipe.compute_dtype,
                workspace=self.workspace,
            )
            if self.recipe.placement != "after":
                grads = self._precondition(backend, P, grads)
        for job, direction in zip(self.jobs, grads, strict=True):
            _set_grad(job.stand_in, direction)
        if self.recipe.placement != "before":
            torch._foreach_zero_([job.stand_in for job in self.jobs])
        elif self.copied:
            torch._foreach_copy_(
                [job.stand_in for job in self.jobs], [job.param for job in self.jobs]
            )
        return P

    def finish(self, P: list[Factors]) -> None:
        """What is left to do after the parent: the second half, or copying the result back."""
        if not self.keeps_directions:
            for job in self.jobs:
                job.stand_in.grad = None
        if self.recipe.placement != "before":
            self._move(P)
        elif self.copied:
            torch._foreach_copy_(
                [job.param for job in self.jobs], [job.stand_in for job in self.jobs]
            )

    def _move(self, P: list[Factors]) -> None:
        # The parent has written its whole move into zeros. Its decay has seen a zero parameter.
        backend = get_backend(self.params[0].A)
        with backend.exact(self.params[0].A):
            moves = self._precondition(backend, P, [job.stand_in for job in self.jobs])
        by_group: dict[int, list[tuple[Job, Tensor]]] = {}
        for job, move in zip(self.jobs, moves, strict=True):
            by_group.setdefault(id(job.group), []).append((job, move))
        for members in by_group.values():
            group, dtype = members[0][0].group, members[0][1].dtype
            params, steps = [job.param for job, _ in members], [move for _, move in members]
            wide = [p.to(dtype) for p in params]  # the parameters themselves where they are wide
            torch._foreach_mul_(wide, 1 - group["lr"] * group["weight_decay"])
            torch._foreach_add_(wide, steps)
            if wide[0] is not params[0]:
                torch._foreach_copy_(params, wide)

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


class Work(Protocol):
    """What is done for some pairs around the parent's step."""

    def prepare(self) -> Any:
        """Everything that may fail; no parameter has moved when this returns."""

    def finish(self, half: Any) -> None:
        """The rest, with what `prepare` gave."""


class Plan(NamedTuple):
    """Everything a step needs that does not change from one step to the next."""

    batches: Sequence[Work]
    params: list[list[tuple[Tensor, Tensor]]]
    """For each group (parameter, stand-in); a plain parameter stands in for itself."""

    def run(self, optimizer: Any, parent_step: Callable[[Any], Any]) -> None:
        """Directions, the parent's own step over the stand-ins, and the rest."""
        halves = [batch.prepare() for batch in self.batches]
        self._parent_step(optimizer, parent_step)
        for batch, P in zip(self.batches, halves, strict=True):
            batch.finish(P)

    def _parent_step(self, optimizer: Any, parent_step: Callable[[Any], Any]) -> None:
        real_groups, real_state = optimizer.param_groups, optimizer.state
        state: dict[Any, Any] = defaultdict(dict)
        state.update((key, v) for key, v in real_state.items() if not isinstance(key, Tensor))
        groups = []
        compiling = torch.compiler.is_compiling()  # then fusing is the compiler's business
        for group, members in zip(real_groups, self.params, strict=True):
            for p, stand_in in members:
                if held := real_state.get(p):
                    state[stand_in] = held
            stand_ins = {"params": [stand_in for _, stand_in in members]}
            unfused = {"fused": None} if compiling and "fused" in group else {}
            groups.append({**group, **stand_ins, **unfused})
        optimizer.param_groups = [group for group in groups if group["params"]]
        optimizer.state = state
        try:
            parent_step(optimizer)
        finally:
            optimizer.param_groups, optimizer.state = real_groups, real_state
            for real, group, members in zip(real_groups, groups, self.params, strict=True):
                if not compiling:
                    real.update((key, v) for key, v in group.items() if key != "params")
                for p, stand_in in members:
                    if stand_in in state:
                        real_state[p] = state[stand_in]
            real_state.update((k, v) for k, v in state.items() if not isinstance(k, Tensor))


def recipe_of(group: dict[str, Any]) -> Recipe:
    """The preconditioner's hyperparameters of a parameter group."""
    return Recipe(*(group[name] for name in Recipe._fields))


def signature(
    pairs: Iterable[TensorPair], groups: Groups, choices: Sequence[Any]
) -> tuple[Any, ...]:
    """What a plan depends on: it is made anew when this changes."""
    seen = []
    for pair in pairs:
        for p in pair.params:
            grad = p.grad
            seen.append((p.data_ptr(), p.dtype, type(grad), grad.layout if grad is not None else 0))
    return seen, choices, [(id(group), len(group["params"])) for group in groups]


def make_plan(pairs: Sequence[TensorPair], groups: Groups, sides: str, *, plain: bool) -> Plan:
    """The plan for the factors in `sides` ("A", "B", "AB"), and for plain parameters or not."""
    group_of = {id(p): group for group in groups for p in group["params"]}
    work: dict[Any, tuple[list[TensorPair], list[Any], list[Any]]] = {}
    stand_ins: dict[int, Tensor] = {}
    place: dict[Any, int] = {}  # of a pair in its batch
    for k, pair in enumerate(pairs):
        for side, (letter, p) in enumerate(zip("AB", pair[:2], strict=True)):
            if letter not in sides or pair.gradient(side) is None:
                continue
            group = group_of[id(p)]
            recipe = recipe_of(group)
            stand_in = stand_ins[id(p)] = _stand_in(p, recipe.placement)
            key = (recipe, p.dtype, p.device, _in_place(p, recipe.placement))
            batch, *jobs = work.setdefault(key, ([], [], []))
            i = place.setdefault((key, k), len(batch))
            if i == len(batch):
                batch.append(pair)
            jobs[side].append((i, Job(p, stand_in, group, pair, side)))
    batches = [Batch(key[0], *parts) for key, parts in work.items()]
    paired = {id(p) for pair in pairs for p in pair.moved}
    params = [
        [
            (p, stand_ins.get(id(p), p))
            for p in group["params"]
            if id(p) in stand_ins or (plain and id(p) not in paired)
        ]
        for group in groups
    ]
    return Plan(batches, params)


def _stand_in(p: Tensor, placement: Placement) -> Tensor:
    """The parameter's own memory where the parent may write its result there, else scratch."""
    return p.detach() if _in_place(p, placement) else _scratch(p)


def _in_place(p: Tensor, placement: Placement) -> bool:
    """Whether the parent may write its result into the parameter.

    Fused kernels run through memory without a look at strides: scratch has the strides that the
    parent's moments will have, and a parameter with gaps in its memory needs scratch.
    """
    scratch = _scratch(p)
    return placement == "before" and p.dtype == scratch.dtype and p.stride() == scratch.stride()


def _scratch(p: Tensor) -> Tensor:
    wide = torch.promote_types(p.dtype, torch.float32)
    return torch.empty_like(p, dtype=wide, requires_grad=False)  # gaps are not preserved


def _set_grad(stand_in: Tensor, direction: Tensor) -> None:
    if direction.dtype != stand_in.dtype:
        direction = direction.to(stand_in.dtype)
    if direction.shape != stand_in.shape:
        direction = direction.view(stand_in.shape)
    if direction.stride() != stand_in.stride():
        direction = torch.empty_like(stand_in).copy_(direction)
    if stand_in.grad is not direction:
        stand_in.grad = direction

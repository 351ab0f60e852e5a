"""One step of an optimizer over stand-ins: who they are, and how their directions are made.

A stand-in of a parameter in a pair is a tensor that the parent optimizer steps in its place. It is
made once and serves until parameters, gradients' presence or hyperparameters change.
"""

from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple, Protocol, cast

import torch
from torch import Tensor

from rlora.core.backend import Backend, Workspace
from rlora.core.dispatch import get_backend
from rlora.core.factors import Factors
from rlora.core.linalg import DampingMode, preconditioners
from rlora.methods.scaled import Placement
from rlora.pairing import flatten_kernel
from rlora.torch.params import TensorPair

Groups = list[dict[str, Any]]


class Recipe(NamedTuple):
    """The hyperparameters of one factor's preconditioner, as its group has them."""

    damping: float
    damping_mode: DampingMode
    placement: Placement
    compute_dtype: str | None


class Job(NamedTuple):
    """A factor to be moved, the tensor that stands in for it, and the factor's group."""

    param: Tensor
    stand_in: Tensor
    group: dict[str, Any]


class Batch:
    """All pairs of one recipe, dtype and device: one computation of Grams and directions.

    Parameters
    ----------
    recipe : Recipe
        Of the factors to be moved.
    pairs : list of (Tensor, Tensor)
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
        self.left, self.right = [i for i, _ in left], [i for i, _ in right]
        self.A, self.B = [job for _, job in left], [job for _, job in right]
        self.jobs = self.A + self.B
        self.copied = recipe.placement == "before" and not _in_place(self.jobs[0].param, recipe.placement)
        self.keeps_directions = self.jobs[0].param.device.type == "cpu"  # in the workspace
        self.workspace: Workspace = {}
        # Matrices are views of the factors, but for kernels whose strides do not let them be.
        self.views = all(p.ndim == 2 for pair in pairs for p in pair)
        self.params = self.matrices()

    def matrices(self) -> list[Factors]:
        """Both factors of every pair as matrices."""
        return [Factors(*map(matrix, pair)) for pair in self.pairs]

    def prepare(self) -> list[Factors]:
        """Give every stand-in its value and its gradient; return the preconditioners."""
        backend = get_backend(self.params[0].A)
        if not self.views:
            self.params = self.matrices()
        grads = [matrix(cast("Tensor", job.param.grad)) for job in self.jobs]
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
        moves = [matrix(job.stand_in) for job in self.jobs]
        with backend.exact(self.params[0].A):
            moves = self._precondition(backend, P, moves)
        by_group: dict[int, list[tuple[Job, Tensor]]] = {}
        for job, move in zip(self.jobs, moves, strict=True):
            by_group.setdefault(id(job.group), []).append((job, move.view(job.param.shape)))
        for members in by_group.values():
            group, dtype = members[0][0].group, members[0][1].dtype
            params, steps = [job.param for job, _ in members], [move for _, move in members]
            wide = [p.to(dtype) for p in params]  # the parameters themselves where they are wide
            torch._foreach_mul_(wide, 1 - group["lr"] * group["weight_decay"])
            torch._foreach_add_(wide, steps)
            if wide[0] is not params[0]:
                torch._foreach_copy_(params, wide)

    def _precondition(
        self, backend: Backend, P: list[Factors], matrices: list[Tensor]
    ) -> list[Tensor]:
        """``P_A G`` for the A factors and ``G P_B`` for the B factors, in the order of the jobs."""
        of_A, of_B = matrices[: len(self.A)], matrices[len(self.A) :]
        left = backend.apply_left([P[i].A for i in self.left], of_A, self.workspace)
        return left + backend.apply_right(of_B, [P[i].B for i in self.right], self.workspace)


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
        compiling = torch.compiler.is_compiling()
        for group, members in zip(real_groups, self.params, strict=True):
            for p, stand_in in members:
                if held := real_state.get(p):
                    state[stand_in] = held
            groups.append({**group, "params": [stand_in for _, stand_in in members]})
            if compiling and "fused" in group:
                groups[-1]["fused"] = None  # the compiler's business
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
        for p in pair:
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
        for side, (letter, p) in enumerate(zip("AB", pair, strict=True)):
            if letter not in sides or p.grad is None:
                continue
            group = group_of[id(p)]
            recipe = recipe_of(group)
            stand_in = stand_ins[id(p)] = _stand_in(p, recipe.placement)
            key = (recipe, p.dtype, p.device, _in_place(p, recipe.placement))
            batch, *jobs = work.setdefault(key, ([], [], []))
            i = place.setdefault((key, k), len(batch))
            if i == len(batch):
                batch.append(pair)
            jobs[side].append((i, Job(p, stand_in, group)))
    batches = [Batch(key[0], *parts) for key, parts in work.items()]
    paired = {id(p) for pair in pairs for p in pair}
    params = [
        [
            (p, stand_ins.get(id(p), p))
            for p in group["params"]
            if id(p) in stand_ins or (plain and id(p) not in paired)
        ]
        for group in groups
    ]
    return Plan(batches, params)


def matrix(p: Tensor) -> Tensor:
    """A factor or gradient as a matrix; a convolution's kernel belongs to its input side."""
    if p.requires_grad:
        p = p.detach()
    return p if p.ndim == 2 else p.reshape(cast("tuple[int, int]", flatten_kernel(tuple(p.shape))))


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

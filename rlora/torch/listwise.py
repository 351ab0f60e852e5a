"""Scaled AdamW over lists of tensors on a CPU: no stand-ins, and no copy of a large factor.

Large factors are read and written where they are. Small ones of one shape lie on a stack, with
their moments, so that one call serves all of them. Adam itself is torch's fused kernel.
"""

from collections.abc import Iterator, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor

from rlora.core.backend import LARGE, Backend, Workspace
from rlora.core.bundle import Bundle
from rlora.core.dispatch import get_backend
from rlora.core.factors import Factors
from rlora.core.placement import split_power
from rlora.torch.batch import recipe_of
from rlora.torch.pairs import TensorPair, is_distributed
from rlora.torch.rounding import store

Moving: TypeAlias = tuple[bool, bool]
"""Whether A and B are to be moved."""


class Part:
    """Factors of one side that a backend operation takes together: many small, or all large ones.

    Parameters
    ----------
    params : list of Tensor
        Of one dtype; of one shape if they are stacked.
    side : int
        0 for A, 1 for B.
    places : list of int
        Where their Grams are in the (2K, r, r) stack of all factors.
    stacked : bool
        Whether they are copied to a stack, (k, r, n) or (k, m, r).
    group : dict or None
        The parameter group; None for factors that stay.
    """

    def __init__(
        self,
        params: list[Tensor],
        side: int,
        places: list[int],
        stacked: bool,
        group: dict[str, Any] | None,
    ) -> None:
        self.params, self.side, self.stacked, self.group = params, side, stacked, group
        self.places = torch.tensor(places)
        self.dtype = torch.promote_types(params[0].dtype, torch.float32)
        ready = all(p.dtype == self.dtype and p.is_contiguous() for p in params)
        self.copied = stacked or not ready
        self.X = self._like_params(torch.empty) if self.copied else [p.detach() for p in params]
        self.workspace: Workspace = {}
        self.D: list[Tensor] = []
        """Preconditioned gradients, in whose place the kernel writes Adam's direction."""
        if group is None:
            return
        self.G = self._like_params(torch.empty) if self.copied else []
        self.steps = torch.zeros(len(params))
        names = ("exp_avg", "exp_avg_sq", "max_exp_avg_sq")[: 3 if group["amsgrad"] else 2]
        self.moments = {name: self._like_params(torch.zeros) for name in names}
        memory = [self.steps.unbind(0), *map(self._each, self.moments.values())]
        self.views = [
            dict(zip(("step", *names), values, strict=True)) for values in zip(*memory, strict=True)
        ]
        """What the optimizer's state has of each parameter."""

    def _like_params(self, make: Any) -> list[Tensor]:
        shapes = [p.shape for p in self.params]
        if self.stacked:
            shapes = [torch.Size((len(shapes), *shapes[0]))]
        return [make(shape, dtype=self.dtype) for shape in shapes]

    def _each(self, arrays: list[Tensor]) -> Sequence[Tensor]:
        """The arrays of each parameter, in the order of `params`."""
        return arrays[0].unbind(0) if self.stacked else arrays

    def _gather(self, arrays: list[Tensor], tensors: list[Any]) -> None:
        """Copy tensors, one a parameter, to arrays of this part."""
        if self.stacked and tensors[0].dtype == self.dtype:
            torch.stack(tensors, out=arrays[0])
        else:
            torch._foreach_copy_(list(self._each(arrays)), tensors)

    def follow(self, state: dict[Any, Any]) -> None:
        """Make the moments what the optimizer's state is; what is missing there begins at 0."""
        for p, views in zip(self.params, self.views, strict=True):
            held = state[p]
            for name, view in views.items():
                known = held.get(name)
                if known is view:
                    continue
                if known is None:
                    view.zero_()
                else:
                    view.copy_(torch.as_tensor(known))
                held[name] = view

    def gram(self, backend: Backend, S: Tensor) -> None:
        """Write ``A Aᵀ`` or ``Bᵀ B`` of every factor to its place in S."""
        if self.copied:
            self._gather(self.X, [p.detach() for p in self.params])
        gram = backend.gram_columns if self.side else backend.gram_rows
        S[self.places] = gram(self.X, S.dtype, self.workspace)

    def precondition(self, backend: Backend, P: Tensor | None) -> None:
        """``P G`` for factors A, ``G Pᵀ`` for factors B, or G itself, in `D`."""
        G: list[Any] = [p.grad for p in self.params]
        if self.copied:
            self._gather(self.G, G)
            G = self.G
        self.D = [g.clone() for g in G] if P is None else self._apply(backend, P, G)

    def _apply(
        self,
        backend: Backend,
        P: Tensor,
        X: list[Tensor],
        onto: list[Tensor] | None = None,
        keep: float = 1.0,
    ) -> list[Tensor]:
        """``P X``, or ``X Pᵀ`` for B; see `Backend.apply_left`."""
        P = P[self.places].mT if self.side else P[self.places]
        each = [P] if self.stacked else list(P.unbind(0))
        if self.side:
            return backend.apply_right(X, each, self.workspace, onto, keep)
        return backend.apply_left(each, X, self.workspace, onto, keep)

    def kernel(self, own: bool) -> Iterator[tuple[Tensor, ...]]:
        """Target, gradient, step and moments for the kernel, a stack with equal steps at once.

        Parameters
        ----------
        own : bool
            Whether the target is the parameters, else the gradient, which the direction replaces.
        """
        self.steps += 1
        arrays = [self.X if own else self.D, self.D, *self.moments.values()]
        counts = self.steps.numpy()
        if self.stacked and (counts == counts[0]).all():
            target, gradient, *moments = (x[0] for x in arrays)
            yield target, gradient, self.steps[0], *moments
            return
        steps = self.steps.unbind(0)
        yield from zip(
            *map(self._each, arrays[:2]), steps, *map(self._each, arrays[2:]), strict=True
        )

    def move(self, backend: Backend, P: Tensor, keep: float) -> None:
        """``X <- keep X + P D``, or with ``D Pᵀ`` for B."""
        moved = self._apply(backend, P, self.D, self.X, keep)
        for x, new in zip(self.X, moved, strict=True):
            if new is not x:  # from the generic backend
                x.copy_(new)

    def write(self) -> None:
        """Copy the stack back to the parameters, if there is one."""
        if self.copied and self.group is not None:
            store(self.params, self._each(self.X), self.group)


class ListwiseAdamW:
    """The step of all pairs of one group, rank and dtype.

    Parameters
    ----------
    optimizer : Optimizer
        Whose state holds step and moments of every factor, as torch's AdamW has them.
    group : dict
        The parameter group.
    pairs : sequence of TensorPair
        Of one rank and dtype, dense, on a CPU.
    moving : sequence of (bool, bool)
        Whether A and B of each pair are to be moved.
    """

    def __init__(
        self,
        optimizer: Any,
        group: dict[str, Any],
        pairs: Sequence[TensorPair],
        moving: Sequence[Moving],
    ) -> None:
        self.optimizer, self.group, self.recipe = optimizer, group, recipe_of(group)
        alike: dict[Any, list[int]] = {}
        factors = [pair[:2] for pair in pairs]
        for side in (0, 1):
            for i, both in enumerate(factors):
                p = both[side]
                shape = p.shape if p.numel() < LARGE else None
                alike.setdefault((side, shape, moving[i][side]), []).append(i)
        count = len(pairs)
        self.parts = [
            Part(
                [factors[i][side] for i in members],
                side,
                [i + side * count for i in members],
                shape is not None,
                group if moves else None,
            )
            for (side, shape, moves), members in alike.items()
        ]
        self.moving = [part for part in self.parts if part.group is not None]
        self.params = [p for part in self.moving for p in part.params]
        self.dtype, r = self.parts[0].dtype, pairs[0].A.shape[0]
        self.backend = get_backend(pairs[0].A)
        dtype = self.backend.compute_dtype(self.dtype, self.recipe.compute_dtype)
        self.S = torch.empty((2 * count, r, r), dtype=dtype)
        self.sizes = [(pair.B.shape[0], pair.A.shape[1]) for pair in pairs]
        values = [Factors(A.detach(), B.detach()) for A, B in factors]
        self.bundle = Bundle(self.backend, values, dtype=dtype, workspace={})

    def prepare(self) -> Tensor | None:
        """Grams, their powers and the preconditioned gradients; the power behind Adam, if any."""
        for part in self.moving:
            part.follow(self.optimizer.state)
        damping, damping_mode, placement = self.recipe[:3]
        with self.backend.exact(self.S):
            for part in self.parts:
                part.gram(self.backend, self.S)
            powers = split_power(self.bundle, self.S, self.sizes, placement, damping, damping_mode)
            first, second = (None if P is None else P.to(self.dtype) for P in powers)
            for part in self.moving:
                part.precondition(self.backend, first)
        return second

    def finish(self, second: Tensor | None) -> None:
        """Adam, then the move along what the power behind it makes of the direction, if any."""
        lr, weight_decay = float(self.group["lr"]), self.group["weight_decay"]
        if second is None:
            self._adam(True, lr, weight_decay)
        else:
            # A decay of 1 at a rate of 1 leaves the negative direction alone in the target.
            self._adam(False, 1.0, 1.0)
            if lr:
                with self.backend.exact(self.S):
                    for part in self.moving:
                        part.move(self.backend, lr * second, 1 - lr * weight_decay)
        for part in self.moving:
            part.write()

    def _adam(self, own: bool, lr: float, weight_decay: float) -> None:
        group = self.group
        lists = zip(*(some for part in self.moving for some in part.kernel(own)), strict=True)
        targets, gradients, steps, exp_avgs, exp_avg_sqs, *maxima = map(list, lists)
        torch._fused_adamw_(
            targets,
            gradients,
            exp_avgs,
            exp_avg_sqs,
            maxima[0] if maxima else [],
            steps,
            lr=lr,
            beta1=group["betas"][0],
            beta2=group["betas"][1],
            weight_decay=weight_decay,
            eps=group["eps"],
            amsgrad=group["amsgrad"],
            maximize=group["maximize"],
        )


def listwise_work(optimizer: Any, pairs: Sequence[TensorPair], sides: str) -> list[ListwiseAdamW]:
    """Work for the pairs that can be stepped over lists: dense ones on a CPU, each in one group.

    Parameters
    ----------
    optimizer : Optimizer
        Whose step is torch's AdamW behind the preconditioner.
    pairs : sequence of TensorPair
        All pairs.
    sides : {"A", "B", "AB"}
        The factors to be moved.
    """
    groups = optimizer.param_groups
    group_of = {id(p): i for i, group in enumerate(groups) for p in group["params"]}
    fits = [_fits(group) for group in groups]
    work: dict[Any, tuple[list[TensorPair], list[Moving]]] = {}
    for pair in pairs:
        moves = ("A" in sides and pair.A.grad is not None, "B" in sides and pair.B.grad is not None)
        owners = {group_of[id(p)] for p, moving in zip(pair[:2], moves, strict=True) if moving}
        if len(owners) == 1 and fits[i := owners.pop()] and _is_dense(pair):
            members = work.setdefault((i, pair.A.shape[0], pair.A.dtype), ([], []))
            members[0].append(pair)
            members[1].append(moves)
    return [ListwiseAdamW(optimizer, groups[key[0]], *members) for key, members in work.items()]


def _fits(group: dict[str, Any]) -> bool:
    """Return whether the fused kernel has the options of a group on a CPU."""
    wanted = group["fused"] is not False and not group["foreach"] and not group["capturable"]
    return wanted and not any(isinstance(x, Tensor) for x in (group["lr"], *group["betas"]))


def _is_dense(pair: TensorPair) -> bool:
    """Return whether the parameters of a pair are the factors themselves, on a CPU."""
    return (
        len(pair.views) == 1
        and all(view.is_plain for view in pair.views[0])
        and pair.middle is None
        and not any(pair.twins)
        and pair.A.ndim == pair.B.ndim == 2
        and pair.A.device.type == "cpu"
        and not is_distributed(pair.A)
        and pair.A.dtype == pair.B.dtype
    )

"""Scaled AdamW by stacks of factors of one shape.

Their moments lie there too, so that one call serves all of them; on a CPU large factors are read
and written where they are. Adam itself is torch's fused kernel, whose target is the gradient where
a second half follows: so nothing has to be zeroed.
"""

from collections.abc import Iterator, Sequence
from typing import Any, cast

import torch
from torch import Tensor

from rlora.core.backend import LARGE, Backend, Workspace
from rlora.core.dispatch import get_backend
from rlora.core.factors import Factors
from rlora.core.metric import split_power
from rlora.core.rank_group import RankGroup
from rlora.torch.pairing.pairs import TensorPair
from rlora.torch.step.kernels import Number, check_capture, counter_dtype
from rlora.torch.step.plan import Share, take_over
from rlora.torch.step.rounding import rounded


class StackedAdamW:
    """The step of all pairs of one group, rank, dtype and device.

    Parameters
    ----------
    optimizer : Optimizer
        Its state holds step and moments of every factor, as torch's AdamW has them.
    group : dict
        The parameter group.
    pairs : sequence of TensorPair
        Dense pairs of one rank, dtype and device.
    moving : sequence of (bool, bool)
        Whether A and B of each pair are to be updated now.
    """

    def __init__(
        self,
        optimizer: Any,
        group: dict[str, Any],
        pairs: Sequence[TensorPair],
        moving: Sequence[tuple[bool, bool]],
    ) -> None:
        self.optimizer, self.group = optimizer, group
        alike: dict[Any, list[int]] = {}
        # By shapes, so that the Grams of factors on a stack are mostly a run, and read by a view.
        by_shape = sorted(range(len(pairs)), key=lambda i: (pairs[i].A.shape, pairs[i].B.shape))
        factors, updated = [pairs[i][:2] for i in by_shape], [moving[i] for i in by_shape]
        for side in (1, 0):  # the Grams of B are the first half of those of the partners
            for i, both in enumerate(factors):
                p = both[side]
                # On a device the number of launches is not to depend on the number of layers.
                small = p.device.type != "cpu" or p.numel() < LARGE
                shape = p.shape if small else None
                alike.setdefault((side, shape, updated[i][side]), []).append(i)
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
        self.shares = [share for part in self.moving for share in part.shares]
        self.dtype, self.device = self.parts[0].dtype, pairs[0].A.device
        self.backend = get_backend(pairs[0].A)
        dtype = self.backend.compute_dtype(self.dtype, group["compute_dtype"])
        places = [i + (1 - side) * count for (side, *_), some in alike.items() for i in some]
        order = sorted(range(2 * count), key=places.__getitem__)
        mixed = order != [*range(2 * count)]
        self.order = torch.tensor(order, device=self.device) if mixed else None
        self.sizes = [(B.shape[0], A.shape[1]) for A, B in factors]
        values = [Factors(A.detach(), B.detach()) for A, B in factors]
        fixed = [pairs[i].has_fixed_B(optimizer.state) for i in by_shape]
        self.ranks = RankGroup(self.backend, values, fixed_B=fixed, dtype=dtype, workspace={})

    def prepare(self) -> tuple[Number, Tensor | None]:
        """Do everything that may fail: Grams, their powers and the preconditioned gradients.

        Returns
        -------
        lr, second
            The learning rate, and the power behind Adam times it, if there is one.
        """
        if self.device.type != "cpu":
            check_capture(self.optimizer)
        state = self.optimizer.state
        take_over(self.shares, state, lambda share, k: torch.zeros_like(share.views[k]))
        group = self.group
        rate: Number = group["lr"]
        there = isinstance(rate, Tensor) and rate.device.type != "cpu"  # which a graph reads anew
        lr = cast("Tensor", rate).reshape(()).to(self.device) if there else float(rate)
        how = group["placement"], group["damping"], group["damping_mode"]
        with self.backend.exact(self.ranks.like):
            S = torch.cat([part.gram(self.backend, self.ranks.dtype) for part in self.parts])
            S = S if self.order is None else S.index_select(0, self.order)
            powers = split_power(self.ranks, S, self.sizes, *how, lr)
            first, second = (None if P is None else P.to(self.dtype) for P in powers)
            for part in self.moving:
                part.precondition(self.backend, first)
        return lr, second

    def finish(self, prepared: tuple[Number, Tensor | None]) -> None:
        """Adam, then the update along its direction, times the power behind it if there is one."""
        group, (lr, second) = self.group, prepared
        weight_decay = group["weight_decay"]
        if second is None:
            self._adam(True, lr, weight_decay)
        else:
            # A decay of 1 at a rate of 1 leaves the negative direction alone in the target.
            self._adam(False, 1.0, 1.0)
            if isinstance(lr, Tensor) or lr:
                keep = 1 - lr * weight_decay if weight_decay else 1.0
                if isinstance(keep, Tensor):  # torch's products take numbers
                    torch._foreach_mul_([x for part in self.moving for x in part.X], keep)
                    keep = 1.0
                with self.backend.exact(self.ranks.like):
                    for part in self.moving:
                        part.move(self.backend, second, keep)
        if written := [part for part in self.moving if part.copied]:
            params = [p for part in written for p in part.params]
            stacks = [x if part.stacked else x[None] for part in written for x in part.X]
            if params[0].dtype != stacks[0].dtype:
                stacks = rounded(stacks, params[0].dtype, group)
            torch._foreach_copy_(params, [x for stack in stacks for x in stack.unbind(0)])
        if self.device.type != "cpu":  # there their memory is used again
            for part in self.parts:
                part.X, part.D = [], []

    def _adam(self, own: bool, lr: Number, weight_decay: float) -> None:
        group = self.group
        torch._foreach_add_([part.steps for part in self.moving], 1)
        counters: dict[float, Tensor] = {}
        rows = [row for part in self.moving for row in part.kernel(own, counters)]
        lists = map(list, zip(*rows, strict=True))
        targets, gradients, steps, exp_avgs, exp_avg_sqs, *maxima = lists
        torch._fused_adamw_(
            targets,
            gradients,
            exp_avgs,
            exp_avg_sqs,
            maxima[0] if maxima else [],
            steps,
            lr=cast("float", lr.float() if isinstance(lr, Tensor) else lr),  # it takes both
            beta1=group["betas"][0],
            beta2=group["betas"][1],
            weight_decay=weight_decay,
            eps=group["eps"],
            amsgrad=group["amsgrad"],
            maximize=group["maximize"],
        )


class Part:
    """Factors of one side that a backend operation takes together: many small, or all large ones.

    Parameters
    ----------
    params : list of Tensor
        Factors of one dtype; of one shape if they are stacked.
    side : int
        0 for A, 1 for B.
    places : list of int
        Places of their Grams in the (2K, r, r) stack of all factors.
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
        first, last, device = places[0], places[-1], params[0].device
        run = places == [*range(first, last + 1)]  # then a view takes the place of a copy
        self.places = slice(first, last + 1) if run else torch.tensor(places, device=device)
        self.dtype = torch.promote_types(params[0].dtype, torch.float32)
        ready = all(p.dtype == self.dtype and p.is_contiguous() for p in params)
        self.copied = stacked or not ready
        # Copies lie in memory of the last step; on a device torch's allocator keeps it.
        self.held = self.copied and device.type == "cpu"
        self.X = self._memory() if self.copied else [p.detach() for p in params]
        self.workspace: Workspace = {}
        self.D: list[Tensor] = []
        """Preconditioned gradients, in whose place the kernel writes Adam's direction."""
        if group is None:
            return
        self.G = self._memory()
        # On the host as torch has them, unless the options say that the device counts.
        there = device.type != "cpu" and (group["fused"] or group["capturable"])
        where = device if there else "cpu"
        self.steps = torch.zeros(len(params), dtype=counter_dtype(there), device=where)
        names = ("exp_avg", "exp_avg_sq", "max_exp_avg_sq")[: 3 if group["amsgrad"] else 2]
        self.moments = {name: self._like_params(torch.zeros) for name in names}
        self.views = [self.steps.unbind(0), *map(self._each, self.moments.values())]
        views = zip(*self.views, strict=True)
        self.shares = [
            Share(p, ["step", *names], list(some)) for p, some in zip(params, views, strict=True)
        ]

    def _memory(self) -> list[Tensor]:
        return self._like_params(torch.empty) if self.held else []

    def _like_params(self, make: Any) -> list[Tensor]:
        shapes = [p.shape for p in self.params]
        if self.stacked:
            shapes = [torch.Size((len(shapes), *shapes[0]))]
        return [make(shape, dtype=self.dtype, device=self.params[0].device) for shape in shapes]

    def _each(self, arrays: list[Tensor]) -> Sequence[Tensor]:
        """The arrays of each parameter, in the order of `params`."""
        return arrays[0].unbind(0) if self.stacked else arrays

    def _gather(self, memory: list[Tensor], tensors: list[Any]) -> list[Tensor]:
        """Copies of tensors, one a parameter, as arrays of this part, in `memory` if it is held."""
        if not self.held:
            return [torch.stack(tensors).to(self.dtype)]
        if self.stacked and tensors[0].dtype == self.dtype:
            torch.stack(tensors, out=memory[0])
        else:
            torch._foreach_copy_(list(self._each(memory)), tensors)
        return memory

    def gram(self, backend: Backend, dtype: torch.dtype) -> Tensor:
        """``A Aᵀ`` or ``Bᵀ B`` of every factor, (k, r, r)."""
        if self.copied:
            self.X = self._gather(self.X, self.params)
        gram = backend.gram_columns if self.side else backend.gram_rows
        return cast("Tensor", gram(self.X, dtype, self.workspace))

    def precondition(self, backend: Backend, P: Tensor | None) -> None:
        """``P G`` for factors A, ``G Pᵀ`` for factors B, or G itself, in `D`."""
        G: list[Any] = [p.grad for p in self.params]
        if self.copied:
            G = self._gather(self.G, G)
        # Contiguous as the moments are: the kernel runs through memory without a look at strides.
        if P is None:
            own = self.copied and not self.held  # made by `_gather` a moment ago
            self.D = G if own else [g.clone(memory_format=torch.contiguous_format) for g in G]
        else:
            self.D = self._apply(backend, P, G)

    def _apply(
        self,
        backend: Backend,
        P: Tensor,
        X: list[Tensor],
        accumulate: list[Tensor] | None = None,
        keep: float = 1.0,
    ) -> list[Tensor]:
        """``P X``, or ``X Pᵀ`` for B; see `Backend.apply_left`."""
        places = self.places
        P = P[places] if isinstance(places, slice) else P.index_select(0, places)
        P = P.mT if self.side else P
        each = [P] if self.stacked else list(P.unbind(0))
        if self.side:
            return backend.apply_right(X, each, self.workspace, accumulate, keep)
        return backend.apply_left(each, X, self.workspace, accumulate, keep)

    def kernel(self, own: bool, counters: dict[float, Tensor]) -> Iterator[tuple[Tensor, ...]]:
        """Target, gradient, counter and moments for the kernel, a stack with equal steps at once.

        Parameters
        ----------
        own : bool
            Whether the target is the parameters, else the gradient, which the direction replaces.
        counters : dict
            Counters on the device by their value, to which those that are missing are added.
        """
        target, gradient, device = self.X if own else self.D, self.D, self.params[0].device
        steps, *moments = self.views
        if self.steps.device.type == "cpu":
            counts = self.steps.tolist()
            if device.type != "cpu":
                for n in {*counts} - counters.keys():
                    counters[n] = torch.full((), n, dtype=torch.float32, device=device)
                steps = [counters[n] for n in counts]
            if self.stacked and len({*counts}) == 1:
                yield target[0], gradient[0], steps[0], *(x[0] for x in self.moments.values())
                return
        yield from zip(*map(self._each, (target, gradient)), steps, *moments, strict=True)

    def move(self, backend: Backend, P: Tensor, keep: float) -> None:
        """``X <- keep X + P D``, or with ``D Pᵀ`` for B."""
        for x, new in zip(self.X, self._apply(backend, P, self.D, self.X, keep), strict=True):
            if new is not x:  # from the generic backend
                x.copy_(new)

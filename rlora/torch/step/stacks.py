"""Scaled AdamW by stacks of factors of one shape.

Their moments lie there too, so that one call serves all of them; on a CPU large factors are read
and written where they are. Adam itself is torch's fused kernel, whose target is the gradient where
a second half follows: so nothing has to be zeroed.
"""

from collections.abc import Sequence
from typing import Any, TypeAlias, cast

import torch
from torch import Tensor

from rlora.core.backend import LARGE
from rlora.core.dispatch import get_backend
from rlora.core.factors import Factors
from rlora.core.placement import split_power
from rlora.core.rank_group import RankGroup
from rlora.torch.pairing.pairs import TensorPair, is_distributed
from rlora.torch.step.kernels import Number, check_capture, rate_of
from rlora.torch.step.listwise import recipe_of
from rlora.torch.step.parts import Part
from rlora.torch.step.plan import take_over
from rlora.torch.step.rounding import rounded

Moving: TypeAlias = tuple[bool, bool]
"""True for A, and for B, if it is to be updated."""


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
        Whether A and B of each pair are to be updated.
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
        dtype = self.backend.compute_dtype(self.dtype, self.recipe.compute_dtype)
        places = [i + (1 - side) * count for (side, *_), some in alike.items() for i in some]
        order = sorted(range(2 * count), key=places.__getitem__)
        in_order = order == [*range(2 * count)]
        self.order = None if in_order else torch.tensor(order, device=self.device)
        self.sizes = [(B.shape[0], A.shape[1]) for A, B in factors]
        values = [Factors(A.detach(), B.detach()) for A, B in factors]
        self.ranks = RankGroup(self.backend, values, dtype=dtype, workspace={})

    def _start(self, i: int, k: int) -> Tensor:
        return torch.zeros_like(self.shares[i].views[k])

    def prepare(self) -> tuple[Number, Tensor | None]:
        """Do everything that may fail: Grams, their powers and the preconditioned gradients.

        Returns
        -------
        lr, second
            The learning rate, and the power behind Adam times it, if there is one.
        """
        if self.device.type != "cpu":
            check_capture(self.optimizer)
        take_over(self.shares, self.optimizer.state, self._start)
        damping, damping_mode, placement = self.recipe[:3]
        lr = self._rate()
        with self.backend.exact(self.ranks.like):
            S = torch.cat([part.gram(self.backend, self.ranks.dtype) for part in self.parts])
            S = S if self.order is None else S.index_select(0, self.order)
            powers = split_power(self.ranks, S, self.sizes, placement, damping, damping_mode, lr)
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
            new = [x for stack in rounded(stacks, params[0].dtype, group) for x in stack.unbind(0)]
            torch._foreach_copy_(params, new)
        if self.device.type != "cpu":  # there their memory is used again
            for part in self.parts:
                part.X, part.D = [], []

    def _rate(self) -> Number:
        """The learning rate: a number, or a tensor of this device, which a graph reads anew."""
        lr = rate_of(self.group)
        on_device = isinstance(lr, Tensor) and lr.device.type != "cpu"
        return cast("Tensor", lr).to(self.device) if on_device else float(lr)

    def _adam(self, own: bool, lr: Number, weight_decay: float) -> None:
        group = self.group
        torch._foreach_add_([part.steps for part in self.moving], 1)
        counters: dict[float, Tensor] = {}
        calls = [some for part in self.moving for some in part.kernel(own, counters)]
        lists = zip(*calls, strict=True)
        targets, gradients, steps, exp_avgs, exp_avg_sqs, *maxima = map(list, lists)
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


def is_dense(pair: TensorPair) -> bool:
    """Return whether the parameters of a pair are the factors themselves."""
    return (
        len(pair.views) == 1
        and all(view.is_plain for view in pair.views[0])
        and not any(pair.twins)
        and pair.A.ndim == pair.B.ndim == 2
        and not is_distributed(pair.A)
        and (pair.A.dtype, pair.A.device) == (pair.B.dtype, pair.B.device)
    )

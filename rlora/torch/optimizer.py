"""Any torch optimizer, on gradients preconditioned pair by pair.

The parent's own ``step`` runs, over *stand-ins*: for a parameter in a pair a tensor that shares its
memory and has the direction as its gradient. So every flag of the parent keeps working, its state
stays where ``state_dict`` looks for it, and the ``.grad`` of the parameter is never touched.
"""

import inspect
from collections.abc import Callable
from functools import wraps
from typing import Any

import torch
from torch import Tensor

from rlora.core.checks import check_choice
from rlora.core.linalg import DampingMode, check_damping
from rlora.core.placement import Placement
from rlora.core.transform import Order
from rlora.torch.batch import Recipe
from rlora.torch.compiling import inherited
from rlora.torch.listwise import has_kernel, listwise_work
from rlora.torch.matching import Pairs
from rlora.torch.pair_optimizer import PairOptimizer
from rlora.torch.pairs import TensorPair
from rlora.torch.plan import Plan, make_plan, over_stand_ins


class GramPreconditioned(PairOptimizer):
    """Class that `precondition` puts in front of an optimizer class. Not to be used by itself."""

    order: Order
    """Order of the updates: both factors at once, or B after A."""

    _extra = (*PairOptimizer._extra, "order")

    def __init__(
        self,
        params: Any,
        *args: Any,
        pairs: Pairs = None,
        adapter: str | None = None,
        damping: float = 1e-4,
        damping_mode: DampingMode = "covariant",
        placement: Placement = "before",
        order: Order = "jacobi",
        compute_dtype: str | None = None,
        stochastic_rounding: bool = False,
        **kwargs: Any,
    ) -> None:
        check_choice("order", order, Order)
        self.order = order
        own = Recipe(damping, damping_mode, placement, compute_dtype, stochastic_rounding)
        super().__init__(params, *args, own=own._asdict(), pairs=pairs, adapter=adapter, **kwargs)
        for p in (p for pair in self._pairs for p in pair.moved):  # parents that make state at once
            held = self.state.get(p, {})
            held.update((key, x.float()) for key, x in held.items() if _is_narrow(x))

    def _check_own(self, group: dict[str, Any]) -> None:
        check_damping(group["damping"], group["damping_mode"], group["compute_dtype"])
        check_choice("placement", group["placement"], Placement)
        if group["placement"] != "before" and not isinstance(self, torch.optim.AdamW):
            msg = (
                f"placement {group['placement']!r} needs decoupled weight decay and moments that "
                f"do not see the parameters: it works over AdamW, not {type(self).__name__}"
            )
            raise ValueError(msg)

    def _choices(self, group: dict[str, Any]) -> list[Any]:
        # What decides whether a step goes over lists, and what state it then has.
        return [*super()._choices(group), has_kernel(group), group.get("amsgrad")]

    def _make_plans(self, pairs: list[TensorPair]) -> list[Plan]:
        """One plan, or with Gauss-Seidel one a side."""
        plans = []
        for sides in ("AB",) if self.order == "jacobi" else ("A", "B"):
            work = listwise_work(self, pairs, sides) if self._steps_as_adamw() else []
            plain = sides[0] == "A"
            plans.append(make_plan(pairs, self.param_groups, sides, plain=plain, listwise=work))
        return plans

    def _steps_as_adamw(self) -> bool:
        """Return whether the parent's step is torch's AdamW; while compiling it is the parent's."""
        parent_step = inherited(type(self), "step", PairOptimizer)
        same = inspect.unwrap(parent_step) is inspect.unwrap(torch.optim.AdamW.step)
        decoupled = isinstance(self, torch.optim.AdamW)
        return decoupled and same and not torch.compiler.is_compiling()


def over_wide(method: Callable[..., Any]) -> Callable[..., Any]:
    """A method of the parent, such as ``eval``, for parameters that are narrower than their state.

    The parent's state of a bfloat16 factor is float32, made beside its stand-in, and so must be
    what stands beside it here: a copy, rounded to the parameter afterwards.
    """

    @wraps(method)
    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        stands_for = {
            p: wide for p, held in self.state.items() if (wide := _widened(p, held)) is not None
        }
        if not stands_for:
            return method(self, *args, **kwargs)
        members = [
            [(p, stands_for.get(p, p)) for p in group["params"]] for group in self.param_groups
        ]
        result = over_stand_ins(self, members, lambda parent: method(parent, *args, **kwargs))
        with torch.no_grad():
            for p, wide in stands_for.items():
                p.copy_(wide)
                if p.grad is not None:
                    p.grad = None if wide.grad is None else p.grad.copy_(wide.grad)
        return result

    return call


def _widened(p: Any, held: Any) -> Tensor | None:
    """A copy as wide as the state of its shape, or None where that is no wider."""
    if not _is_narrow(p):
        return None
    like = [x for x in held.values() if isinstance(x, Tensor) and x.shape == p.shape]
    if not any(x.dtype == torch.float32 for x in like):
        return None
    wide: Tensor = p.detach().float()
    wide.grad = None if p.grad is None else p.grad.float()
    return wide


def _is_narrow(x: Any) -> bool:
    return isinstance(x, Tensor) and x.dtype in (torch.bfloat16, torch.float16)

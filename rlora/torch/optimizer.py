"""Any torch optimizer, on gradients preconditioned pair by pair.

The parent's own ``step`` runs, over *stand-ins*: for a parameter in a pair a tensor that shares its
memory and has the direction as its gradient. So every flag of the parent keeps working, its state
stays where ``state_dict`` looks for it, and the ``.grad`` of the parameter is never touched.
"""

from typing import Any

import torch

from rlora.core.checks import check_choice
from rlora.core.linalg import DampingMode, check_damping
from rlora.core.placement import Placement
from rlora.core.transform import Order
from rlora.torch.batch import Recipe
from rlora.torch.matching import Pairs
from rlora.torch.pair_optimizer import PairOptimizer
from rlora.torch.pairs import TensorPair
from rlora.torch.plan import Plan, make_plan


class GramPreconditioned(PairOptimizer):
    """What `precondition` puts in front of an optimizer class. Not to be used by itself."""

    order: Order
    """Whether both factors move at once, or B after A."""

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

    def _check_own(self, group: dict[str, Any]) -> None:
        check_damping(group["damping"], group["damping_mode"], group["compute_dtype"])
        check_choice("placement", group["placement"], Placement)
        if group["placement"] != "before" and not isinstance(self, torch.optim.AdamW):
            msg = (
                f"placement {group['placement']!r} needs decoupled weight decay and moments that "
                f"do not see the parameters: it works over AdamW, not {type(self).__name__}"
            )
            raise ValueError(msg)

    def _make_plans(self, pairs: list[TensorPair]) -> list[Plan]:
        """One plan, or with Gauss-Seidel one a side."""
        sides = ("AB",) if self.order == "jacobi" else ("A", "B")
        return [make_plan(pairs, self.param_groups, s, plain=s[0] == "A") for s in sides]

"""Torch optimizers on gradients preconditioned pair by pair: AdamW, SGD, and any other."""

import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence, Set
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.optim import Optimizer

from rlora.core.checks import check_betas, check_choice, check_unit
from rlora.core.metric import DampingMode, Placement, check_damping
from rlora.core.transform import Order
from rlora.torch.optimizers.lora_optimizer import LoRAOptimizer
from rlora.torch.optimizers.state_entries import ELEMENTWISE, OF_METHODS, Shapes
from rlora.torch.pairing.discovery import Pairs
from rlora.torch.pairing.pairs import TensorPair, params_of
from rlora.torch.step.kernels import SGD, AdamW, Kernel
from rlora.torch.step.plan import Turn, for_its_plans, has_step_of_torch
from rlora.torch.step.standins import StandIns, is_narrow
from rlora.torch.step.steps import steps_of

KERNELS: dict[Any, type[Kernel]] = {torch.optim.AdamW: AdamW, torch.optim.SGD: SGD}


class GramPreconditioned(LoRAOptimizer):
    """Class that `precondition` puts in front of an optimizer class. Not to be used by itself."""

    order: Order
    """Order of the updates: both factors at once, or B after A."""

    _kernel: ClassVar[type[Kernel]]
    """The kernel of torch's own AdamW and SGD; the step of any other parent, over stand-ins."""

    _extra = (*LoRAOptimizer._extra, "order")

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        cls._kernel = next((k for kind, k in KERNELS.items() if _steps_as(cls, kind)), StandIns)

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
        stochastic_rounding: bool = True,
        **kwargs: Any,
    ) -> None:
        check_choice("order", order, Order)
        # Torch's own count steps for each parameter.
        if order == "gauss_seidel" and self._kernel is StandIns and not has_step_of_torch(self):
            msg = (
                f"order='gauss_seidel' runs the parent's step for A and then for B, and "
                f"{type(self).__bases__[-1].__name__} may count that as two steps: it is for "
                f"optimizers of torch.optim alone; use order='jacobi'"
            )
            raise ValueError(msg)
        self.order = order
        own = {
            "damping": damping,
            "damping_mode": damping_mode,
            "placement": placement,
            "compute_dtype": compute_dtype,
            "stochastic_rounding": stochastic_rounding,
        }
        super().__init__(params, *args, own=own, pairs=pairs, adapter=adapter, **kwargs)
        if self._kernel is StandIns:
            _check_reach(self)
        for p in params_of(self._pairs):  # parents that make state at once
            held = self.state.get(p, {})
            held.update((key, x.float()) for key, x in held.items() if is_narrow(x))

    def _check_own(self, group: dict[str, Any]) -> None:
        check_damping(group["damping"], group["damping_mode"], group["compute_dtype"])
        check_choice("placement", group["placement"], Placement)
        if self._kernel is AdamW:
            check_betas(group["betas"])
            for beta in group["betas"]:
                if not isinstance(beta, Tensor):
                    check_unit("each of betas", beta)
        if group["placement"] != "before" and self._kernel is not AdamW:
            msg = (
                f"placement {group['placement']!r} needs decoupled weight decay and moments that "
                f"do not see the parameters: it works over AdamW with torch's own step, not over "
                f"{type(self).__name__}; use placement='before'"
            )
            raise ValueError(msg)

    def _state_shapes(
        self, pairs: Sequence[TensorPair], groups: Sequence[Mapping[str, Any]]
    ) -> Callable[[Tensor], Shapes]:
        if self._kernel is not StandIns:
            return super()._state_shapes(pairs, groups)
        # Whatever the parent keeps, unless a method class has saved it: these have a `scaling`.
        of_method = "scaling" not in self.defaults and any("scaling" in group for group in groups)
        words = OF_METHODS if of_method else set[str]()
        two = getattr(self, "optimizer_name", None) == "ademamix"  # bitsandbytes': averages in one

        def shapes_of(p: Tensor) -> Shapes:
            known = dict.fromkeys(ELEMENTWISE, p.shape)
            return Shapes({**known, "state1": torch.Size((2, *p.shape))} if two else known, words)

        return shapes_of

    def _turns(self, pairs: list[TensorPair]) -> list[Turn]:
        sides = ("AB",) if self.order == "jacobi" else ("A", "B")
        return [steps_of(for_its_plans(self), self._kernel, pairs, some) for some in sides]


def _check_reach(optimizer: LoRAOptimizer) -> None:
    """TypeError for a parent that has parameters elsewhere than in its groups.

    It would step these along their own gradients, and not what stands in the groups meanwhile.
    """
    known = {id(p) for group in optimizer.param_groups for p in group["params"]}
    ours, seen = {*optimizer._extra, "param_groups", "state", "_seen"}, {id(optimizer)}
    for name, value in vars(optimizer).items():
        if name not in ours and _holds(value, known, seen):
            msg = (
                f"{type(optimizer).__bases__[-1].__name__} has parameters in its attribute "
                f"{name!r} too, where it would step them without a preconditioner; give "
                f"precondition an optimizer that steps what is in its param_groups and nothing "
                f"else, such as the one inside of a wrapper"
            )
            raise TypeError(msg)


def _holds(value: Any, known: Set[int], seen: set[int]) -> bool:
    """Return whether a value is one of the tensors, or a collection or an optimizer of them.

    Those of `seen`, by their ids, are not looked at again: collections may hold themselves.
    """
    if isinstance(value, Tensor):
        return id(value) in known
    inside: Iterable[Any] = ()
    if isinstance(value, Optimizer):
        inside = value.param_groups
    elif isinstance(value, Mapping):
        inside = [*value, *value.values()]
    elif isinstance(value, (list, tuple, Set)):
        inside = value
    if id(value) in seen:
        return False
    seen.add(id(value))
    return any(_holds(x, known, seen) for x in inside)


def _steps_as(kind: type[LoRAOptimizer], parent: Any) -> bool:
    """Return whether a class steps as torch's own class does."""
    return issubclass(kind, parent) and all(
        kind._bare.get(name) is inspect.unwrap(getattr(parent, name))
        for name in ("step", "_init_group")
    )

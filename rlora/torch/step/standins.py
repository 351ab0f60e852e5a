"""Any torch optimizer on preconditioned gradients: its own step, over stand-ins.

A stand-in is a tensor that the parent optimizer steps in the place of a parameter: it has the
parameter's memory, or a wider copy, and the direction as its gradient. So every flag of the parent
keeps working, its state stays where ``state_dict`` looks for it, and the parameter's own ``.grad``
is never touched.
"""

from collections.abc import Callable, Sequence
from functools import wraps
from typing import Any

import torch
from torch import Tensor

from rlora.torch.pairing.pairs import local, params_of
from rlora.torch.step.dtensors import like_param
from rlora.torch.step.kernels import Kernel, Number
from rlora.torch.step.plan import over_stand_ins


class StandIns(Kernel):
    """The step of a parent that nobody knows: it runs once for all groups, between the halves."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        both = zip(self.params, self.targets, strict=True)
        self.members = [(p, like_param(p, target)) for p, target in both]
        self._memory = [target.detach() for target in self.targets]

    def prepare(self, directions: Sequence[Tensor]) -> None:
        """Give every stand-in its gradient."""
        for (p, stand_in), direction in zip(self.members, directions, strict=True):
            held: Any = stand_in.grad
            # To wrap takes longer than to see that it is there.
            if held is None or local(held).data_ptr() != direction.data_ptr():
                stand_in.grad = like_param(p, direction)

    def run(self, directions: Sequence[Tensor], lr: Number, weight_decay: float) -> None:
        """Let the gradients go; the parent has run, and may have put its results elsewhere."""
        for (p, stand_in), memory in zip(self.members, self._memory, strict=True):
            stand_in.grad = None
            if (found := local(stand_in)).data_ptr() != memory.data_ptr():  # p.data = ...
                memory.copy_(found)
                stand_in.data = like_param(p, memory)


def over_wide(method: Callable[..., Any]) -> Callable[..., Any]:
    """A method of the parent, such as ``eval``, for parameters that are narrower than their state.

    The parent's state of a bfloat16 factor is float32, made beside its stand-in, and so must be
    what stands beside it here: a copy, rounded to the parameter afterwards. For parameters in no
    pair it is the parent's own, and so it is within a step of the parent, which may call it: the
    state has stand-ins then, and no factor.
    """

    @wraps(method)
    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        stands_for: dict[Tensor, Tensor] = {}
        pairs = getattr(self, "_pairs", ())  # none while the parent's constructor is at work
        for p in params_of(pairs):
            if (wide := _widened(p, self.state.get(p, {}))) is not None:
                stands_for[p] = wide
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
    if not is_narrow(p):
        return None
    like = [x for x in held.values() if isinstance(x, Tensor) and x.shape == p.shape]
    if not any(x.dtype == torch.float32 for x in like):
        return None
    wide: Tensor = p.detach().float()
    wide.grad = None if p.grad is None else p.grad.float()
    return wide


def is_narrow(x: Any) -> bool:
    """Return whether it is a tensor whose moments are to be wider."""
    return isinstance(x, Tensor) and x.dtype in (torch.bfloat16, torch.float16)

"""The step of a method on DTensors: gathered, stepped whole on every process, cut again.

A method may normalise, rotate or cut off what it likes: it sees whole factors, as on one process.
So every process does all of the work and keeps all of the state, and what is sent are the factors
and their gradients. Scaled AdamW and SGD send r x r matrices instead
(`rlora.torch.step.dtensor_group`).
"""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor, Replicate

from rlora.torch.pairing.pairs import TensorPair, local
from rlora.torch.step.method_batch import Portions, portions


class Gathered:
    """The pairs of one group of which every process has pieces.

    Which collectives run depends on the layouts alone: a factor without a gradient on this process
    takes part with zeros, and is updated if another process has a gradient of it.
    """

    def __init__(self, optimizer: Any, group: int, pairs: list[TensorPair]) -> None:
        self._optimizer, self._group = optimizer, group
        self._pairs = [pair.whole() for pair in pairs]
        self._factors: list[tuple[Any, Tensor]] = [
            (p, whole)
            for pair, copy in zip(pairs, self._pairs, strict=True)
            for p, whole in ((pair.A, copy.A), (pair.B, copy.B))
        ]
        self._moving: list[bool] = []
        self._portions: list[Portions] = []

    def prepare(self) -> None:
        """No-op; validated at construction."""

    def finish(self, _: None) -> None:
        """Gather, step, and keep this process's pieces."""
        moving = _anywhere([p for p, _ in self._factors])
        for (p, whole), moves in zip(self._factors, moving, strict=True):
            whole.copy_(p.detach().full_tensor())
            grad: Any = torch.zeros_like(p) if p.grad is None else p.grad
            whole.grad = grad.full_tensor() if moves else None
        if moving != self._moving:
            self._moving = moving
            self._portions = portions(self._optimizer, self._group, self._pairs)
        for portion in self._portions:
            portion.prepare()
        for portion in self._portions:
            portion.finish(None)
        for (p, whole), moves in zip(self._factors, moving, strict=True):
            if moves:
                local(p).copy_(_piece(whole, p))
            whole.grad = None


def _anywhere(factors: list[Any]) -> list[bool]:
    """Return for each factor whether any process has a gradient of it."""
    flags: Any = torch.tensor([p.grad is not None for p in factors], dtype=torch.int32)
    for mesh in dict.fromkeys(p.device_mesh for p in factors):
        flags = flags.to(mesh.device_type)
        for dimension in range(mesh.ndim):
            dist.all_reduce(flags, dist.ReduceOp.MAX, group=mesh.get_group(dimension))
    return [bool(flag) for flag in flags.tolist()]


def _piece(whole: Tensor, p: Any) -> Tensor:
    """The piece of a whole factor on this process; nothing is sent."""
    everywhere = [Replicate()] * p.device_mesh.ndim
    copy = DTensor.from_local(whole, p.device_mesh, everywhere, run_check=False)
    return local(copy.redistribute(placements=p.placements))

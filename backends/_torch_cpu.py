"""Gains of a CPU alone: no waits, memory that is used again, and torch's fused Adam.

Fresh pages are what a large allocation spends most of its time on: more than the arithmetic.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rlora.core.backend import Workspace

MOST_CONSTANTS = 1000
"""So many are kept; where a schedule changes betas at each step others would follow for ever. None
is given up, as a captured graph may read it."""

_arena: ContextVar["Arena | None"] = ContextVar("arena", default=None)


class Arena:
    """The large arrays of a step in the order in which it asks for them, the same every time."""

    def __init__(self) -> None:
        self._blocks: list[Tensor] = []
        self._taken = 0
        self.constants: dict[Any, Tensor] = {}

    def begin(self) -> None:
        """From now on what has been handed out is handed out again."""
        self._taken = 0

    def take(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """Uninitialised memory, nobody else's until `begin`."""
        shape = tuple(shape)
        size, place = math.prod(shape), self._taken
        self._taken += 1
        if place == len(self._blocks):
            self._blocks.append(torch.empty(0, device="cpu"))
        held = self._blocks[place]
        if held.dtype == dtype and held.shape == shape:
            return held
        if held.dtype != dtype or held.numel() < size:
            held = self._blocks[place] = torch.empty(shape, dtype=dtype, device="cpu")
            return held
        return held.view(-1)[:size].view(shape)


@contextmanager
def reusing(workspace: Workspace) -> Iterator[None]:
    """Large arrays made inside lie where those of the last time lay."""
    arena = workspace.setdefault("arena", Arena())
    arena.begin()
    token = _arena.set(arena)
    try:
        yield
    finally:
        _arena.reset(token)


def empty(shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """Uninitialised memory, inside of `reusing` that of the last time."""
    arena = None if torch.compiler.is_compiling() else _arena.get()
    if arena is None:
        return torch.empty(tuple(shape), dtype=dtype, device="cpu")
    return arena.take(shape, dtype)


def kept(key: Any, make: Callable[[], Tensor]) -> Tensor:
    """A constant, which nobody may write to; inside of `reusing` that of the last time."""
    arena = None if torch.compiler.is_compiling() else _arena.get()
    if arena is None:
        return make()
    found = arena.constants.get(key)
    if found is None:
        found = make()
        # A graph that is being captured writes its own only when it is replayed.
        capturing = torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()
        if len(arena.constants) < MOST_CONSTANTS and not capturing:
            arena.constants[key] = found
    return found


def is_plain(*tensors: Tensor) -> bool:
    """Return whether these are dense, of one float type, on a CPU, and in no graph or trace."""
    dtype = tensors[0].dtype
    if torch.compiler.is_compiling() or dtype not in (torch.float32, torch.float64):
        return False
    for x in tensors:
        if type(x) is not Tensor or x.device.type != "cpu" or x.dtype != dtype:
            return False
        if x.requires_grad or not x.is_contiguous():
            return False
    return True


def is_eager_cpu(x: Tensor) -> bool:
    """Return whether values can be asked for without a wait and outside of a graph or a trace."""
    return type(x) is Tensor and x.device.type == "cpu" and not torch.compiler.is_compiling()


def are_finite(S: Tensor) -> bool:
    """Return whether all entries of a tensor on a CPU are finite: cheaper than a guard."""
    return bool(np.isfinite(S.numpy()).all())


def eigh_waits(S: Tensor) -> bool:
    """Return whether torch's eigh would hold up the host until the device is done."""
    return bool(S.device.type == "cuda")


SAMPLE = 64
"""So many entries of a matrix mostly tell that its largest one is not tiny."""


def are_within(X: Sequence[Tensor], low: float, high: float) -> bool:
    """`Backend.within`: known of plain tensors (..., r, n) alone."""
    if not is_plain(*X):
        return False
    for x in X:
        ends = torch.aminmax(x)  # in one pass; NumPy reads without an operation of torch
        peak = max(-float(ends.min.numpy()), float(ends.max.numpy()))
        if not peak < high:  # NaN too
            return False
        if peak == 0 or not low:
            continue
        layers = x.numpy().reshape(-1, x.shape[-2] * x.shape[-1])
        if (np.abs(layers[:, :SAMPLE]).max(axis=1) >= low).all():
            continue
        peaks = np.maximum(layers.max(axis=1), -layers.min(axis=1))
        if not ((peaks >= low) | (peaks == 0)).all():
            return False
    return True


def fused_adam(
    mu: Tensor, nu: Tensor, g: Tensor, b1: float, b2: float, c1: Any, root2: Any, eps: Any
) -> tuple[Tensor, Tensor, Tensor] | None:
    """`Backend.adam` in one pass over memory; None where layers differ in their step count.

    The moments are new arrays, but inside of `reusing` the old ones, written over.

    ``(M / c1) / (sqrt(V) / root2 + eps) = (root2 / c1) M / (sqrt(V) + root2 eps)``: what torch's
    kernel subtracts from a zero parameter after infinitely many steps, without a correction left.
    """
    first, root, small = map(_common, (c1, root2, eps))
    if first is None or root is None or small is None:
        return None
    d = empty(g.shape, g.dtype).zero_()
    if _arena.get() is None:
        mu, nu = mu.clone(), nu.clone()
    torch._fused_adamw_(
        [d],
        [g],
        [mu],
        [nu],
        [],
        [torch.tensor(float("inf"), device="cpu")],
        lr=-root / first,
        beta1=b1,
        beta2=b2,
        weight_decay=0.0,
        eps=root * small,
        amsgrad=False,
        maximize=False,
    )
    return mu, nu, d


def _common(x: Any) -> float | None:
    """The one number that an array in a CPU's memory holds, if it does."""
    if not isinstance(x, Tensor):
        return float(x)
    values = x.numpy()
    return float(values.flat[0]) if (values == values.flat[0]).all() else None

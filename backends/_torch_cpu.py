"""What only a CPU gains from: torch's fused Adam on functional state, LAPACK on every core."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor

WORTH_A_THREAD = 32
"""The least rank at which a decomposition costs more than the thread that does it."""


def is_plain(*tensors: Tensor) -> bool:
    """Whether these are dense tensors of one float type in a CPU's memory, outside of a trace."""
    x = tensors[0]
    return (
        x.device.type == "cpu"
        and x.dtype in (torch.float32, torch.float64)
        and not torch.compiler.is_compiling()
        and all(type(t) is Tensor and t.dtype == x.dtype and t.is_contiguous() for t in tensors)
    )


def fused_adam(
    mu: Tensor, nu: Tensor, g: Tensor, b1: float, b2: float, c1: Any, root2: Any, eps: Any
) -> tuple[Tensor, Tensor, Tensor] | None:
    """`Backend.adam` in one pass over memory; None where layers differ in their step count.

    ``(M / c1) / (sqrt(V) / root2 + eps) = (root2 / c1) M / (sqrt(V) + root2 eps)``: what torch's
    kernel subtracts from a zero parameter after infinitely many steps, without a correction left.
    """
    numbers = [_common(x) for x in (c1, root2, eps)]
    if None in numbers:
        return None
    first, root, small = (float(x) for x in numbers if x is not None)
    d, mu, nu = torch.zeros_like(g), mu.clone(), nu.clone()
    torch._fused_adamw_(
        [d],
        [g],
        [mu],
        [nu],
        [],
        [torch.tensor(float("inf"))],
        lr=-root / first,
        beta1=b1,
        beta2=b2,
        weight_decay=0.0,
        eps=root * small,
        amsgrad=False,
        maximize=False,
    )
    return d, mu, nu


def _common(x: Any) -> float | None:
    """The one number that an array in a CPU's memory holds, if it does."""
    if not isinstance(x, Tensor):
        return float(x)
    values = x.numpy()
    return float(values.flat[0]) if (values == values.flat[0]).all() else None


def on_all_cores(f: Callable[[Tensor], tuple[Tensor, ...]], S: Tensor) -> tuple[Tensor, ...]:
    """``f(S)`` for a stack (K, r, r), which LAPACK would work off on one core."""
    threads = min(torch.get_num_threads(), S.shape[0])
    if threads < 2 or S.shape[-1] < WORTH_A_THREAD or not is_plain(S):
        return f(S)
    with ThreadPoolExecutor(threads) as pool:
        parts = list(pool.map(f, S.tensor_split(threads)))
    return tuple(torch.cat(pieces) for pieces in zip(*parts, strict=True))

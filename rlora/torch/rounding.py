"""How wide results get into narrower parameters."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

HALF = 1 << 16
"""bfloat16 is the upper half of float32; the lower half has so many values."""


def check_rounding(value: Any) -> None:
    """TypeError unless `value` says yes or no."""
    if not isinstance(value, bool):
        msg = f"stochastic_rounding must be True or False, got {value!r} ({type(value).__name__})"
        raise TypeError(msg)


def store(params: Sequence[Tensor], wide: Sequence[Tensor], group: dict[str, Any]) -> None:
    """Copy results into parameters, each number to the nearest or, if the group says so, at random.

    The random bits depend on a count in the group alone: replicas stay equal, a resumed run goes on
    bit for bit, and torch's own random state is not touched.
    """
    results = list(wide)
    chosen = [i for i, p in enumerate(params) if p.dtype == torch.bfloat16 != results[i].dtype]
    if group["stochastic_rounding"] and chosen:
        group["rounded"] = group.get("rounded", 0) + 1
        for i, x in zip(
            chosen, _at_random([results[i] for i in chosen], group["rounded"]), strict=True
        ):
            results[i] = x
    torch._foreach_copy_(list(params), results)


def _at_random(wide: list[Tensor], seed: int) -> list[Tensor]:
    """Neighbours in bfloat16 of float32 numbers, the nearer the likelier, true in the mean."""
    flat = torch.cat([x.reshape(-1) for x in wide])
    bits = flat.view(torch.int32)
    generator = torch.Generator(flat.device).manual_seed(seed)
    noise = torch.randint(
        HALF, bits.shape, dtype=torch.int32, device=flat.device, generator=generator
    )
    cut = ((bits + noise) & -HALF).view(torch.float32)
    flat = torch.where(flat.isfinite(), cut, flat)
    parts = torch.split(flat, [x.numel() for x in wide])
    return [part.view(x.shape) for part, x in zip(parts, wide, strict=True)]

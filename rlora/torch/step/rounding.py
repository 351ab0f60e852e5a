"""Rounding of wide results to the dtype of narrower parameters."""

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

HALF = 1 << 16
"""bfloat16 is the upper half of float32; the lower half has so many values."""


def count_roundings(groups: Iterable[dict[str, Any]]) -> None:
    """Advance the rounding seed once per step."""
    for group in groups:
        if group["stochastic_rounding"]:
            group["rounded"] = group.get("rounded", 0) + 1


def store(params: Sequence[Tensor], wide: Sequence[Tensor], group: dict[str, Any]) -> None:
    """Copy results into parameters, each number to the nearest or, if the group says so, at random.

    The random bits depend on the group's count and a tensor's shape alone, not on what else there
    is: replicas stay equal, a resumed run goes on bit for bit, and torch's own random state is not
    touched.
    """
    results = list(wide)
    if group["stochastic_rounding"]:
        bits: dict[Any, Tensor] = {}  # by shape
        for i, (p, x) in enumerate(zip(params, wide, strict=True)):
            if p.dtype == torch.bfloat16:
                if x.shape not in bits:
                    bits[x.shape] = _random_bits(x, group["rounded"])
                results[i] = _at_random(x, bits[x.shape])
    torch._foreach_copy_(list(params), results)


def _random_bits(like: Tensor, seed: int) -> Tensor:
    generator = torch.Generator(like.device).manual_seed(seed)
    return torch.randint(
        HALF, like.shape, dtype=torch.int32, device=like.device, generator=generator
    )


def _at_random(x: Tensor, bits: Tensor) -> Tensor:
    """Neighbours in bfloat16 of float32 numbers, the nearer the likelier, true in the mean."""
    cut = ((x.view(torch.int32) + bits) & -HALF).view(torch.float32)
    return torch.where(x.isfinite(), cut, x)

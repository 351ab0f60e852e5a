"""Rounding of wide results to the dtype of narrower parameters."""

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from rlora.core.backend import LARGE

HALF = 1 << 16
"""bfloat16 is the upper half of float32; the lower half has so many values."""

GOLDEN = 0x9E3779B9 - (1 << 32)
"""2^32 over the golden ratio, as a signed number: what the places of two steps are apart by."""

ROUNDS = (16, 0x85EBCA6B - (1 << 32)), (13, 0xC2B2AE35 - (1 << 32))
"""Shifts and factors of MurmurHash3's finalizer (A. Appleby, public domain)."""


def begin_count(group: dict[str, Any], params: Iterable[Tensor]) -> bool:
    """Return whether a group rounds `params` at random; it has the count of its steps then.

    It begins at 0, on their device, before the first step. A graph must not put it there: Dynamo
    writes a group to which a key is added back with ``capturable=True``.
    """
    narrow = (p.device for p in params if p.dtype == torch.bfloat16)
    if not group["stochastic_rounding"] or (device := next(narrow, None)) is None:
        return False
    count, compiling = group.get("rounded", 0), torch.compiler.is_compiling()
    if not isinstance(count, Tensor):
        if compiling:
            msg = (
                "parameters have become bfloat16, or stochastic_rounding=True, since the optimizer "
                "was made: make one eager step before a compiled one"
            )
            raise RuntimeError(msg)
        group["rounded"] = torch.full((), count, dtype=torch.int32, device=device)
    elif not compiling:
        group["rounded"] = count.to(device)
    return True


def store(params: Sequence[Tensor], wide: Sequence[Tensor], group: dict[str, Any]) -> None:
    """Copy results into parameters and states, as `rounded` has them: one copy for each dtype."""
    alike: dict[Any, list[int]] = {}
    for i, (p, x) in enumerate(zip(params, wide, strict=True)):
        if p.dtype != x.dtype:
            by_itself = i if x.device.type == "cpu" and x.numel() >= LARGE else None
            alike.setdefault((p.dtype, x.dtype, x.shape, x.device, by_itself), []).append(i)
    results = list(wide)
    for (dtype, *_), members in alike.items():
        first, *others = (wide[i] for i in members)
        together = torch.stack([first, *others]) if others else first[None]
        (stack,) = rounded([together], dtype, group)
        for i, x in zip(members, stack.unbind(0), strict=True):
            results[i] = x
    for dtype in {p.dtype: None for p in params}:
        places = [i for i, p in enumerate(params) if p.dtype == dtype]
        torch._foreach_copy_([params[i] for i in places], [results[i] for i in places])


def rounded(stacks: list[Tensor], dtype: torch.dtype, group: dict[str, Any]) -> list[Tensor]:
    """Results in the dtype of parameters: nearest or, if the group says so, at random.

    Each stack (K, ...) has K results, all stacks of one device. The random bits depend on the
    group's count and a number's place in its result alone, not on what else there is: replicas stay
    equal, a resumed run goes on bit for bit, and torch's own random state is not touched.
    """
    if group["stochastic_rounding"] and dtype == torch.bfloat16:
        sizes = [x[0].numel() for x in stacks]
        bits = _random_bits(max(sizes), group["rounded"].to(stacks[0].device))
        pieces = [bits[:size].view(x.shape[1:]) for size, x in zip(sizes, stacks, strict=True)]
        stacks = list(map(_at_random, stacks, pieces))
    return [x.to(dtype) for x in stacks]


def _random_bits(count: int, seed: Tensor) -> Tensor:
    """16 bits for each place: MurmurHash3's finalizer of the place and a seed.

    Integer arithmetic, which wraps, gives the same on every device and in every graph.
    """
    h = torch.arange(count, dtype=torch.int32, device=seed.device) + seed * GOLDEN
    for shift, factor in ROUNDS:
        unsigned = (1 << (32 - shift)) - 1  # the sign is not to be shifted in
        h = (h ^ ((h >> shift) & unsigned)) * factor
    return (h ^ (h >> 16)) & (HALF - 1)


def _at_random(x: Tensor, bits: Tensor) -> Tensor:
    """Neighbours in bfloat16 of float32 numbers, the nearer the likelier, true in the mean."""
    cut = ((x.view(torch.int32) + bits) & -HALF).view(torch.float32)
    return torch.where(x.isfinite(), cut, x)

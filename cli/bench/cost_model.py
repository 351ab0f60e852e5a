"""Bytes and flops that a step cannot do without, and the least time they take.

A step reads parameters and gradients, writes parameters, reads and writes its state; its flops are
those of the products with a long axis, as `docs/reference/methods/index.md` counts them. Memory
and arithmetic may go on at once, so the least time is the longer of the two.
"""

from collections.abc import Callable, Mapping
from typing import Final, NamedTuple

from .problem import Problem
from .roofline import Peaks

Count = Callable[[int, int, int], int]
"""Function of m, n and r."""

FLOPS: Final[Mapping[str, Count]] = {
    "sgd": lambda m, n, r: 0,
    "adamw": lambda m, n, r: 0,
    "torch.adamw": lambda m, n, r: 0,
    "optax.adamw": lambda m, n, r: 0,
    "peft": lambda m, n, r: 4 * (m + n) * r**2,
    "scaled_sgd": lambda m, n, r: 4 * (m + n) * r**2,
    "scaled_adamw": lambda m, n, r: 6 * (m + n) * r**2,
    "scaled_adamw:before": lambda m, n, r: 4 * (m + n) * r**2,
    "scaled_adamw:after": lambda m, n, r: 4 * (m + n) * r**2,
    "lora_rite": lambda m, n, r: 10 * (m + n) * r**2,
    "lora_pro_sgd": lambda m, n, r: 10 * (m + n) * r**2,
    "lora_pro_adamw": lambda m, n, r: 10 * (m + n) * r**2,
    "alt_lora": lambda m, n, r: 8 * (m + n) * r**2,
    "alt_lora_plus": lambda m, n, r: 8 * (m + n) * r**2,
    "loft": lambda m, n, r: (
        2 * m * n * r**2 + 6 * m * n * r + 4 * (m + n) * r**3 + 10 * (m + n) * r**2
    ),
    "ref_lora": lambda m, n, r: 4 * (m + n) * r**2,
    "adapre_lora": lambda m, n, r: 28 * (m + n) * r**2,
    "factor_muon": lambda m, n, r: 4 * (m + n) * r**2,
    "balanced_lora": lambda m, n, r: 4 * (m + n) * r**2,
    "stable_lora": lambda m, n, r: 0,
    "lora_muon": lambda m, n, r: 6 * (m + n) * r**2,
    "riemannion": lambda m, n, r: 78 * (m + n) * r**2,
    "graft_adamw": lambda m, n, r: 10 * (m + n) * r**2,
    "lora_fa": lambda m, n, r: 2 * m * r**2,
    "lora_plus": lambda m, n, r: 0,
    "rac_lora": lambda m, n, r: 2 * (m + n) * r**2,
    "lora_sb": lambda m, n, r: 4 * n * r**2,
}
"""For each pair. A method that is not here has no prediction, and is timed all the same."""

STATE: Final[Mapping[str, Count]] = {
    "scaled_sgd": lambda m, n, r: 0,
    "scaled_adamw": lambda m, n, r: 2 * (m + n) * r + 2,
    "lora_rite": lambda m, n, r: (m + n) * r + 4 * r**2 + 2 * r + 4,
    "lora_pro_sgd": lambda m, n, r: 1,
    "lora_pro_adamw": lambda m, n, r: 2 * (m + n) * r + 3,
    "alt_lora": lambda m, n, r: (m + n) * r + 2 * r**2 + 2,
    "alt_lora_plus": lambda m, n, r: 2 * (m + n) * r + 2 * r**2 + 2,
    "loft": lambda m, n, r: (m + n) * (r + r**2) + 2 * r**2 + 4,
    "ref_lora": lambda m, n, r: 0,
    "adapre_lora": lambda m, n, r: (m + n) * r + m + n + 5,
    "factor_muon": lambda m, n, r: (m + n) * r + 2,
    "balanced_lora": lambda m, n, r: 2 * (m + n) * r + 2,
    "stable_lora": lambda m, n, r: 2 * (m + n) * r + 2,
    "lora_muon": lambda m, n, r: (m + n) * r + 3,
    "riemannion": lambda m, n, r: (m + n) * r,
    "graft_adamw": lambda m, n, r: 2 * (m + n) * r + 3,
    "lora_fa": lambda m, n, r: 2 * m * r + r**2 + 1,
    "lora_plus": lambda m, n, r: 2 * (m + n) * r + 2,
    "rac_lora": lambda m, n, r: 1,
    "lora_sb": lambda m, n, r: n * r + 3 * r**2 + 1,
}
"""Numbers that each pair keeps between two steps, as the pages list them."""

FROZEN: Final[Mapping[str, Count]] = {
    "lora_fa": lambda m, n, r: 7 * m * r,  # B, its gradient and its two moments
    "rac_lora": lambda m, n, r: (3 * m + n) * r,  # B and its gradient; A is read
    "lora_sb": lambda m, n, r: 4 * n * r,  # A and its gradient; the start of A is read
}
"""Numbers moved by the methods that leave a factor alone, state included."""


class Work(NamedTuple):
    """Counts of one step on a whole problem."""

    flops: int
    bytes: int


def least_seconds(flops: int, moved: int, peaks: Peaks) -> float:
    """No step can be faster, unless its arrays fit a cache."""
    return max(moved / peaks.bytes_per_s, flops / peaks.flops_per_s)


def work(method: str, problem: Problem, item_bytes: int, state_bytes: int) -> Work | None:
    """Count the work of a step; None for a method that nobody has counted."""
    name = method.partition(":")[0]
    count = FLOPS.get(method) or FLOPS.get(name)
    if count is None:
        return None
    shapes = [(B.shape[0], A.shape[1], A.shape[0]) for A, B in problem.pairs]
    moved = 3 * problem.parameters * item_bytes + 2 * state_bytes
    if name in FROZEN:
        moved = item_bytes * sum(FROZEN[name](*shape) for shape in shapes)
    return Work(sum(count(*shape) for shape in shapes), moved)

"""Peak rates of the machine, measured in the run: memory bandwidth and product rate."""

import time
from collections.abc import Callable
from typing import Any, Final, NamedTuple

import numpy as np

from .cases import ArraySpec

LONG: Final = 1 << 24
"""Numbers in an array too large for any cache."""

SQUARE: Final = 512
"""Side of matrices whose product keeps the arithmetic busy and the memory idle."""

SECONDS: Final = 0.1
"""For each of the two, after a warm-up."""


class Peaks(NamedTuple):
    """Rates of one backend on one device, in one dtype."""

    backend: str
    device: str
    bytes_per_s: float
    flops_per_s: float

    def or_better(self, other: "Peaks | None") -> "Peaks":
        """Take the higher of two rates each, as other programs only ever slow one down."""
        if other is None:
            return self
        return self._replace(
            bytes_per_s=max(self.bytes_per_s, other.bytes_per_s),
            flops_per_s=max(self.flops_per_s, other.flops_per_s),
        )


def measure_peaks(spec: ArraySpec) -> Peaks:
    """Add two long arrays and multiply two square ones; the best of several counts."""
    # Where a sum needs a new array, a long one would cost its pages too: what steps make is short.
    in_place = spec.name in ("numpy", "torch", "cupy")
    long = LONG if in_place else LONG // 8
    x, y = (spec.array(np.ones(long, np.float32)) for _ in range(2))
    device = str(getattr(x, "device", "cpu"))
    item = spec.backend.xp.finfo(x.dtype).bits // 8
    moving = _best(spec, _adder(spec, x, y) if in_place else _sum_of(spec, x, y))
    del x, y
    square = np.full((SQUARE, SQUARE), 1 / SQUARE, np.float32)
    X, product = spec.array(square), spec.backend.compile(spec.backend.matmul)
    multiplying = _best(spec, lambda: product(X, X))
    return Peaks(spec.name, device, 3 * long * item / moving, 2 * SQUARE**3 / multiplying)


def _adder(spec: ArraySpec, x: Any, y: Any) -> Callable[[], Any]:
    xp = spec.backend.xp
    out = xp.empty_like(x)
    return lambda: xp.add(x, y, out=out)


def _sum_of(spec: ArraySpec, x: Any, y: Any) -> Callable[[], Any]:
    add = spec.backend.compile(lambda x, y: x + y)
    return lambda: add(x, y)


def _best(spec: ArraySpec, f: Callable[[], Any]) -> float:
    spec.backend.synchronize(f())
    best, end = float("inf"), time.perf_counter() + SECONDS
    while best == float("inf") or time.perf_counter() < end:
        start = time.perf_counter()
        spec.backend.synchronize(f())
        best = min(best, time.perf_counter() - start)
    return best

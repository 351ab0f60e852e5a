"""Bytes and flops that a step cannot do without, and the least time they take.

A step reads parameters and gradients, writes parameters, reads and writes its state; its flops are
those of its matrix products, counted in a step on NumPy arrays. Memory and arithmetic may go on at
once, so the least time is the longer of the two, at the peaks that this machine reaches in a run.
"""

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from math import prod
from typing import Any, Final, NamedTuple

import numpy as np

import rlora
from rlora import Factors, Transform
from rlora.core import dispatch
from rlora.core.backend import Backend

from .cases import BASELINES, ArraySpec, make_method, method_names
from .problem import Shapes

SAME_AS: Final = {"peft": "scaled_adamw:before", "torch.adamw": "adamw", "optax.adamw": "adamw"}
"""Optimizers of others that do the arithmetic of one of ours."""

FROZEN: Final[Mapping[str, tuple[Callable[[int, int, int], int], int]]] = {
    "lora_fa": (lambda m, n, r: 3 * m * r, 2),  # B and its gradient
    "rac_lora": (lambda m, n, r: (3 * m + n) * r, 2),  # B and its gradient; A is read
    "lora_sb": (lambda m, n, r: 3 * n * r, 1),  # A and its gradient; the start of A is read
}
"""Methods that leave a factor alone: how many numbers of a pair and its gradients are moved, and
how often the state is, which may be of another dtype."""


class Cost(NamedTuple):
    """Counts of one step on a whole problem."""

    flops: int
    bytes: int


class _Counter:
    """Namespace that counts the flops of its matrix products and QR decompositions."""

    def __init__(self, xp: Any) -> None:
        self.flops, self.xp, self.linalg = 0, xp, _Linalg(self)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.xp, name)

    def matmul(self, x: Any, y: Any) -> Any:
        product = self.xp.matmul(x, y)
        self.flops += 2 * product.size * x.shape[-1]
        return product


class _Linalg:
    def __init__(self, counter: _Counter) -> None:
        self._counter = counter

    def __getattr__(self, name: str) -> Any:
        return getattr(self._counter.xp.linalg, name)

    def qr(self, x: Any) -> Any:
        rows, columns = x.shape[-2:]  # Householder, and forming Q: 2 N k^2 each
        self._counter.flops += prod(x.shape[:-2]) * 4 * rows * columns**2
        return self._counter.xp.linalg.qr(x)


@contextmanager
def _counting() -> Iterator[_Counter]:
    """Let steps on NumPy arrays be counted."""
    usual = dispatch.get_backend(np.ones(1))
    counter = _Counter(usual.xp)
    dispatch._by_type[np.ndarray] = Backend(counter, "numpy")
    try:
        yield counter
    finally:
        dispatch._by_type[np.ndarray] = usual


def step_flops(method: Transform, params: Factors, grads: Factors) -> int:
    """Count the flops of one step on NumPy arrays."""
    state = method.init(params)
    # Of random numbers, and above full rank, some have no root: nobody looks at them.
    with _counting() as counter, np.errstate(invalid="ignore"):
        rlora.step(method, params, grads, state, 1e-4)
    return counter.flops


def _from_small_layers(
    count: Callable[[str, int, int, int], int], method: str, m: int, n: int, r: int
) -> int:
    """Extrapolate a count to (m, n), as a step on a large layer takes seconds and gigabytes.

    The shapes of every method's arrays are linear in m and in n once both reach 2 r, the columns
    of the widest QR.
    """
    if m > 4 * r:
        low, high = (_from_small_layers(count, method, k * r, n, r) for k in (2, 4))
        return low + (high - low) * (m - 2 * r) // (2 * r)
    if n > 4 * r:
        low, high = (count(method, m, k * r, r) for k in (2, 4))
        return low + (high - low) * (n - 2 * r) // (2 * r)
    return count(method, m, n, r)


@cache
def _small_flops(method: str, m: int, n: int, r: int) -> int:
    rng = np.random.default_rng(0)
    params, grads = (
        Factors(rng.standard_normal((r, n), np.float32), rng.standard_normal((m, r), np.float32))
        for _ in range(2)
    )
    return step_flops(make_method(method), params, grads)


@cache
def _small_state(method: str, m: int, n: int, r: int) -> int:
    pair = Factors(np.zeros((r, n), np.float32), np.zeros((m, r), np.float32))
    state = rlora.flatten_state(make_method(method).init(pair))
    return sum(prod(x.shape) for x in state.values())


def state_numbers(method: str, m: int, n: int, r: int) -> int:
    """Count the numbers that a pair keeps between two steps."""
    return _from_small_layers(_small_state, method, m, n, r)


LONG: Final = 1 << 24
"""Numbers in the arrays that the peak of the memory is measured on: too large for any cache."""

SQUARE: Final = 512
"""Side of the matrices for the peak of arithmetic, whose product leaves the memory idle."""

SECONDS: Final = 0.1
"""Time for each of the two peaks, after a warm-up."""


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
    xp, compiled = spec.backend.xp, spec.backend.compile
    # Where a sum needs a new array, a long one would cost its pages too: what steps make is short.
    in_place = spec.name in ("numpy", "torch", "cupy")
    long = LONG if in_place else LONG // 8
    x, y = (spec.array(np.ones(long, np.float32)) for _ in range(2))
    device = str(getattr(x, "device", "cpu"))
    item = xp.finfo(x.dtype).bits // 8
    if in_place:
        out = xp.empty_like(x)
        moving = _best(spec, lambda: xp.add(x, y, out=out))
    else:
        add = compiled(lambda x, y: x + y)
        moving = _best(spec, lambda: add(x, y))
    X = spec.array(np.full((SQUARE, SQUARE), 1 / SQUARE, np.float32))
    product = compiled(spec.backend.matmul)
    multiplying = _best(spec, lambda: product(X, X))
    return Peaks(spec.name, device, 3 * long * item / moving, 2 * SQUARE**3 / multiplying)


def _best(spec: ArraySpec, f: Callable[[], Any]) -> float:
    spec.backend.synchronize(f())
    best, end = float("inf"), time.perf_counter() + SECONDS
    while best == float("inf") or time.perf_counter() < end:
        start = time.perf_counter()
        spec.backend.synchronize(f())
        best = min(best, time.perf_counter() - start)
    return best


def least_seconds(flops: int, moved: int, peaks: Peaks) -> float:
    """No step can be faster, unless its arrays fit a cache."""
    return max(moved / peaks.bytes_per_s, flops / peaks.flops_per_s)


def step_cost(method: str, shapes: Shapes, item_bytes: int, state_bytes: int) -> Cost | None:
    """The cost of a step; None for an optimizer whose arithmetic is unknown."""
    name = method.partition(":")[0]
    known = SAME_AS.get(name, method)
    if known not in (*BASELINES, *method_names()):
        return None
    moved, of_state = FROZEN.get(name, (lambda m, n, r: 3 * (m + n) * r, 2))
    numbers = sum(k * moved(*shape) for shape, k in shapes.items())
    flops = sum(k * _from_small_layers(_small_flops, known, *shape) for shape, k in shapes.items())
    return Cost(flops, numbers * item_bytes + of_state * state_bytes)

"""Cost of a step: in seconds, and as a multiple of AdamW's on the same parameters."""

import gc
import statistics
import time

from .common import BACKENDS, METHODS, PLAIN, Step, Suite, build, skip, titled, warm

ROUNDS = (9, 60)
SECONDS = 0.4


class TimeStep(Suite):
    """All methods at all ranks, on equal square weights."""

    def prepare(self, backend: str, method: str, rank: int, shape: str) -> None:
        skip_what_compiles_long(backend, rank)
        self.step = warm(build(backend, method, rank, shape))

    @titled("Step")
    def time_step(self, backend: str, method: str, rank: int, shape: str) -> None:
        self.step()


class TimeStepOfLayer(TimeStep):
    """The weights of a real layer, of four shapes, at one rank."""

    params = (BACKENDS, METHODS, (16,), ("SmolLM2-135M layer",))

    @titled("Step on the seven weights of a layer")
    def time_step(self, backend: str, method: str, rank: int, shape: str) -> None:
        self.step()


class OverheadRatio(Suite):
    """The step against AdamW's: what is slow about a machine or a moment cancels out of it.

    AdamW against a copy of itself is among the methods: its deviation from 1 is noise.
    """

    unit = "x"

    def prepare(self, backend: str, method: str, rank: int, shape: str) -> None:
        skip_what_compiles_long(backend, rank)
        self.plain = warm(build(backend, PLAIN, rank, shape))
        self.step = warm(build(backend, method, rank, shape))

    @titled("Step, as a multiple of AdamW's")
    def track_overhead_ratio(self, backend: str, method: str, rank: int, shape: str) -> float:
        return median_ratio(self.step, self.plain)


def skip_what_compiles_long(backend: str, rank: int) -> None:
    """One rank for JAX: at all of them the suite would take twice as long."""
    if backend == "jax" and rank != 16:
        skip("rank 16 stands for all of them")


def median_ratio(step: Step, plain: Step) -> float:
    """Median over interleaved rounds of one's time against the other's in the same round."""
    least, most = ROUNDS
    ratios, end = [], time.perf_counter() + SECONDS
    gc.collect()
    gc.disable()
    try:
        while len(ratios) < least or (len(ratios) < most and time.perf_counter() < end):
            ratios.append(seconds(step) / seconds(plain))
    finally:
        gc.enable()
    return statistics.median(ratios)


def seconds(step: Step) -> float:
    start = time.perf_counter()
    step()
    return time.perf_counter() - start

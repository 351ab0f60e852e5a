"""The race: contenders take turns, one step each, so that a slow moment of the machine hits all."""

import gc
import os
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Final, NamedTuple

import numpy as np

from .contenders import Contender, Entry
from .environment import load_average
from .problem import Problem

MAX_SPREAD: Final = 0.15
"""Above this interquartile range, relative to the median, a row is called unstable."""

MAX_LOAD: Final = 1.5
"""Processes for each processor before the start; a run of one's own leaves one behind."""

FEWEST: Final = 3
"""Samples below which a spread says nothing."""


class Rounds(NamedTuple):
    """How many: at least and at most so many, and no more once so many seconds have gone by."""

    least: int
    most: int
    seconds: float = 0.0


Row = dict[str, Any]
"""One line of the table; `record.SCHEMA` has its keys."""


def timed(contender: Contender) -> float:
    """Seconds of one step, its gradients written before the clock starts."""
    contender.refresh()
    start = time.perf_counter()
    contender.step()
    return time.perf_counter() - start


class Race:
    """All contenders on one problem.

    Parameters
    ----------
    problem : Problem
        What they work on, for the rows.
    entries : sequence of Entry
        Who takes part, the plain methods among them.
    seed : int
        Of the order within each round.
    """

    def __init__(self, problem: Problem, entries: Sequence[Entry], seed: int) -> None:
        self.problem, self.entries = problem, entries
        self._rng = np.random.default_rng(seed)
        self._load = (load_average() or [0.0])[0]
        self._contenders: list[Contender] = []
        self._peaks: dict[str, int | None] = {}
        self._first: dict[str, float] = {}
        self._samples: dict[str, list[float]] = {entry.name: [] for entry in entries}

    def run(self, rounds: Rounds, tick: Callable[[], None]) -> None:
        """Weigh each contender alone, warm all up, then time round after round."""
        for entry in self.entries:
            lone = entry.build()
            lone.refresh()
            self._peaks[entry.name] = lone.peak_temporary_bytes()
            del lone
        self._contenders = [entry.build() for entry in self.entries]
        for contender in self._contenders:
            self._first[contender.name] = timed(contender)
            timed(contender)  # some lay out their memory in the second step
        with _no_garbage_collection():
            end = time.perf_counter() + rounds.seconds
            for done in range(rounds.most):
                if done >= rounds.least and time.perf_counter() > end:
                    break
                # Shuffled, because who comes after whom decides what is left in the caches.
                for i in self._rng.permutation(len(self._contenders)):
                    contender = self._contenders[i]
                    self._samples[contender.name].append(timed(contender))
                tick()

    def rows(self) -> list[Row]:
        """Give what has been measured so far, in the order of the entries."""
        return [self._row(c) for c in self._contenders if self._samples[c.name]]

    def _row(self, contender: Contender) -> Row:
        samples = self._samples[contender.name]
        spread = relative_spread(samples)
        return {
            "method": contender.name,
            "backend": contender.backend,
            "device": contender.device,
            "rank": self.problem.rank,
            "pairs": len(self.problem.pairs),
            "parameters": self.problem.parameters,
            "samples_s": samples,
            "first_call_s": self._first[contender.name],
            "median_s": statistics.median(samples),
            "spread": spread,
            "ratio": median_ratio(samples, self._samples[contender.ratio_to]),
            "ratio_to": contender.ratio_to,
            "state_bytes": contender.state_bytes(),
            "peak_temporary_bytes": self._peaks[contender.name],
            "verdict": verdict(spread, self._load),
        }


def relative_spread(samples: Sequence[float]) -> float | None:
    """Interquartile range over median; None for too few samples."""
    if len(samples) < FEWEST:
        return None
    low, middle, high = np.quantile(samples, (0.25, 0.5, 0.75))
    return float((high - low) / middle)


def median_ratio(samples: Sequence[float], plain: Sequence[float]) -> float | None:
    """Median over the rounds of the time against the plain method's in the same round.

    What slows a whole round down cancels out of it, unlike out of a ratio of two medians. After
    an interrupt the last round may lack one of the two; it is left out.
    """
    ratios = [mine / theirs for mine, theirs in zip(samples, plain, strict=False)]
    return statistics.median(ratios) if ratios else None


def verdict(spread: float | None, load: float) -> str:
    """Whether a row can be believed, and if not, what to do."""
    # Threads that wait for each other lose whole time slices on a busy machine: every sample is
    # then as wrong as the next, and the spread does not show it.
    if load > MAX_LOAD * (os.cpu_count() or 1):
        return f"unstable: load {load:.1f} on {os.cpu_count()} processors; close other programs"
    if spread is None:
        return f"unstable: fewer than {FEWEST} samples; raise --repeat"
    if spread > MAX_SPREAD:
        return (
            f"unstable: spread {spread:.1%} > {MAX_SPREAD:.0%}; "
            f"close other programs or raise --repeat"
        )
    return "ok"


@contextmanager
def _no_garbage_collection() -> Iterator[None]:
    gc.collect()
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()

"""Interleaved timing: cases take turns, one step each, so that a slow moment hits them all."""

import gc
import math
import os
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Final, NamedTuple

import numpy as np

from rlora.cli.environment import load_average

from .cases import Case, Key, Stepper
from .problem import Problem
from .schema import Row
from .stats import FEWEST, median_interval, median_ratio, outliers, relative_spread, round_ratios

MAX_SPREAD: Final = 0.15
"""Above this interquartile range, relative to the median, a row is called unstable."""

MAX_LOAD: Final = 1.5
"""Processes for each processor before the start; a run of one's own leaves one behind."""


class Rounds(NamedTuple):
    """Number of samples of each case.

    With `seconds`, all together: until the interval of the median ratio is within `precision`,
    from `least` samples on, or the case's equal share of the time is spent; at most `most`.
    Without, `most` of each, however long that takes.
    """

    least: int
    most: int
    seconds: float | None = None
    precision: float = 0.05


def timed(stepper: Stepper) -> float:
    """Seconds of one step, its gradients written before the clock starts."""
    stepper.refresh()
    start = time.perf_counter()
    stepper.step()
    return time.perf_counter() - start


@dataclass
class TimedCase:
    """A case in the timing, and what is known of it so far."""

    case: Case
    stepper: Stepper
    build_s: float
    compile_s: float | None
    first_call_s: float = 0.0
    peak: int | None = None
    operations: int | None = None
    samples: list[float] = field(default_factory=list)

    @classmethod
    def open(cls, case: Case, patience: float) -> "TimedCase":
        """Build a case, compile it, take its first step, each by its own clock; weigh it.

        One whose first step outlasts the patience is not weighed, as that takes more steps.
        """
        start = time.perf_counter()
        stepper = case.build()
        one = cls(case, stepper, time.perf_counter() - start, stepper.compile())
        one.first_call_s = timed(stepper)
        if one.first_call_s > patience:
            return one
        stepper.refresh()
        one.operations = stepper.operations()
        stepper.refresh()
        one.peak = stepper.peak_temporary_bytes()
        return one


class Timing:
    """All cases on one problem.

    Parameters
    ----------
    problem : Problem
        What they work on, for the rows.
    cases : sequence of Case
        Who takes part, the baselines among them.
    seed : int
        Of the order within each round.
    """

    def __init__(self, problem: Problem, cases: Sequence[Case], seed: int) -> None:
        self.problem, self.cases = problem, cases
        self._rng = np.random.default_rng(seed)
        self._load = (load_average() or [0.0])[0]
        self._timed: dict[Key, TimedCase] = {}

    def run(self, rounds: Rounds, tick: Callable[[], None]) -> None:
        """Make each case ready, then time round after round."""
        patience = math.inf if rounds.seconds is None else rounds.seconds / 2
        for case in self.cases:
            self._timed[case.key] = TimedCase.open(case, patience)
        with _no_garbage_collection():
            while timed_cases := self._next(rounds):
                # Shuffled, because who comes after whom decides what is left in the caches.
                for i in self._rng.permutation(len(timed_cases)):
                    timed_cases[i].samples.append(timed(timed_cases[i].stepper))
                tick()

    def _next(self, rounds: Rounds) -> list[TimedCase]:
        """List who is in the next round: those that want more samples, and their baselines."""
        share = None if rounds.seconds is None else rounds.seconds / len(self._timed)
        eager = [one for one in self._timed.values() if self._wants(one, rounds, share)]
        keys = {key for one in eager for key in (one.case.key, one.case.ratio_to)}
        return [one for key, one in self._timed.items() if key in keys]

    def _wants(self, one: TimedCase, rounds: Rounds, share: float | None) -> bool:
        done = len(one.samples)
        if not done or done >= rounds.most or share is None:
            return done < rounds.most
        if done >= rounds.least and self._precise(one, rounds.precision):
            return False
        last, spent = one.samples[-1], sum(one.samples)
        return spent + last <= share or (done < FEWEST and last <= share)

    def _precise(self, one: TimedCase, precision: float) -> bool:
        interval = median_interval(self._ratios(one))
        return interval is not None and interval[1] - interval[0] <= precision * sum(interval)

    def _ratios(self, one: TimedCase) -> list[float]:
        return round_ratios(one.samples, self._timed[one.case.ratio_to].samples)

    def rows(self) -> list[Row]:
        """Give what has been measured so far, in the order of the cases."""
        return [self._row(one) for one in self._timed.values() if one.samples]

    def _row(self, one: TimedCase) -> Row:
        samples, case = one.samples, one.case
        spread, interval = relative_spread(samples), median_interval(self._ratios(one))
        return {
            "method": case.name,
            "backend": case.backend,
            "device": one.stepper.device,
            "rank": self.problem.rank,
            "pairs": len(self.problem.pairs),
            "parameters": self.problem.parameters,
            "samples_s": samples,
            "build_s": one.build_s,
            "compile_s": one.compile_s,
            "first_call_s": one.first_call_s,
            "median_s": statistics.median(samples),
            "spread": spread,
            "outliers": outliers(samples),
            "ratio": median_ratio(samples, self._timed[case.ratio_to].samples),
            "ratio_interval": interval and list(interval),
            "ratio_to": case.ratio_to[1],
            "ratio_to_backend": case.ratio_to[0],
            "state_bytes": one.stepper.state_bytes(),
            "peak_temporary_bytes": one.peak,
            "operations": one.operations,
            "verdict": verdict(spread, self._load),
        }


def verdict(spread: float | None, load: float) -> str:
    """Return whether a row can be believed, and if not, what to do."""
    # Threads that wait for each other lose whole time slices on a busy machine: every sample is
    # then as wrong as the next, and the spread does not show it.
    if load > MAX_LOAD * (os.cpu_count() or 1):
        return (
            f"unstable: load {load:.1f} on {os.cpu_count()} processors; "
            f"close other programs or use --threads 1"
        )
    if spread is None:
        return (
            f"unstable: fewer than {FEWEST} samples in its share of the time; "
            f"raise --seconds or --repeat"
        )
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

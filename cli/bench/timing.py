"""Interleaved timing: cases take turns, one step each, so that a slow moment hits them all."""

import gc
import math
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Final, NamedTuple

import numpy as np
from threadpoolctl import threadpool_limits

from rlora.cli.environment import load_average

from .cases import Case, Key
from .problem import BenchProblem
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


def timed(case: Case) -> float:
    """Seconds of one step, its gradients written before the clock starts."""
    case.refresh()
    start = time.perf_counter()
    case.step()
    return time.perf_counter() - start


class Timing:
    """All cases on one problem.

    Parameters
    ----------
    problem : BenchProblem
        What they work on, for the rows.
    cases : iterable of Case
        Who takes part, the baselines among them; to go on to the next is to build it.
    seed : int
        Of the order within each round.
    threads : int, optional
        Number that the libraries are pinned to, for the advice.
    """

    def __init__(
        self, problem: BenchProblem, cases: Iterable[Case], seed: int, threads: int | None = None
    ) -> None:
        self.problem, self._unbuilt, self._threads = problem, cases, threads
        self._cases: dict[Key, Case] = {}
        self._rng = np.random.default_rng(seed)
        self._load = (load_average() or [0.0])[0]

    def run(self, rounds: Rounds, tick: Callable[[], None]) -> None:
        """Make each case ready, then time round after round."""
        patience = math.inf if rounds.seconds is None else rounds.seconds / 2
        start = time.perf_counter()
        for case in self._unbuilt:
            case.build_s = time.perf_counter() - start - (case.compile_s or 0.0)
            _prepare(case, patience)
            self._cases[case.key] = case
            start = time.perf_counter()
        gc.collect()
        enabled = gc.isenabled()
        gc.disable()
        try:
            while cases := self._next(rounds):
                # Shuffled, because who comes after whom decides what is left in the caches.
                for i in self._rng.permutation(len(cases)):
                    cases[i].samples.append(timed(cases[i]))
                tick()
        finally:
            if enabled:
                gc.enable()

    def _next(self, rounds: Rounds) -> list[Case]:
        """List who is in the next round: those that want more samples, and their baselines."""
        share = None if rounds.seconds is None else rounds.seconds / len(self._cases)
        eager = [case for case in self._cases.values() if self._wants(case, rounds, share)]
        keys = {key for case in eager for key in (case.key, case.ratio_to)}
        return [case for key, case in self._cases.items() if key in keys]

    def _wants(self, case: Case, rounds: Rounds, share: float | None) -> bool:
        done = len(case.samples)
        if not done or done >= rounds.most or share is None:
            return done < rounds.most
        if done >= rounds.least and self._precise(case, rounds.precision):
            return False
        last, spent = case.samples[-1], sum(case.samples)
        return spent + last <= share or (done < FEWEST and last <= share)

    def _precise(self, case: Case, precision: float) -> bool:
        interval = median_interval(self._ratios(case))
        return interval is not None and interval[1] - interval[0] <= precision * sum(interval)

    def _ratios(self, case: Case) -> list[float]:
        return round_ratios(case.samples, self._cases[case.ratio_to].samples)

    def rows(self) -> list[Row]:
        """Give what has been measured so far, in the order of the cases."""
        return [self._row(case) for case in self._cases.values() if case.samples]

    def _row(self, case: Case) -> Row:
        spread, interval = relative_spread(case.samples), median_interval(self._ratios(case))
        return {
            "method": case.key[1],
            "backend": case.key[0],
            "device": case.device,
            "rank": self.problem.rank,
            "pairs": len(self.problem.pairs),
            "parameters": self.problem.parameters,
            "samples_s": case.samples,
            "build_s": case.build_s,
            "compile_s": case.compile_s,
            "first_call_s": case.first_call_s,
            "median_s": statistics.median(case.samples),
            "spread": spread,
            "outliers": outliers(case.samples),
            "ratio": median_ratio(case.samples, self._cases[case.ratio_to].samples),
            "ratio_interval": interval and list(interval),
            "ratio_to": case.ratio_to[1],
            "ratio_to_backend": case.ratio_to[0],
            "state_bytes": case.state_bytes(),
            "peak_temporary_bytes": case.peak,
            "operations": case.operations,
            "verdict": verdict(spread, self._load, self._threads),
        }


def _prepare(case: Case, patience: float) -> None:
    """Take the first step of a case, and weigh it unless that outlasts the patience."""
    case.first_call_s = timed(case)
    if case.first_call_s <= patience:
        case.refresh()
        case.operations = case.count_operations()
        case.refresh()
        case.peak = case.peak_temporary_bytes()


def verdict(spread: float | None, load: float, threads: int | None = None) -> str:
    """Return whether a row can be believed, and if not, what to do that is not done yet."""
    # Threads that wait for each other lose whole time slices on a busy machine: every sample is
    # then as wrong as the next, and the spread does not show it.
    if load > MAX_LOAD * (os.cpu_count() or 1):
        fewer = "" if threads == 1 else " or use --threads 1"
        return (
            f"unstable: load {load:.1f} on {os.cpu_count()} processors; close other programs{fewer}"
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
def reserved(threads: int | None) -> Iterator[None]:
    """Tell libraries that are yet to be loaded; XLA makes its pool once, and asks NPROC."""
    before = os.environ.get("NPROC")
    if threads is not None:
        os.environ["NPROC"] = str(threads)
    try:
        yield
    finally:
        if before is not None:
            os.environ["NPROC"] = before
        elif threads is not None:
            del os.environ["NPROC"]


@contextmanager
def pinned(threads: int | None) -> Iterator[None]:
    """Pin the threads of the BLAS and OpenMP libraries that are loaded, and torch's."""
    if threads is None:
        yield
        return
    torch = sys.modules.get("torch")
    before = torch.get_num_threads() if torch else threads
    with threadpool_limits(limits=threads):
        if torch:
            torch.set_num_threads(threads)
        try:
            yield
        finally:
            if torch:
                torch.set_num_threads(before)

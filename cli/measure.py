"""The race: contenders take turns, one step each, so that a slow moment of the machine hits all."""

import gc
import math
import os
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Final, NamedTuple

import numpy as np

from .contenders import Contender, Entry, Key
from .environment import load_average
from .problem import Problem
from .stats import FEWEST, median_interval, median_ratio, outliers, relative_spread, round_ratios

MAX_SPREAD: Final = 0.15
"""Above this interquartile range, relative to the median, a row is called unstable."""

MAX_LOAD: Final = 1.5
"""Processes for each processor before the start; a run of one's own leaves one behind."""


class Rounds(NamedTuple):
    """Number of samples of each contender.

    With `seconds`, all together: until the interval of the median ratio is within `precision`,
    from `least` samples on, or the contender's equal share of the time is spent; at most `most`.
    Without, `most` of each, however long that takes.
    """

    least: int
    most: int
    seconds: float | None = None
    precision: float = 0.05


Row = dict[str, Any]
"""One line of the table; `schema.SCHEMA` has its keys."""


def timed(contender: Contender) -> float:
    """Seconds of one step, its gradients written before the clock starts."""
    contender.refresh()
    start = time.perf_counter()
    contender.step()
    return time.perf_counter() - start


@dataclass
class Lane:
    """A contender in the race, and what is known of it so far."""

    entry: Entry
    contender: Contender
    build_s: float
    compile_s: float | None
    first_call_s: float = 0.0
    peak: int | None = None
    operations: int | None = None
    samples: list[float] = field(default_factory=list)

    @classmethod
    def open(cls, entry: Entry, patience: float) -> "Lane":
        """Build a contender, compile it, take its first step, each by its own clock; weigh it.

        One whose first step outlasts the patience is not weighed, as that takes more steps.
        """
        start = time.perf_counter()
        contender = entry.build()
        lane = cls(entry, contender, time.perf_counter() - start, contender.compile())
        lane.first_call_s = timed(contender)
        if lane.first_call_s > patience:
            return lane
        contender.refresh()
        lane.operations = contender.operations()
        contender.refresh()
        lane.peak = contender.peak_temporary_bytes()
        return lane


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
        self._lanes: dict[Key, Lane] = {}

    def run(self, rounds: Rounds, tick: Callable[[], None]) -> None:
        """Make each contender ready, then time round after round."""
        patience = math.inf if rounds.seconds is None else rounds.seconds / 2
        for entry in self.entries:
            self._lanes[entry.key] = Lane.open(entry, patience)
        with _no_garbage_collection():
            while lanes := self._next(rounds):
                # Shuffled, because who comes after whom decides what is left in the caches.
                for i in self._rng.permutation(len(lanes)):
                    lanes[i].samples.append(timed(lanes[i].contender))
                tick()

    def _next(self, rounds: Rounds) -> list[Lane]:
        """List who is in the next round: those that want more samples, and their plain methods."""
        share = None if rounds.seconds is None else rounds.seconds / len(self._lanes)
        eager = [lane for lane in self._lanes.values() if self._wants(lane, rounds, share)]
        keys = {key for lane in eager for key in (lane.entry.key, lane.entry.ratio_to)}
        return [lane for key, lane in self._lanes.items() if key in keys]

    def _wants(self, lane: Lane, rounds: Rounds, share: float | None) -> bool:
        done = len(lane.samples)
        if not done or done >= rounds.most or share is None:
            return done < rounds.most
        if done >= rounds.least and self._precise(lane, rounds.precision):
            return False
        last, spent = lane.samples[-1], sum(lane.samples)
        return spent + last <= share or (done < FEWEST and last <= share)

    def _precise(self, lane: Lane, precision: float) -> bool:
        interval = median_interval(self._ratios(lane))
        return interval is not None and interval[1] - interval[0] <= precision * sum(interval)

    def _ratios(self, lane: Lane) -> list[float]:
        return round_ratios(lane.samples, self._lanes[lane.entry.ratio_to].samples)

    def rows(self) -> list[Row]:
        """Give what has been measured so far, in the order of the entries."""
        return [self._row(lane) for lane in self._lanes.values() if lane.samples]

    def _row(self, lane: Lane) -> Row:
        samples, entry = lane.samples, lane.entry
        spread, interval = relative_spread(samples), median_interval(self._ratios(lane))
        return {
            "method": entry.name,
            "backend": entry.backend,
            "device": lane.contender.device,
            "rank": self.problem.rank,
            "pairs": len(self.problem.pairs),
            "parameters": self.problem.parameters,
            "samples_s": samples,
            "build_s": lane.build_s,
            "compile_s": lane.compile_s,
            "first_call_s": lane.first_call_s,
            "median_s": statistics.median(samples),
            "spread": spread,
            "outliers": outliers(samples),
            "ratio": median_ratio(samples, self._lanes[entry.ratio_to].samples),
            "ratio_interval": interval and list(interval),
            "ratio_to": entry.ratio_to[1],
            "ratio_to_backend": entry.ratio_to[0],
            "state_bytes": lane.contender.state_bytes(),
            "peak_temporary_bytes": lane.peak,
            "operations": lane.operations,
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

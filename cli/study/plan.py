"""Runs still to do: a sweep of learning rates, then the chosen ones on other seeds."""

import json
import math
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from statistics import mean
from typing import Any, Final, NamedTuple

from .train import Job

WIDENINGS: Final = 4
"""Number of times a sweep may grow at an end because the best rate lies there."""

Record = dict[str, Any]


class Entry(NamedTuple):
    """A method's part in a study: all jobs of it differ from `like` in lr, seed and `tested`."""

    like: Job
    rates: tuple[float, ...]
    sweep_seeds: tuple[int, ...]
    seeds: tuple[int, ...]
    """Seeds of the runs that are reported: none of them had a part in the choice of the rate."""


class Records:
    """Finished runs in a file, one JSON object a line; what is in it is not run again."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.rows: dict[Job, Record] = {}
        lines = path.read_text().splitlines() if path.exists() else []
        for number, line in enumerate(lines, 1):
            self._read(line, number)

    def _read(self, line: str, number: int) -> None:
        try:
            row: Record = json.loads(line)
            final(row)  # what a table or a sweep will ask for
            self.rows[job_of(row)] = row
        except (ValueError, KeyError, TypeError, IndexError):
            msg = f"{self.path.name}, line {number}: not a run of the study; delete the line"
            raise ValueError(msg) from None

    def check_origin(self, like: Job, origin: Record) -> None:
        """ValueError where runs of such a study are of other weights or data, or were quick."""
        for job, row in self.rows.items():
            alike = job._replace(method=like.method, lr=like.lr, seed=like.seed, tested=False)
            for key, ours in origin.items():
                theirs = row.get(key, ours)  # the first records do not say
                if alike == like and theirs != ours:
                    had, has = (_option(key, x) for x in (theirs, ours))
                    msg = (
                        f"{self.path.name} has runs with {had}, and this study has {has}; give it "
                        f"another --output"
                    )
                    raise ValueError(msg)

    def add(self, row: Record) -> None:
        """Write a run down at once: an interrupted study goes on after it."""
        self.rows[job_of(row)] = row
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a") as file:
            file.write(json.dumps(row) + "\n")


def _option(name: str, value: str | bool | None) -> str:
    """An option as it is given."""
    if not value:
        return f"no --{name}"
    return f"--{name}" if value is True else f"--{name} {value}"


def job_of(row: Record) -> Job:
    """Return the job that a record is of."""
    return Job(*(row[name] for name in Job._fields))


def final(row: Record) -> float:
    """The validation loss at the end; inf if the run diverged."""
    return math.inf if row["diverged"] else float(row["validation"][-1][1])


def sweep_losses(records: Records, entry: Entry) -> dict[float, float]:
    """Learning rate -> mean validation loss over the seeds of the sweep, in rising order.

    A rate of which a seed is still to be run is left out.
    """
    found: dict[float, dict[int, float]] = {}
    for job, row in records.rows.items():
        if not job.tested and job == entry.like._replace(lr=job.lr, seed=job.seed):
            found.setdefault(job.lr, {})[job.seed] = final(row)
    seeds = set(entry.sweep_seeds)
    done = sorted(lr for lr, losses in found.items() if losses.keys() >= seeds)
    return {lr: mean(found[lr][seed] for seed in entry.sweep_seeds) for lr in done}


def chosen_rate(records: Records, entry: Entry) -> float | None:
    """The learning rate with the lowest validation loss; None while there is none."""
    found = {lr: x for lr, x in sweep_losses(records, entry).items() if math.isfinite(x)}
    return min(found, key=lambda lr: found[lr], default=None)


def sweep(records: Records, entry: Entry) -> list[Job]:
    """The runs of the sweep, one rate wider for every time that the best lay at an end."""
    found, rates = sweep_losses(records, entry), entry.rates
    for _ in range(WIDENINGS if len(rates) > 1 else 0):
        if not found.keys() >= set(rates):
            break
        best = min(rates, key=lambda lr: found[lr])
        if best == rates[0]:
            rates = (rates[0] * (rates[0] / rates[1]), *rates)
        elif best == rates[-1]:
            rates = (*rates, rates[-1] * (rates[-1] / rates[-2]))
        else:
            break
    return [entry.like._replace(lr=lr, seed=seed) for lr in rates for seed in entry.sweep_seeds]


def confirmations(records: Records, entry: Entry) -> list[Job]:
    """The runs that are reported: the chosen rate on the other seeds."""
    lr = chosen_rate(records, entry)
    if lr is None:
        return []
    return [entry.like._replace(lr=lr, seed=seed, tested=True) for seed in entry.seeds]


def rounds(records: Mapping[str, Records], entries: Iterable[Entry]) -> Iterator[list[Job]]:
    """Yield the runs to do next, until none is: sweeps as long as they grow, then confirmations.

    The records of each dataset are those of a file.
    """
    pairs = [(records[entry.like.dataset], entry) for entry in entries]
    for wanted in (sweep, confirmations):
        while jobs := [
            job for mine, entry in pairs for job in wanted(mine, entry) if job not in mine.rows
        ]:
            yield jobs

"""Sweeps of learning rates in the records of strings, each of a method in a setting."""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from statistics import mean
from typing import Final, NamedTuple

from .plan import Record, final
from .stacked_methods import BY_BETAS, METHODS
from .strings import DATASETS, DIGITS

GUESSING: Final = math.log(DIGITS)
"""Loss of an answer drawn at random; what is worse, or diverged, counts as this."""


class Setting(NamedTuple):
    """Settings of a sweep, apart from the method."""

    dataset: str
    rank: int
    steps: int

    def __str__(self) -> str:
        return f"{self.dataset}, rank {self.rank}, {self.steps} steps"


class Sweep(NamedTuple):
    """Mean validation loss, and share of exact answers, by learning rate in rising order."""

    losses: dict[float, float]
    exact: dict[float, float]

    @property
    def best(self) -> float:
        """The learning rate with the lowest loss."""
        return min(self.losses, key=lambda lr: self.losses[lr])

    @property
    def lowest(self) -> float:
        """That loss."""
        return self.losses[self.best]


Sweeps = dict[Setting, dict[str, Sweep]]


def common_rates(sweeps: Iterable[Sweep]) -> list[float]:
    """The learning rates that all of some sweeps have, in rising order."""
    return sorted(set.intersection(*(set(sweep.losses) for sweep in sweeps)))


def compared(sweeps: Sweeps) -> dict[Setting, str]:
    """The settings that have a baseline, each with its name."""
    found = {setting: baseline(group) for setting, group in sweeps.items()}
    return {setting: name for setting, name in found.items() if name is not None}


def baseline(group: Mapping[str, Sweep]) -> str | None:
    """Return AdamW with its best betas in a setting; None if it, or anything else, was not run."""
    names = [name for name in BY_BETAS[0] if name in group]
    if len(names) in (0, len(group)):
        return None
    return min(names, key=lambda name: group[name].lowest)


def sweeps_of(rows: Iterable[Record]) -> Sweeps:
    """The sweeps in records; methods in the order of `METHODS`."""
    found: dict[Setting, dict[str, list[Record]]] = {}
    for row in rows:
        if not row["tested"]:
            found.setdefault(setting_of(row), {}).setdefault(row["method"], []).append(row)
    return {
        setting: {
            name: sweep_of(found[setting][name]) for name in METHODS if name in found[setting]
        }
        for setting in sorted_settings(found)
    }


def setting_of(row: Record) -> Setting:
    """The setting of a run."""
    return Setting(row["dataset"], row["rank"], row["steps"])


def sorted_settings(settings: Iterable[Setting]) -> list[Setting]:
    """Short runs and low ranks first."""
    order = list(DATASETS)
    return sorted(settings, key=lambda x: (x.steps, x.rank, order.index(x.dataset)))


def sweep_of(rows: Sequence[Record]) -> Sweep:
    """Means over the seeds."""
    rates = sorted({row["lr"] for row in rows})

    def means(value: Callable[[Record], float]) -> dict[float, float]:
        return {lr: mean(value(row) for row in rows if row["lr"] == lr) for lr in rates}

    return Sweep(means(lambda row: min(final(row), GUESSING)), means(lambda row: row["exact"]))

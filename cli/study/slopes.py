"""Powers by which best learning rates go with rank, s, width, batch and length of a run."""

import math
from collections.abc import Callable, Mapping
from statistics import mean, stdev
from typing import Any, Final

from .csv_tables import Row
from .stacked_methods import METHODS
from .stacks import BASES
from .strings import DATASETS
from .sweeps import Setting, Sweeps

AXES: Final[Mapping[str, Callable[[Setting], float]]] = {
    "rank": lambda x: x.rank,
    "s": lambda x: DATASETS[x.dataset].scaling,
    "width": lambda x: BASES[DATASETS[x.dataset].base].width,
    "batch": lambda x: DATASETS[x.dataset].batch,
    "steps": lambda x: x.steps,
}
"""Quantities that settings differ in."""


def slopes(sweeps: Sweeps) -> list[Row]:
    """Power p in lr ~ x^p of best rates, between settings that differ in one quantity alone.

    Each from the lowest and the highest x that were run; s = alpha / r is held when r varies.
    Mean over settings, and its standard error.
    """
    return [
        {
            "method": name,
            "quantity": axis,
            "power": f"{mean(found):+.2f}",
            "standard error": f"{stdev(found) / len(found) ** 0.5:.2f}" if len(found) > 1 else "",
            "settings": len(found),
        }
        for axis in AXES
        for name, found in powers(sweeps, axis).items()
    ]


def powers(sweeps: Sweeps, axis: str) -> dict[str, list[float]]:
    """Method -> p of each family of settings that differ in one quantity."""
    families: dict[Any, list[Setting]] = {}
    for setting in sweeps:
        families.setdefault(without(setting, axis), []).append(setting)
    found: dict[str, list[float]] = {}
    value = AXES[axis]
    for family in families.values():
        for name in METHODS:
            optima = {
                value(x): best
                for x in family
                if name in sweeps[x] and (best := optimum(sweeps[x][name].losses)) is not None
            }
            low, high = min(optima, default=0), max(optima, default=0)
            if low < high:
                power = math.log(optima[high] / optima[low]) / math.log(high / low)
                found.setdefault(name, []).append(power)
    return found


def without(setting: Setting, axis: str) -> Any:
    """The settings that differ in a quantity alone, by all that they have in common."""
    dataset, base = DATASETS[setting.dataset], BASES[DATASETS[setting.dataset].base]
    cleared = {
        "s": dataset._replace(scaling=0.0),
        "batch": dataset._replace(batch=0),
        "width": dataset._replace(base=f"{base.blocks} blocks of {base.heads} heads"),
    }
    rank, steps = setting.rank, setting.steps
    return (
        cleared.get(axis, dataset),
        0 if axis == "rank" else rank,
        0 if axis == "steps" else steps,
    )


def optimum(losses: Mapping[float, float]) -> float | None:
    """The vertex of a parabola in log(lr) through the log losses at and beside the best rate.

    None where the best rate is the first or the last.
    """
    rates = list(losses)
    i = min(range(len(rates)), key=lambda k: losses[rates[k]])
    if not 0 < i < len(rates) - 1:
        return None
    x = [math.log(rates[k]) for k in (i - 1, i, i + 1)]
    y = [math.log(losses[rates[k]]) for k in (i - 1, i, i + 1)]
    left, right = (y[1] - y[0]) / (x[1] - x[0]), (y[2] - y[1]) / (x[2] - x[1])
    if left == right:
        return rates[i]
    bend = (right - left) / (x[2] - x[0])
    return math.exp((x[0] + x[1]) / 2 - left / (2 * bend))

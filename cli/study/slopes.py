"""Powers by which best learning rates go with rank, s, width, batch and length of a run."""

from typing import Final

import numpy as np
import pandas as pd

from .frames import Frame, text
from .stacks import BASES
from .strings import DATASETS
from .sweeps import SWEEP

AXES: Final = ("rank", "s", "width", "batch", "steps")
"""Quantities that settings differ in."""


def slopes(sweeps: Frame) -> Frame:
    """Power p in lr ~ x^p of best rates, between settings that differ in one quantity alone.

    Each from the lowest and the highest x that were run; s = alpha / r is held when r varies.
    Mean over settings, and its standard error.
    """
    optima = sweeps.groupby(SWEEP, observed=True)[["lr", "loss"]].apply(optimum).rename("optimum")
    optima = optima.dropna().reset_index().merge(facts(), on="dataset").drop(columns="dataset")
    tables = []
    for axis in AXES:
        alike = list(optima.columns.difference([axis, "optimum"]))
        families = optima.sort_values(axis).groupby(alike, observed=True)
        ends = families[[axis, "optimum"]].agg(["first", "last"])
        ends = ends[ends[axis, "first"] < ends[axis, "last"]]
        ratios = np.log(ends.xs("last", axis=1, level=1) / ends.xs("first", axis=1, level=1))
        powers = (ratios["optimum"] / ratios[axis]).groupby("method", observed=True)
        cells = {
            "quantity": axis,
            "power": text(powers.mean(), "+.2f"),
            "standard error": text(powers.sem(), ".2f"),
            "settings": powers.size(),
        }
        tables.append(pd.DataFrame(cells).reset_index())
    return pd.concat(tables)


def facts() -> Frame:
    """All in which datasets differ, apart from rank and steps."""
    rows = []
    for name, x in DATASETS.items():
        base = BASES[x.base]
        shape = {"width": base.width, "base": (base.blocks, base.heads)}
        rows.append({**x._asdict(), "dataset": name, "dtype": str(x.dtype), **shape})
    return pd.DataFrame(rows).rename(columns={"scaling": "s"})


def optimum(sweep: Frame) -> float:
    """The vertex of a parabola in log(lr) through the log losses at and beside the best rate.

    NaN where the best rate is the first or the last.
    """
    i = int(np.argmin(sweep["loss"]))
    if not 0 < i < len(sweep) - 1:
        return np.nan
    x, y = (np.log(sweep[name].to_numpy()[i - 1 : i + 2]) for name in ("lr", "loss"))
    left, right = np.diff(y) / np.diff(x)
    if left == right:
        return float(np.exp(x[1]))
    bend = (right - left) / (x[2] - x[0])
    return float(np.exp((x[0] + x[1]) / 2 - left / (2 * bend)))

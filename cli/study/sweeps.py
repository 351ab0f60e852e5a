"""Sweeps of learning rates in the records of strings, as tables of pandas.

A row is a learning rate of a method in a setting: a dataset, a rank and a number of steps.
"""

import math
from collections.abc import Iterable
from typing import Final

import pandas as pd

from .frames import Frame
from .plan import Record, final
from .stacked_methods import BY_BETAS, METHODS
from .strings import DATASETS, DIGITS

GUESSING: Final = math.log(DIGITS)
"""Loss of an answer drawn at random; what is worse, or diverged, counts as this."""

SETTING: Final = ["dataset", "rank", "steps"]
SWEEP: Final = [*SETTING, "method"]
ORDER: Final = ["steps", "rank", "dataset", "method", "lr"]
"""Short runs and low ranks first."""


def runs_of(rows: Iterable[Record]) -> Frame:
    """Runs of the methods that are known, with their losses and shares of exact answers."""
    names = (*SWEEP, "lr", "seed", "tested")
    runs = pd.DataFrame(
        {**{name: row[name] for name in names}, **scores(row)}
        for row in rows
        if row["method"] in METHODS and row["dataset"] in DATASETS
    )
    for name, known in (("dataset", DATASETS), ("method", METHODS)):
        runs[name] = pd.Categorical(runs[name], list(known))
    return runs


def scores(row: Record) -> dict[str, float]:
    """Scores of a run on validation, or on the test part if it read that."""
    found = row.get("test", {"loss": GUESSING, "exact": 0.0})
    if not row["tested"]:
        found = {"loss": final(row), "exact": row["exact"]}
    return {"loss": min(float(found["loss"]), GUESSING), "exact": float(found["exact"])}


def sweeps_of(runs: Frame) -> Frame:
    """Means over seeds; beside them the best rate of the sweep, and the best of the baseline."""
    means = runs[~runs["tested"]].groupby(ORDER, observed=True)[["loss", "exact"]].mean()
    sweeps = means.reset_index()
    best = sweeps.loc[sweeps.groupby(SWEEP, observed=True)["loss"].idxmin()]
    best = best.rename(columns={"lr": "best"})
    sweeps = sweeps.merge(best[[*SWEEP, "best"]], on=SWEEP)
    base = baselines(best)[[*SETTING, "loss", "exact"]]
    return sweeps.merge(base, on=SETTING, how="left", suffixes=("", ", baseline"))


def best_of(sweeps: Frame) -> Frame:
    """The row of the best rate of each sweep."""
    return sweeps[sweeps["lr"] == sweeps["best"]]


def baselines(best: Frame) -> Frame:
    """The row of AdamW with its best betas in each setting, if anything else was run there too."""
    adamw = best["method"].isin(BY_BETAS[0])
    found = best[adamw].sort_values("loss").drop_duplicates(SETTING)
    return found.merge(best[~adamw][SETTING].drop_duplicates())


def compared(sweeps: Frame) -> Frame:
    """Rows of settings that have a baseline, with their regret against it."""
    found = sweeps.dropna(subset="loss, baseline")
    return found.assign(regret=found["loss"] - found["loss, baseline"])

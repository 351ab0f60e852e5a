"""Tables of the study of strings: seed by seed, away from the best rate, and by betas."""

from typing import Any, Final

import pandas as pd

from .frames import Frame, text
from .stacked_methods import BY_BETAS
from .sweeps import SETTING, SWEEP, baselines, best_of, compared

QUANTILES: Final = (12.71, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)
"""Quantiles of Student's t, 97.5 %, for 1, 2, ... degrees of freedom."""


def paired(sweeps: Frame, runs: Frame) -> Frame:
    """Test runs at best rates, beside those of the baseline on the same seeds."""
    best = best_of(sweeps)
    tested = runs[runs["tested"]].merge(best[[*SWEEP, "lr"]])
    base = baselines(best.merge(tested[SWEEP].drop_duplicates()))
    theirs = tested.merge(base[SWEEP])[[*SWEEP, "seed", "loss", "exact"]]
    keys = [*SETTING, "seed"]
    found = best[SWEEP].merge(tested).merge(theirs, on=keys, suffixes=("", ", baseline"))
    return found.assign(
        difference=found["loss"] - found["loss, baseline"],
        difference_exact=found["exact"] - found["exact, baseline"],
    )


def intervals(differences: Any) -> Frame:
    """Means of groups of differences, and 95 % intervals; NaN for those of a single seed.

    ValueError for more seeds than `QUANTILES` is for.
    """
    counts = differences.size()
    if (counts > len(QUANTILES) + 1).any():
        msg = (
            f"intervals are for at most {len(QUANTILES) + 1} seeds, got {counts.max()} tested "
            "ones: take the records of some out"
        )
        raise ValueError(msg)
    half = counts.map(lambda n: QUANTILES[max(n - 2, 0)]) * differences.sem()
    mean = differences.mean()
    return pd.DataFrame({"mean": mean, "low": mean - half, "high": mean + half})


def test_losses(sweeps: Frame, runs: Frame) -> Frame:
    """Test losses of each setting, less those of the baseline on the same seeds."""
    found = paired(sweeps, runs)
    own = found["method"] == found["method, baseline"]
    found.loc[own, "difference"] = float("nan")
    groups = found.groupby(SWEEP, observed=True, sort=False)
    bounds = intervals(groups["difference"])
    cells = {
        "learning rate": text(groups["lr"].first(), "g"),
        "test loss [nats/digit]": text(groups["loss"].mean(), ".4f"),
        "difference [nats/digit]": text(bounds["mean"], "+.4f"),
        "from [nats/digit]": text(bounds["low"], "+.4f"),
        "to [nats/digit]": text(bounds["high"], "+.4f"),
        "exact [%]": text(100 * groups["exact"].mean(), ".1f"),
        "seeds": groups.size(),
    }
    return pd.DataFrame(cells).reset_index()


def test_wins(sweeps: Frame, runs: Frame) -> Frame:
    """Numbers of settings in which a method is better, or worse, than the baseline on test."""
    found = paired(sweeps, runs)
    groups = found[found["method"] != found["method, baseline"]].groupby(SWEEP, observed=True)
    bounds = intervals(groups["difference"]).assign(exact=groups["difference_exact"].mean())
    bounds = bounds[groups.size() > 1]
    bounds = bounds.assign(better=bounds["high"] < 0, worse=bounds["low"] > 0)
    methods = bounds.groupby("method", observed=True)
    cells = {
        "settings": methods.size(),
        "better": methods["better"].sum(),
        "worse": methods["worse"].sum(),
        "mean difference [nats/digit]": text(methods["mean"].mean(), "+.3f"),
        "median difference [nats/digit]": text(methods["mean"].median(), "+.3f"),
        "mean difference, exact [points]": text(100 * methods["exact"].mean(), "+.1f"),
    }
    return pd.DataFrame(cells).reset_index()


AWAY: Final = (1 / 4, 1 / 2, 1.0, 2.0, 4.0)
"""Multiples of the best rate."""

LOST: Final = 0.05
"""Share of exact answers that a good rate may lose against the best method of the setting."""


def good_rates(sweeps: Frame) -> Frame:
    """Widths of the ranges of good rates, and exact answers at multiples of the best rate."""
    highest = sweeps.groupby(SETTING, observed=True)["exact"].transform("max")
    found = compared(sweeps.assign(good=sweeps["exact"] >= highest - LOST))
    rows = []
    for name, mine in found.groupby("method", observed=True):
        widths = [width(sweep) for _, sweep in mine.groupby(SETTING, observed=True)]
        row = {"method": name, "settings": len(widths)}
        row["median of highest / lowest good rate"] = f"{pd.Series(widths).median():.0f}"
        for factor in AWAY:
            shares = mine["exact"][mine["lr"] == factor * mine["best"]]  # exact: powers of two
            at = f"at {factor:g} x best rate"
            row[f"exact {at} [%]"] = f"{100 * shares.mean():.0f}" if len(shares) else ""
            row[f"settings {at}"] = len(shares)
        rows.append(row)
    return pd.DataFrame(rows)


def width(sweep: Frame) -> float:
    """The highest over the lowest rate of the good ones in a row around the best; 0 for none."""
    best, good = sweep["exact"].idxmax(), sweep["good"]
    if not good[best]:
        return 0.0
    stretch = (good != good.shift()).cumsum()
    rates = sweep["lr"][stretch == stretch[best]]
    return float(rates.max() / rates.min())


def beta_regrets(sweeps: Frame) -> Frame:
    """Worst regrets by betas, at the best rate of each and at one rate for all settings."""
    rows = []
    for names in BY_BETAS:
        mine = best_of(sweeps[sweeps["method"].isin(names)])
        losses = mine.pivot(index=SETTING, columns="method", values="loss")
        losses = losses.reindex(columns=names).dropna()
        lowest = losses.min(axis="columns")
        for name in names if len(losses) else ():
            every = sweeps[sweeps["method"] == name]
            by_rate = every.pivot(index=SETTING, columns="lr", values="loss").loc[losses.index]
            single = by_rate.dropna(axis="columns").sub(lowest, axis="index").max().min()
            rows.append(
                {
                    "method": name,
                    "settings": len(losses),
                    "worst regret, best rates [nats/digit]": f"{(losses[name] - lowest).max():.4f}",
                    "worst regret, one rate [nats/digit]": ""
                    if pd.isna(single)
                    else f"{single:.4f}",
                }
            )
    return pd.DataFrame(rows)

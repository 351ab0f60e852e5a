"""Tables and plots of a study, from its records alone."""

import itertools
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Final

import pandas as pd

from rlora.cli import plots
from rlora.cli.chart import Curve, Panel
from rlora.cli.records import write_text

from .frames import Frame, records_in, text
from .methods import METHODS
from .models import MODELS
from .plan import Record, final
from .regret import write_regrets

BASELINES: Final = ("adamw", "adamw-fast", "paper-AdamW")
"""The best of them at its own best rate is what all others are held against."""

GOOD: Final = 1.02
"""A learning rate is good whose validation loss is at most this times the baseline's lowest."""

SHOWN: Final = 1.7
"""A plot leaves out losses above this times the baseline's lowest."""

PLOTTED: Final = (
    *("adamw", "adamw-fast", "lora-plus-fast", "scaled-before-fast", "scaled-both-fast"),
    *("grafted-both-fast", "lora-rite-fast"),
    *("paper-AdamW", "paper-ScaledAdamW", "paper-SGD", "paper-ScaledSGD"),
)
KIND: Final = ["model", "dataset", "rank", "steps"]


def write_tables(folder: Path) -> None:
    """Write the tables and plots of all records in a folder: those of strings have their own."""
    rows, stacked = records_in(folder), [name for name, x in MODELS.items() if x.stacked]
    strings = [row for row in rows if row["model"] in stacked]
    others = [row for row in rows if row["model"] not in stacked]
    if strings:
        write_regrets(strings, folder)
    if others:
        write_results(others, folder)


def write_results(rows: Sequence[Record], folder: Path) -> None:
    """Write ``results.csv`` and the plots of runs one by one."""
    runs, tables = runs_of(rows), []
    for kind, mine in runs.groupby(KIND):
        model, dataset, rank, steps = kind
        sweeps = mine[~mine["tested"]].groupby(["method", "lr"], observed=True)["loss"].mean()
        lowest = sweeps.groupby("method", observed=True).min()
        known = [name for name in BASELINES if name in lowest.index]
        base = lowest[known].idxmin() if known else None
        table = results(mine, sweeps, base).reset_index()
        tables.append(pd.DataFrame([kind] * len(table), columns=KIND).join(table))
        if math.isfinite(lowest[base] if base else lowest.min()):
            title = f"{model}, {dataset}, rank {rank}, {steps} steps"
            drawn = plots.as_svg(title, [panel(sweeps, base)])
            write_text(folder / f"{model}-{dataset}-r{rank}-{steps}.svg", drawn)
    write_text(folder / "results.csv", pd.concat(tables).to_csv(index=False))


def runs_of(rows: Sequence[Record]) -> Frame:
    """Runs, with the scores on the test part that any of them has; inf for a loss of none."""
    runs = pd.DataFrame(
        [
            {
                **{key: value for key, value in row.items() if key != "test"},
                "loss": final(row),
                **{f"test {k}": x for k, x in row.get("test", {"loss": math.inf}).items()},
            }
            for row in rows
        ]
    )
    names = dict.fromkeys((*METHODS, *runs["method"]))
    return runs.assign(method=pd.Categorical(runs["method"], list(names)))


def results(runs: Frame, sweeps: Frame, base: str | None) -> Frame:
    """One row a method, the lowest test loss first; sweeps have a loss by method and rate.

    What is held against a baseline is left out where there is none.
    """
    by_method = sweeps.groupby("method", observed=True)
    lowest, best = by_method.min(), by_method.idxmin().map(lambda key: key[1])
    tested = runs[runs["tested"] & (runs["lr"] == runs["method"].map(best).astype(float))]
    compared: dict[str, Frame] = {}
    if base:
        theirs = tested[tested["method"] == base].set_index("seed")["test loss"]
        gains = (tested["seed"].map(theirs) - tested["test loss"]).where(tested["method"] != base)
        by_seed = gains.groupby(tested["method"], observed=True)
        compared = spread("test loss below AdamW's [nats]", by_seed)
    mine = tested.groupby("method", observed=True)
    scores = sorted(name for name in runs if name.startswith("test ") and name != "test loss")
    cells = {
        "learning rate": text(best, "g"),
        **(good_by_method(by_method, GOOD * lowest[base]) if base else {}),
        "validation loss [nats]": text(lowest, ".3f"),
        **spread("test loss [nats]", mine["test loss"]),
        **compared,
        **{name: text(mine[name].mean(), ".3f") for name in scores},
        "step [ms]": text(mine["step_ms"].median(), ".1f"),
        "state [kB]": text(mine["state_bytes"].first() / 1e3, ".0f"),
    }
    order = mine["test loss"].mean().reindex(lowest.index).sort_values(kind="stable").index
    return pd.DataFrame(cells, index=lowest.index).astype(object).fillna("").loc[order]


def good_by_method(by_method: Frame, bound: float) -> dict[str, Frame]:
    """The column of `good_rates`."""
    found = by_method.apply(lambda x: good_rates(x.droplevel("method").to_dict(), bound))
    return {"highest / lowest good rate": found}


def spread(head: str, groups: Frame) -> dict[str, Frame]:
    """Mean, and the lowest and highest over seeds."""
    ends = {head: "mean", f"{head}, lowest seed": "min", f"{head}, highest seed": "max"}
    return {name: text(groups.agg(end), ".3f") for name, end in ends.items()}


def good_rates(sweep: Mapping[float, float], bound: float) -> str:
    """Give the highest over the lowest good learning rate, as "3.5".

    Around the best rate; between two rates of the sweep the loss is taken as a line in log(lr).
    With ">" in front where the sweep ends before the loss is bad; empty if no rate is good.
    """
    rates = list(sweep)
    best = min(rates, key=lambda lr: sweep[lr])
    if sweep[best] > bound:
        return ""
    i = rates.index(best)
    low, low_open = edge(rates[i::-1], sweep, bound)
    high, high_open = edge(rates[i:], sweep, bound)
    return f"{'>' * (low_open or high_open)}{high / low:.1f}"


def edge(rates: Sequence[float], sweep: Mapping[float, float], bound: float) -> tuple[float, bool]:
    """Return the rate at which the loss passes the bound, and whether it does not."""
    for here, there in itertools.pairwise(rates):
        if sweep[there] > bound:
            # 0 beside a run that diverged
            share = (bound - sweep[here]) / (sweep[there] - sweep[here])
            return here * (there / here) ** share, False
    return rates[-1], True


def panel(sweeps: Frame, base: str | None) -> Panel:
    """Validation loss against learning rate; what diverged is left out."""
    lowest = sweeps[base].min() if base else sweeps.min()
    plotted = sweeps.index.get_level_values("method").isin(PLOTTED)
    shown = sweeps[plotted] if plotted.any() else sweeps
    shown = shown[shown < SHOWN * lowest]
    return Panel(
        "Good is below the line: at most 2 % above AdamW's best" if base else "All rates",
        "learning rate",
        "validation loss",
        tuple(
            Curve(name, list(mine.index.get_level_values("lr")), mine.tolist())
            for name, mine in shown.groupby("method", observed=True)
        ),
        log_x=True,
        log_y=False,
        threshold=GOOD * lowest if base else None,
    )

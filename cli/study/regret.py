"""Tables of the study of strings from its records, and its figure."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np
import pandas as pd

from rlora import suggest_lr
from rlora.cli import plots
from rlora.cli.chart import Curve, Panel
from rlora.cli.records import write_text

from .comparisons import beta_regrets, good_rates, test_losses, test_wins
from .frames import Frame, text
from .plan import Record
from .slopes import slopes
from .stacked_methods import METHODS
from .stacks import BASES
from .strings import DATASETS
from .sweeps import GUESSING, SETTING, SWEEP, best_of, compared, runs_of, sweeps_of

CLOSE: Final = 0.02
"""Nats a digit that may be lost against the tuned baseline."""

CURVES: Final = 9
"""Methods in a panel of the figure."""

PANELS: Final = 2
"""Settings in the figure."""


def write_regrets(rows: Sequence[Record], folder: Path) -> None:
    """Write the tables, as CSV, and a plot of all records of strings."""
    runs = runs_of(rows)
    sweeps = sweeps_of(runs)
    tables = {
        "best_losses": losses_by_rate(best_of(sweeps)),
        "losses_by_rate": losses_by_rate(sweeps),
        "test_wins": test_wins(sweeps, runs),
        "test_losses": test_losses(sweeps, runs),
        "one_rate": one_rate(sweeps),
        "suggested_rate": by_rule(sweeps),
        "regret_by_rate": by_rate(sweeps),
        "good_rates": good_rates(sweeps),
        "beta_regrets": beta_regrets(sweeps),
        "best_rate_powers": slopes(sweeps),
        "changed_factors": transferred(sweeps),
    }
    for name, table in tables.items():
        if len(table):
            write_text(folder / f"{name}.csv", table.to_csv(index=False))
    title = "Validation loss against learning rate"
    write_text(folder / "rates.svg", plots.as_svg(title, panels_of(sweeps)))


def losses_by_rate(sweeps: Frame) -> Frame:
    """Loss and share of exact answers at each rate."""
    cells = {
        "learning rate": text(sweeps["lr"], "g"),
        "validation loss [nats/digit]": text(sweeps["loss"], ".4f"),
        "exact [%]": text(100 * sweeps["exact"], ".0f"),
    }
    return sweeps[SWEEP].assign(**cells)


def one_rate(sweeps: Frame) -> Frame:
    """Regret of one rate everywhere against a baseline that is tuned for each setting."""
    rows = []
    for name, mine in compared(sweeps).groupby("method", observed=True):
        losses = mine.pivot(index=SETTING, columns="lr", values="loss").dropna(axis="columns")
        if not losses.empty:
            rate = losses.mean().idxmin()
            cells = regrets(mine[mine["lr"] == rate])
            rows.append({"method": name, "learning rate": f"{rate:g}", **cells})
    return pd.DataFrame(rows)


def by_rule(sweeps: Frame) -> Frame:
    """Regret of the rate of `rlora.suggest_lr`, or the nearest that was run."""
    found = compared(sweeps)
    rates = [suggested(*x) for x in found[["dataset", "rank"]].itertuples(index=False)]
    found = found.assign(distance=abs(np.log(found["lr"] / rates)))
    nearest = found.loc[found.groupby(SWEEP, observed=True)["distance"].idxmin()]
    groups = nearest.groupby("method", observed=True)
    return pd.DataFrame([{"method": name, **regrets(mine)} for name, mine in groups])


def suggested(dataset: str, rank: int) -> float:
    """The rate of `rlora.suggest_lr` in a setting."""
    mine = DATASETS[dataset]
    return suggest_lr(BASES[mine.base].size, rank=rank, scaling=mine.scaling)


def regrets(mine: Frame) -> dict[str, Any]:
    """Cells of a method with one rate in each setting."""
    found = mine["regret"]
    return {
        "settings": len(found),
        f"regret at most {CLOSE} nats": (found <= CLOSE).sum(),
        "regret at most 2 % of guessing": (found <= 0.02 * GUESSING).sum(),
        "regret at most 10 % of AdamW's loss": (found <= 0.1 * mine["loss, baseline"]).sum(),
        "median regret [nats/digit]": f"{found.median():+.3f}",
        "mean regret [nats/digit]": f"{found.mean():+.3f}",
        "worst regret [nats/digit]": f"{found.max():+.3f}",
        "exact [%]": f"{100 * mine['exact'].mean():.0f}",
        "exact, AdamW [%]": f"{100 * mine['exact, baseline'].mean():.0f}",
    }


def by_rate(sweeps: Frame) -> Frame:
    """Mean regret of each rate, over the settings in which a method was run at all of them."""
    rows = []
    for name, mine in compared(sweeps).groupby("method", observed=True):
        found = mine.pivot(index=SETTING, columns="lr", values="regret")
        found = found.reindex(columns=METHODS["scaled"].rates).dropna()
        rows += [
            {
                "method": name,
                "settings": len(found),
                "learning rate": f"{lr:g}",
                "mean regret [nats/digit]": f"{mean:+.2f}",
            }
            for lr, mean in found.mean().items()
            if len(found)
        ]
    return pd.DataFrame(rows)


def transferred(sweeps: Frame) -> Frame:
    """Settings that differ from a usual one in the factors alone, at that one's best rate."""
    twins = {
        name: x.task
        for name, x in DATASETS.items()
        if name != x.task
        and x._replace(start=1.0, dtype=DATASETS[x.task].dtype) == DATASETS[x.task]
    }
    best, mine = best_of(sweeps), sweeps[sweeps["dataset"].isin(twins)]
    usual = best[[*SWEEP, "best", "loss"]].rename(columns={"dataset": "task"})
    found = mine.assign(task=mine["dataset"].map(twins)).merge(
        usual, on=["task", "rank", "steps", "method"], suffixes=("", ", usual")
    )
    found = found[found["lr"] == found["best, usual"]]
    found = found.merge(best[[*SWEEP, "loss"]], on=SWEEP, suffixes=("", ", lowest"))
    cells = {
        "usual best rate": text(found["lr"], "g"),
        "usual loss [nats/digit]": text(found["loss, usual"], ".3f"),
        "loss at that rate [nats/digit]": text(found["loss"], ".3f"),
        "lowest loss [nats/digit]": text(found["loss, lowest"], ".3f"),
        "its rate": text(found["best"], "g"),
    }
    return found[SWEEP].assign(**cells)


def panels_of(sweeps: Frame) -> list[Panel]:
    """Loss against learning rate in the settings in which most methods were run."""
    swept = [name for name, method in METHODS.items() if len(method.rates) > 1]
    sweeps = sweeps[sweeps["method"].isin(swept)]
    counts = best_of(sweeps)["method"].value_counts(sort=False)
    names = counts.index[2 * counts >= counts.max()][:CURVES]
    settings = best_of(sweeps).groupby(SETTING, observed=True).size()
    most = settings.sort_values(ascending=False, kind="stable").index[:PANELS]
    shown = sweeps[sweeps["method"].isin(names)].groupby(SETTING, observed=True)
    return [
        Panel(
            f"{setting[0]}, rank {setting[1]}, {setting[2]} steps",
            "learning rate",
            "validation loss, nats a digit",
            tuple(
                Curve(name, mine["lr"].tolist(), mine["loss"].tolist())
                for name, mine in shown.get_group(setting).groupby("method", observed=True)
            ),
            log_x=True,
        )
        for setting in most
    ]

"""Tables and plots of a study, from its records alone."""

import math
from collections.abc import Iterator, Sequence
from itertools import groupby, zip_longest
from pathlib import Path
from statistics import mean, median
from typing import Final, NamedTuple

from rlora.cli import plots
from rlora.cli.chart import Curve, Panel
from rlora.cli.records import write_text

from .csv_tables import Row, write_csv
from .methods import METHODS
from .plan import Record, Records, final

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
Kind = tuple[str, str, int, int]
"""Model, dataset, rank, steps."""


class Result(NamedTuple):
    """Runs of a method."""

    name: str
    sweep: dict[float, float]
    """Learning rate -> validation loss, in rising order."""

    tested: list[Record]
    """One a seed, at the best rate."""

    @property
    def best(self) -> float:
        """The learning rate with the lowest validation loss."""
        return min(self.sweep, key=lambda lr: self.sweep[lr])

    @property
    def loss(self) -> float:
        """That loss."""
        return self.sweep[self.best]

    def test_losses(self) -> dict[int, float]:
        """Seed -> test loss; inf where the run diverged."""
        return {row["seed"]: row.get("test", {"loss": math.inf})["loss"] for row in self.tested}

    def scores(self) -> dict[str, list[float]]:
        """Name -> scores on the test part apart from the loss."""
        found: dict[str, list[float]] = {}
        for row in self.tested:
            for name, value in row.get("test", {}).items():
                if name != "loss":
                    found.setdefault(name, []).append(value)
        return found


def write_tables(folder: Path) -> None:
    """Write ``results.csv`` and the plots of all records in a folder."""
    paths = sorted(folder.glob("*.jsonl"))
    if not paths:
        msg = f"{folder} has no records of a study (*.jsonl)"
        raise ValueError(msg)
    groups = dict(group for path in paths for group in groups_of(path))
    scores = sorted({name for group in groups.values() for x in group for name in x.scores()})
    lines: list[Row] = []
    for kind, results in groups.items():
        lines += rows_of(kind, results, scores)
        model, dataset, rank, steps = kind
        title = f"{model}, {dataset}, rank {rank}, {steps} steps"
        file = f"{model}-{dataset}-r{rank}-{steps}.svg"
        write_text(folder / file, plots.as_svg(title, [panel(results)]))
    write_csv(folder / "results.csv", lines)


def groups_of(path: Path) -> Iterator[tuple[Kind, list[Result]]]:
    """The results of a file, for each rank and length of runs in it."""

    def kind(row: Record) -> Kind:
        return row["model"], row["dataset"], row["rank"], row["steps"]

    rows = sorted(Records(path).rows.values(), key=kind)
    for key, group in groupby(rows, kind):
        mine = list(group)
        names = dict.fromkeys((*METHODS, *(row["method"] for row in mine)))
        results = [result(name, mine) for name in names]
        yield key, [x for x in results if x.sweep]


def result(name: str, rows: Sequence[Record]) -> Result:
    """The runs of one method."""
    mine = [row for row in rows if row["method"] == name]
    losses: dict[float, list[float]] = {}
    for row in sorted(mine, key=lambda row: row["lr"]):
        if not row["tested"]:
            losses.setdefault(row["lr"], []).append(final(row))
    sweep = {lr: mean(values) for lr, values in losses.items()}
    best = min(sweep, key=lambda lr: sweep[lr], default=None)
    tested = [row for row in mine if row["tested"] and row["lr"] == best]
    return Result(name, sweep, sorted(tested, key=lambda row: row["seed"]))


def rows_of(kind: Kind, results: Sequence[Result], scores: Sequence[str]) -> list[Row]:
    """One row a method, the lowest test loss first."""
    base = baseline(results)
    rows = sorted(results, key=lambda x: mean(x.test_losses().values()) if x.tested else math.inf)
    heads = ("model", "dataset", "rank", "steps")
    return [{**dict(zip(heads, kind, strict=True)), **cells(x, base, scores)} for x in rows]


def baseline(results: Sequence[Result]) -> Result:
    """The best of the baselines; while none of them was run, the best of all."""
    known = [x for x in results if x.name in BASELINES]
    return min(known or results, key=lambda x: x.loss)


def cells(x: Result, base: Result, scores: Sequence[str]) -> Row:
    """Give a method's cells of the table."""
    losses, theirs = x.test_losses(), base.test_losses()
    gains = [theirs[seed] - loss for seed, loss in losses.items() if seed in theirs]
    found = x.scores()
    return {
        "method": x.name,
        "learning rate": f"{x.best:g}",
        "highest / lowest good rate": good_rates(x.sweep, GOOD * base.loss),
        "validation loss [nats]": f"{x.loss:.3f}",
        **spread("test loss [nats]", list(losses.values())),
        **spread("test loss below AdamW's [nats]", gains if x is not base else []),
        **{f"test {k}": f"{mean(found[k]):.3f}" if k in found else "" for k in scores},
        "step [ms]": f"{median(row['step_ms'] for row in x.tested):.1f}" if x.tested else "",
        "state [kB]": f"{x.tested[0]['state_bytes'] / 1e3:.0f}" if x.tested else "",
    }


def spread(head: str, values: Sequence[float]) -> Row:
    """Mean, and the lowest and highest over seeds."""
    found = (mean(values), min(values), max(values)) if values else ()
    heads = (head, f"{head}, lowest seed", f"{head}, highest seed")
    cells = zip_longest(heads, found)
    return {name: "" if x is None else f"{x:.3f}" for name, x in cells}


def good_rates(sweep: dict[float, float], bound: float) -> str:
    """Give the highest over the lowest good learning rate, as "3.5".

    Around the best rate; between two rates of the sweep the loss is taken as a line in log(lr).
    With ">" in front where the sweep ends before the loss is bad; empty if no rate is good.
    """
    rates = list(sweep)
    best = min(range(len(rates)), key=lambda i: sweep[rates[i]])
    if sweep[rates[best]] > bound:
        return ""
    (low, low_open), (high, high_open) = (
        _edge(rates, sweep, best, step, bound) for step in (-1, 1)
    )
    return f"{'>' * (low_open or high_open)}{high / low:.1f}"


def _edge(
    rates: Sequence[float], sweep: dict[float, float], best: int, step: int, bound: float
) -> tuple[float, bool]:
    """Return the rate at which the loss passes the bound on one side, and whether it does not."""
    i = best
    while 0 <= i + step < len(rates):
        here, there = sweep[rates[i]], sweep[rates[i + step]]
        if there > bound:
            share = (bound - here) / (there - here)  # 0 beside a run that diverged
            return float(rates[i] * (rates[i + step] / rates[i]) ** share), False
        i += step
    return rates[i], True


def panel(results: Sequence[Result]) -> Panel:
    """Validation loss against learning rate; what diverged is left out."""
    base = baseline(results).loss
    curves = []
    for x in [x for x in results if x.name in PLOTTED] or results:
        points = [(lr, loss) for lr, loss in x.sweep.items() if loss < SHOWN * base]
        if points:
            curves.append(Curve(x.name, *map(list, zip(*points, strict=True))))
    return Panel(
        "Good is below the line: at most 2 % above AdamW's best",
        "learning rate",
        "validation loss",
        tuple(curves),
        log_x=True,
        log_y=False,
        threshold=GOOD * base,
    )

"""Tables of the study of strings from its records, one learning rate for all settings first."""

import math
from collections.abc import Sequence
from pathlib import Path
from statistics import mean, median
from typing import Final, NamedTuple

from rlora import suggest_lr
from rlora.cli import plots
from rlora.cli.chart import Curve, Panel
from rlora.cli.records import write_text

from .comparisons import beta_regrets, good_rates, test_losses, test_wins
from .csv_tables import Row, write_csv
from .plan import Records
from .slopes import slopes
from .stacked_methods import METHODS
from .stacks import BASES
from .strings import DATASETS
from .sweeps import GUESSING, Setting, Sweep, Sweeps, common_rates, compared, sweeps_of

CLOSE: Final = 0.02
"""Nats a digit that may be lost against the tuned baseline."""

CURVES: Final = 9
"""Methods in a panel of the figure."""

PANELS: Final = 2
"""Settings in the figure."""


def write_regrets(folder: Path) -> None:
    """Write the tables, as CSV, and a plot of all records in a folder."""
    paths = sorted(folder.glob("strings-*.jsonl"))
    if not paths:
        msg = f"{folder} has no records of strings (strings-*.jsonl)"
        raise ValueError(msg)
    rows = [row for path in paths for row in Records(path).rows.values()]
    sweeps = sweeps_of(rows)
    tables = {
        "best_losses": best_losses(sweeps),
        "losses_by_rate": losses_by_rate(sweeps),
        "test_wins": test_wins(sweeps, rows),
        "test_losses": test_losses(sweeps, rows),
        "one_rate": one_rate(sweeps),
        "suggested_rate": by_rule(sweeps),
        "regret_by_rate": by_rate(sweeps),
        "good_rates": good_rates(sweeps),
        "beta_regrets": beta_regrets(sweeps),
        "best_rate_powers": slopes(sweeps),
        "changed_factors": transferred(sweeps),
    }
    for name, table in tables.items():
        write_csv(folder / f"{name}.csv", table)
    title = "Validation loss against learning rate"
    write_text(folder / "rates.svg", plots.as_svg(title, panels_of(sweeps)))


def best_losses(sweeps: Sweeps) -> list[Row]:
    """Lowest loss of each sweep."""
    return [
        {**setting._asdict(), "method": name, **cells_at(sweep, sweep.best)}
        for setting, group in sweeps.items()
        for name, sweep in group.items()
    ]


def losses_by_rate(sweeps: Sweeps) -> list[Row]:
    """Loss at each rate of each sweep."""
    return [
        {**setting._asdict(), "method": name, **cells_at(sweep, lr)}
        for setting, group in sweeps.items()
        for name, sweep in group.items()
        for lr in sweep.losses
    ]


def cells_at(sweep: Sweep, lr: float) -> Row:
    """Cells of a rate, its loss and its share of exact answers."""
    return {
        "learning rate": f"{lr:g}",
        "validation loss [nats/digit]": f"{sweep.losses[lr]:.4f}",
        "exact [%]": f"{100 * sweep.exact[lr]:.0f}",
    }


def usual_methods(sweeps: Sweeps) -> list[str]:
    """Methods that were run in at least half as many settings as any."""
    counts = {name: sum(name in group for group in sweeps.values()) for name in METHODS}
    return [name for name, count in counts.items() if 2 * count >= max(counts.values())]


class Default(NamedTuple):
    """A method at one learning rate in every setting in which the baseline was tuned too."""

    settings: list[Setting]
    means: dict[float, float]
    """Learning rate -> mean loss over the settings, of rates that were tried in all of them."""

    @property
    def rate(self) -> float:
        """The rate with the lowest mean."""
        return min(self.means, key=lambda lr: self.means[lr])


def default_of(sweeps: Sweeps, name: str) -> Default | None:
    """The one rate of a method; None without a setting that has a baseline, or a common rate."""
    settings = [x for x in compared(sweeps) if name in sweeps[x]]
    if not settings:
        return None
    common = common_rates(sweeps[x][name] for x in settings)
    means = {lr: mean(sweeps[x][name].losses[lr] for x in settings) for lr in common}
    return Default(settings, means) if means else None


def one_rate(sweeps: Sweeps) -> list[Row]:
    """Regret of one rate everywhere against a baseline that is tuned for each setting."""
    rows: list[Row] = []
    bases = compared(sweeps)
    for name in METHODS:
        if (found := default_of(sweeps, name)) is not None:
            pairs = [(sweeps[x][name], found.rate, sweeps[x][bases[x]]) for x in found.settings]
            rows.append({"method": name, "learning rate": f"{found.rate:g}", **regrets(pairs)})
    return rows


def by_rule(sweeps: Sweeps) -> list[Row]:
    """Regret of the rate of `rlora.suggest_lr`, or the nearest that was run."""
    rows: list[Row] = []
    bases = compared(sweeps)
    for name in METHODS:
        pairs = [
            (sweeps[x][name], nearest(sweeps[x][name], suggested(x)), sweeps[x][bases[x]])
            for x in bases
            if name in sweeps[x]
        ]
        if pairs:
            rows.append({"method": name, **regrets(pairs)})
    return rows


def regrets(pairs: Sequence[tuple[Sweep, float, Sweep]]) -> Row:
    """Cells of a row: sweeps, each at a rate, against the best of others."""
    found = [mine.losses[lr] - theirs.lowest for mine, lr, theirs in pairs]
    return {
        "settings": len(found),
        f"regret at most {CLOSE} nats": sum(x <= CLOSE for x in found),
        "regret at most 2 % of guessing": sum(x <= 0.02 * GUESSING for x in found),
        "median regret [nats/digit]": f"{median(found):+.3f}",
        "mean regret [nats/digit]": f"{mean(found):+.3f}",
        "worst regret [nats/digit]": f"{max(found):+.3f}",
        "exact [%]": f"{100 * mean(mine.exact[lr] for mine, lr, _ in pairs):.0f}",
        "exact, AdamW [%]": f"{100 * mean(x.exact[x.best] for *_, x in pairs):.0f}",
    }


def suggested(setting: Setting) -> float:
    """The rate of `rlora.suggest_lr` in a setting."""
    dataset = DATASETS[setting.dataset]
    size = BASES[dataset.base].size
    return suggest_lr(size, rank=setting.rank, scaling=dataset.scaling)


def nearest(sweep: Sweep, lr: float) -> float:
    """The rate of a sweep that is nearest to another by ratio."""
    return min(sweep.losses, key=lambda x: abs(math.log(x / lr)))


def by_rate(sweeps: Sweeps) -> list[Row]:
    """Mean regret of each rate, over the settings in which a method was run at all of them."""
    rows: list[Row] = []
    bases, rates = compared(sweeps), METHODS["scaled"].rates
    for name in METHODS:
        settings = [
            x for x in bases if name in sweeps[x] and set(rates) <= sweeps[x][name].losses.keys()
        ]
        for lr in rates if settings else ():
            found = (sweeps[x][name].losses[lr] - sweeps[x][bases[x]].lowest for x in settings)
            rows.append(
                {
                    "method": name,
                    "settings": len(settings),
                    "learning rate": f"{lr:g}",
                    "mean regret [nats/digit]": f"{mean(found):+.2f}",
                }
            )
    return rows


def transferred(sweeps: Sweeps) -> list[Row]:
    """Settings that differ from a usual one in the factors alone, at that one's best rate."""
    rows: list[Row] = []
    for setting, group in sweeps.items():
        mine = DATASETS[setting.dataset]
        twin = setting._replace(dataset=mine.task)
        if (
            twin == setting
            or mine._replace(start=1.0, dtype=DATASETS[mine.task].dtype) != DATASETS[mine.task]
        ):
            continue
        for name, sweep in group.items():
            usual = sweeps.get(twin, {}).get(name)
            if usual is not None and usual.best in sweep.losses:
                rows.append(
                    {
                        **setting._asdict(),
                        "method": name,
                        "usual best rate": f"{usual.best:g}",
                        "usual loss [nats/digit]": f"{usual.lowest:.3f}",
                        "loss at that rate [nats/digit]": f"{sweep.losses[usual.best]:.3f}",
                        "lowest loss [nats/digit]": f"{sweep.lowest:.3f}",
                        "its rate": f"{sweep.best:g}",
                    }
                )
    return rows


def panels_of(sweeps: Sweeps) -> list[Panel]:
    """Loss against learning rate in the settings in which most methods were run."""
    names = usual_methods(sweeps)[:CURVES]
    most = sorted(sweeps, key=lambda setting: -len(sweeps[setting]))[:PANELS]
    return [
        Panel(
            str(setting),
            "learning rate",
            "validation loss, nats a digit",
            tuple(
                Curve(name, list(sweep.losses), list(sweep.losses.values()))
                for name, sweep in sweeps[setting].items()
                if name in names
            ),
            log_x=True,
            log_y=True,
        )
        for setting in most
    ]

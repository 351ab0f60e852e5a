"""Tables of the study of strings from its records, one learning rate for all settings first."""

import math
from collections.abc import Mapping
from pathlib import Path
from statistics import mean, median, stdev
from typing import Final, NamedTuple

from rlora.cli import plots
from rlora.cli.chart import Curve, Panel
from rlora.cli.records import write_text

from .comparisons import away, betas, clipping, paired
from .markdown import captioned
from .plan import Records
from .stacks import METHODS
from .strings import DATASETS
from .sweeps import GUESSING, Setting, Sweep, Sweeps, common_rates, compared, sweeps_of

CLOSE: Final = 0.02
"""Nats a digit that may be lost against the tuned baseline."""

CURVES: Final = 9
"""Methods in a panel of the figure."""

PANELS: Final = 2
"""Settings in the figure."""


def write_regrets(folder: Path) -> None:
    """Write ``tables.md`` and a plot of all records in a folder."""
    paths = sorted(folder.glob("strings-*.jsonl"))
    if not paths:
        msg = f"{folder} has no records of strings (strings-*.jsonl)"
        raise ValueError(msg)
    rows = [row for path in paths for row in Records(path).rows.values()]
    sweeps = sweeps_of(rows)
    parts = {
        "Best losses": best_losses(sweeps),
        "Test losses against AdamW, seed by seed": paired(sweeps, rows),
        "One learning rate for all settings": one_rate(sweeps),
        "Away from the best rate": away(sweeps),
        "Betas": betas(sweeps),
        "Steps in a trust region": clipping(sweeps),
        "Learning rate against rank": slopes(sweeps),
        "The rate of the usual task on its unusual forms": transferred(sweeps),
    }
    lines = ["# Tables of the study of strings", ""]
    lines.append("Made by `rlora study --model strings --tables` from the records beside.")
    for title, found in parts.items():
        lines += ["", f"## {title}", "", *(found or ["No records for this table."])]
    title = "Validation loss against learning rate"
    write_text(folder / "rates.svg", plots.as_svg(title, panels_of(sweeps)))
    lines += ["", f"![{title}](rates.svg)", "", f"*{title}.*"]
    write_text(folder / "tables.md", "\n".join(lines) + "\n")


def best_losses(sweeps: Sweeps) -> list[str]:
    """Lowest loss of each sweep with the share of exact answers at that rate."""
    names = [name for name in METHODS if any(name in group for group in sweeps.values())]

    def cell(sweep: Sweep | None, low: float) -> str:
        if sweep is None:
            return "-"
        text = f"{sweep.lowest:.4f} ({100 * sweep.exact[sweep.best]:.0f} %)"
        return f"**{text}**" if sweep.lowest == low else text

    rows = []
    for setting, group in sweeps.items():
        low = min(sweep.lowest for sweep in group.values())
        rows.append([str(setting), *(cell(group.get(name), low) for name in names)])
    caption = (
        "Validation loss, nats a digit, of each method at its best rate, and exact answers; "
        "bold: the lowest; -: not run."
    )
    return captioned(caption, ["setting", *(f"`{name}`" for name in names)], rows)


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


def one_rate(sweeps: Sweeps) -> list[str]:
    """Regret of one rate everywhere against a baseline that is tuned for each setting."""
    rows, bases = [], compared(sweeps)
    for name in METHODS:
        if (found := default_of(sweeps, name)) is None:
            continue
        lr = found.rate
        pairs = [(sweeps[x][name], sweeps[x][bases[x]]) for x in found.settings]
        regrets = [mine.losses[lr] - theirs.lowest for mine, theirs in pairs]
        close = sum(x <= CLOSE for x in regrets)
        rows.append(
            [
                *(f"`{name}`", f"{lr:.2g}", f"{close} of {len(regrets)}"),
                *(f"{x:+.3f}" for x in (median(regrets), mean(regrets), max(regrets))),
                f"{100 * mean(mine.exact[lr] for mine, _ in pairs):.0f} %",
                f"{100 * mean(theirs.exact[theirs.best] for _, theirs in pairs):.0f} %",
            ]
        )
    caption = (
        f"Each method at the one rate with its lowest mean loss over all its settings, in "
        f"hindsight: chosen on these same runs. Regret: validation loss less that of AdamW at the "
        f"best of the rates and betas that were run with it in the setting, nats a digit; close: "
        f"at most {CLOSE}. Guessing has {GUESSING:.2f}, and so counts a run that diverged."
    )
    head = ["method", "rate", "close", "median regret", "mean", "worst", "exact"]
    return captioned(caption, [*head, "exact of that AdamW"], rows)


def slopes(sweeps: Sweeps) -> list[str]:
    """Powers of the rank by which best rates go, where a sweep was run at several ranks."""
    found: dict[str, list[float]] = {}
    for setting, group in sweeps.items():
        for name, sweep in group.items():
            higher = [
                other
                for other in sweeps
                if other._replace(rank=setting.rank) == setting
                and other.rank > setting.rank
                and name in sweeps[other]
            ]
            if higher:
                top = max(higher)
                rates = optimum(sweeps[top][name].losses) / optimum(sweep.losses)
                found.setdefault(name, []).append(
                    math.log(rates) / math.log(top.rank / setting.rank)
                )
    rows = [
        [
            *(f"`{name}`", f"{len(found[name])}", f"{mean(found[name]):+.2f}"),
            f"{stdev(found[name]) / len(found[name]) ** 0.5:.2f}" if len(found[name]) > 1 else "-",
        ]
        for name in METHODS
        if name in found
    ]
    caption = "Power p of the rank in the best rate, lr ~ r^p; alpha = 2 r at every rank."
    return captioned(caption, ["method", "pairs of settings", "p", "standard error"], rows)


def optimum(losses: Mapping[float, float]) -> float:
    """The vertex of a parabola in log(lr), through the log losses at and beside the best rate."""
    rates = list(losses)
    i = min(range(len(rates)), key=lambda k: losses[rates[k]])
    if not 0 < i < len(rates) - 1:
        return rates[i]
    x = [math.log(rates[k]) for k in (i - 1, i, i + 1)]
    y = [math.log(losses[rates[k]]) for k in (i - 1, i, i + 1)]
    left, right = (y[1] - y[0]) / (x[1] - x[0]), (y[2] - y[1]) / (x[2] - x[1])
    if left == right:
        return rates[i]
    bend = (right - left) / (x[2] - x[0])
    return math.exp((x[0] + x[1]) / 2 - left / (2 * bend))


def transferred(sweeps: Sweeps) -> list[str]:
    """Settings that differ from a usual one in the factors alone, at that one's best rate."""
    rows = []
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
                lr = usual.best
                rows.append(
                    [
                        *(str(setting), f"`{name}`", f"{lr:.2g}", f"{usual.losses[lr]:.3f}"),
                        *(f"{sweep.losses[lr]:.3f}", f"{sweep.lowest:.3f}"),
                        f"{sweep.best:.2g}",
                    ]
                )
    caption = "Loss when the factors alone differ from those of the usual task."
    head = ["setting", "method", "usual best rate", "usual loss", "loss here at that rate"]
    return captioned(caption, [*head, "lowest loss here", "its rate"], rows)


def panels_of(sweeps: Sweeps) -> list[Panel]:
    """Loss against learning rate in the settings in which most methods were run."""
    most = sorted(sweeps, key=lambda setting: -len(sweeps[setting]))[:PANELS]
    return [
        Panel(
            str(setting).replace("`", ""),
            "learning rate",
            "validation loss, nats a digit",
            tuple(
                Curve(name, list(sweep.losses), list(sweep.losses.values()))
                for name, sweep in list(sweeps[setting].items())[:CURVES]
            ),
            log_x=True,
            log_y=True,
        )
        for setting in most
    ]

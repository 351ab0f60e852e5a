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

from .comparisons import away, betas, clipping, marked, paired, wins
from .markdown import captioned
from .plan import Records
from .slopes import slopes
from .stacked_methods import METHODS
from .stacks import BASES
from .strings import DATASETS
from .sweeps import (
    GUESSING,
    Setting,
    Sweep,
    Sweeps,
    common_rates,
    compared,
    main_settings,
    sweeps_of,
)

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
        "Best losses of all methods": best_losses(sweeps),
        "Best losses in all settings": lowest_losses(sweeps),
        "Test losses against AdamW": wins(sweeps, rows),
        "Test losses against AdamW, seed by seed": paired(sweeps, rows),
        "One learning rate for all settings": one_rate(sweeps),
        "The suggested learning rate": by_rule(sweeps),
        "Regret by learning rate": by_rate(sweeps),
        "Away from the best rate": away(sweeps),
        "Betas": betas(sweeps),
        "Steps in a trust region": clipping(sweeps),
        "Best rates against rank, s, width, batch and length": slopes(sweeps),
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
    """Lowest loss of each sweep with the share of exact answers, where most methods were run."""
    settings = main_settings(sweeps)
    low = {x: min(sweep.lowest for sweep in sweeps[x].values()) for x in settings}

    def cell(setting: Setting, sweep: Sweep | None) -> str:
        if sweep is None:
            return "-"
        text = f"{sweep.lowest:.4f} ({100 * sweep.exact[sweep.best]:.0f} %)"
        return f"**{text}**" if sweep.lowest == low[setting] else text

    rows = [
        [f"`{name}`", *(cell(x, sweeps[x].get(name)) for x in settings)]
        for name in METHODS
        if any(name in sweeps[x] for x in settings)
    ]
    caption = (
        "Validation loss, nats a digit, of each method at its best rate, and exact answers, where "
        "most methods were run; bold: the lowest; -: not run."
    )
    return captioned(caption, ["method", *map(str, settings)], rows)


def lowest_losses(sweeps: Sweeps) -> list[str]:
    """Lowest loss of each sweep of the methods that were run in most settings."""
    rows, names = [], usual_methods(sweeps)
    for setting, group in sweeps.items():
        found = [group[name].lowest if name in group else None for name in names]
        if sum(x is not None for x in found) > 1:
            rows.append([str(setting), *marked(found)])
    caption = (
        "Validation loss, nats a digit, of methods at their best rates, where they were run; "
        "bold: the lowest of the row."
    )
    return captioned(caption, ["setting", *(f"`{name}`" for name in names)], rows)


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


def one_rate(sweeps: Sweeps) -> list[str]:
    """Regret of one rate everywhere against a baseline that is tuned for each setting."""
    rows, bases = [], compared(sweeps)
    for name in METHODS:
        if (found := default_of(sweeps, name)) is not None:
            pairs = [(sweeps[x][name], found.rate, sweeps[x][bases[x]]) for x in found.settings]
            rows.append([f"`{name}`", f"{found.rate:.2g}", *regrets(pairs)])
    caption = (
        f"Each method at the one rate with its lowest mean loss over all its settings, in "
        f"hindsight: chosen on these same runs. {REGRET}"
    )
    return captioned(caption, ["method", "rate", *REGRET_HEAD], rows)


def by_rule(sweeps: Sweeps) -> list[str]:
    """Regret of the rate of `rlora.suggest_lr`, or the nearest that was run."""
    rows, bases = [], compared(sweeps)
    for name in METHODS:
        settings = [x for x in bases if name in sweeps[x]]
        if settings and 2 * len(settings) >= len(bases):
            pairs = [
                (sweeps[x][name], nearest(sweeps[x][name], suggested(x)), sweeps[x][bases[x]])
                for x in settings
            ]
            rows.append([f"`{name}`", *regrets(pairs)])
    caption = (
        f"Each method at the rate of rlora.suggest_lr, size / (4 s sqrt(r)), or the nearest that "
        f"was run; methods that were run in at least half of the settings. {REGRET}"
    )
    return captioned(caption, ["method", *REGRET_HEAD], rows)


REGRET: Final = (
    f"Regret: validation loss less that of AdamW at the best of the rates and betas that were run "
    f"with it in the setting, nats a digit; close: at most {CLOSE}; within 2 %: at most 2 % of the "
    f"loss of guessing, {GUESSING:.2f}, as which a run counts that diverged."
)
REGRET_HEAD: Final = (
    *("close", "within 2 %", "median regret", "mean", "worst", "exact", "exact of that AdamW"),
)


def regrets(pairs: Sequence[tuple[Sweep, float, Sweep]]) -> list[str]:
    """Cells of a row: sweeps, each at a rate, against the best of others."""
    found = [mine.losses[lr] - theirs.lowest for mine, lr, theirs in pairs]
    return [
        *(f"{sum(x <= most for x in found)} of {len(found)}" for most in (CLOSE, 0.02 * GUESSING)),
        *(f"{x:+.3f}" for x in (median(found), mean(found), max(found))),
        f"{100 * mean(mine.exact[lr] for mine, lr, _ in pairs):.0f} %",
        f"{100 * mean(theirs.exact[theirs.best] for *_, theirs in pairs):.0f} %",
    ]


def suggested(setting: Setting) -> float:
    """The rate of `rlora.suggest_lr` in a setting."""
    dataset = DATASETS[setting.dataset]
    size = BASES[dataset.base].size
    return suggest_lr(size, rank=setting.rank, scaling=dataset.scaling)


def nearest(sweep: Sweep, lr: float) -> float:
    """The rate of a sweep that is nearest to another by ratio."""
    return min(sweep.losses, key=lambda x: abs(math.log(x / lr)))


def by_rate(sweeps: Sweeps) -> list[str]:
    """Mean regret of each rate, over the settings in which a method was run at all of them."""
    rows, bases, rates = [], compared(sweeps), METHODS["scaled"].rates
    for name in METHODS:
        settings = [
            x for x in bases if name in sweeps[x] and set(rates) <= sweeps[x][name].losses.keys()
        ]
        if not settings or 2 * len(settings) < len(bases):
            continue
        means = [
            mean(sweeps[x][name].losses[lr] - sweeps[x][bases[x]].lowest for x in settings)
            for lr in rates
        ]
        rows.append([f"`{name}`", str(len(settings)), *(f"{x:+.2f}" for x in means)])
    caption = (
        "Mean over settings of validation loss less that of AdamW tuned for each, nats a digit, "
        "by learning rate; methods that were run in at least half of the settings."
    )
    return captioned(caption, ["method", "settings", *(f"{lr:.2g}" for lr in rates)], rows)


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
    names = usual_methods(sweeps)[:CURVES]
    most = sorted(sweeps, key=lambda setting: -len(sweeps[setting]))[:PANELS]
    return [
        Panel(
            str(setting).replace("`", ""),
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

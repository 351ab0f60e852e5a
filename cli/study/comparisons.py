"""Tables of the study of strings: seed by seed, away from the best rate, and by betas."""

from collections.abc import Iterable, Mapping, Sequence
from statistics import mean, median, stdev
from typing import Final, NamedTuple

from .markdown import captioned
from .plan import Record
from .stacked_methods import BY_BETAS, CLIPPED, METHODS, SHARE
from .strings import DATASETS
from .sweeps import (
    GUESSING,
    Setting,
    Sweep,
    Sweeps,
    common_rates,
    compared,
    main_settings,
    setting_of,
)

QUANTILES: Final = (12.71, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)
"""Quantiles of Student's t, 97.5 %, for 1, 2, ... degrees of freedom."""


class Paired(NamedTuple):
    """Test runs of a method at its best rate, and those of the baseline on the same seeds."""

    setting: Setting
    name: str
    rate: float
    mine: list[Record]
    theirs: list[Record]

    def differences(self, score: str = "loss") -> list[float]:
        """A score less the baseline's, seed by seed."""
        pairs = zip(self.mine, self.theirs, strict=True)
        return [tested(mine, score) - tested(theirs, score) for mine, theirs in pairs]


def pairs_of_runs(sweeps: Sweeps, rows: Iterable[Record]) -> list[Paired]:
    """All methods that have test runs beside a baseline, and the baseline itself."""
    found: dict[Setting, dict[str, dict[int, Record]]] = {}
    for row in rows:
        sweep = sweeps.get(setting_of(row), {}).get(row["method"])
        if row["tested"] and sweep is not None and row["lr"] == sweep.best:
            group = found.setdefault(setting_of(row), {})
            group.setdefault(row["method"], {})[row["seed"]] = row
    chosen = {
        setting: {name: sweep for name, sweep in group.items() if name in found.get(setting, {})}
        for setting, group in sweeps.items()
    }
    made = []
    for setting, base in compared(chosen).items():
        theirs = found[setting][base]
        for name, sweep in chosen[setting].items():
            mine = found[setting][name]
            if seeds := sorted(mine.keys() & theirs.keys()):
                both = ([runs[k] for k in seeds] for runs in (mine, theirs))
                made.append(Paired(setting, name, sweep.best, *both))
    return made


def paired(sweeps: Sweeps, rows: Iterable[Record]) -> list[str]:
    """Differences of test losses to the baseline, where most methods were run."""
    main = main_settings(sweeps)
    lines = [
        [
            *(str(x.setting), f"`{x.name}`", f"{x.rate:.2g}"),
            f"{mean(tested(row, 'loss') for row in x.mine):.4f}",
            "-" if x.mine == x.theirs else interval(x.differences()),
            f"{100 * mean(tested(row, 'exact') for row in x.mine):.1f} %",
            str(len(x.mine)),
        ]
        for x in pairs_of_runs(sweeps, rows)
        if x.setting in main
    ]
    caption = (
        "Test loss, nats a digit, where most methods were run. Difference: test loss less "
        "AdamW's (-) on the same seeds, 95 % interval of Student's t. Rates, and AdamW's betas, "
        "were chosen on other seeds."
    )
    head = ["setting", "method", "rate", "test loss", "difference", "exact", "seeds"]
    return captioned(caption, head, lines)


def wins(sweeps: Sweeps, rows: Iterable[Record]) -> list[str]:
    """Numbers of settings in which a method is better, or worse, than the baseline on test."""
    made = pairs_of_runs(sweeps, rows)
    lines = []
    for name in METHODS:
        mine = [x for x in made if x.name == name and len(x.mine) > 1]
        if not mine:
            continue
        bounds = [limits(x.differences()) for x in mine]
        exact = [mean(x.differences("exact")) for x in mine]
        lines.append(
            [
                *(f"`{name}`", str(len(mine))),
                *(str(sum(high < 0 for _, high in bounds)), str(sum(low > 0 for low, _ in bounds))),
                f"{mean(mean(x.differences()) for x in mine):+.3f}",
                f"{100 * mean(exact):+.1f}",
            ]
        )
    caption = (
        "Each method at its best rate against AdamW at its best rate and betas, on seeds that "
        "chose neither. Better, worse: settings in which the 95 % interval of the difference of "
        "test losses leaves out zero. Means over settings: difference in nats a digit, and in "
        "points of exact answers."
    )
    head = ["method", "settings", "better", "worse", "difference", "exact"]
    return captioned(caption, head, lines)


def tested(row: Record, name: str) -> float:
    """A score on the test part; that of guessing if the run diverged or is worse."""
    if name == "loss":
        return min(float(row.get("test", {name: GUESSING})[name]), GUESSING)
    return float(row.get("test", {name: 0.0})[name])


def limits(values: Sequence[float]) -> tuple[float, float]:
    """Ends of a 95 % interval of a mean; ValueError for more values than `QUANTILES` is for."""
    if len(values) > len(QUANTILES) + 1:
        msg = (
            f"intervals are for at most {len(QUANTILES) + 1} seeds, got {len(values)} tested ones: "
            f"take the records of some out"
        )
        raise ValueError(msg)
    half = QUANTILES[len(values) - 2] * stdev(values) / len(values) ** 0.5
    return mean(values) - half, mean(values) + half


def interval(values: Sequence[float]) -> str:
    """Mean with a 95 % interval, as "-0.010 (-0.012 to -0.008)"."""
    if len(values) == 1:
        return f"{values[0]:+.4f}"
    low, high = limits(values)
    return f"{mean(values):+.4f} ({low:+.4f} to {high:+.4f})"


AWAY: Final = {
    "1/4 of the best": 1 / 4,
    "1/2 of the best": 1 / 2,
    "at the best": 1.0,
    "2 times the best": 2.0,
    "4 times the best": 4.0,
}
"""Multiples of the best rate."""

LOST: Final = 0.05
"""Share of exact answers that a good rate may lose against the best method of the setting."""


def away(sweeps: Sweeps) -> list[str]:
    """Widths of the ranges of good rates, and exact answers at multiples of the best rate."""
    lines = []
    for name in METHODS:
        groups = [sweeps[x] for x in compared(sweeps) if name in sweeps[x]]
        if groups:
            mine = [group[name] for group in groups]
            widths = [width(group[name], best_share(group) - LOST) for group in groups]
            means = [share_away(mine, factor) for factor in AWAY.values()]
            lines.append([f"`{name}`", str(len(mine)), f"{median(widths):.0f}x", *means])
    caption = (
        f"Good: exact answers at most {100 * LOST:.0f} points below the best of any method in the "
        f"setting. Width: highest over lowest good rate among those run; 1x: one good rate; 0x: "
        f"none. Then exact answers at multiples of each setting's best rate, averaged over "
        f"settings; in brackets: in how many of them that rate was run, if not in all."
    )
    return captioned(caption, ["method", "settings", "width, median", *AWAY], lines)


def best_share(group: Mapping[str, Sweep]) -> float:
    """The most exact answers that any method has in a setting."""
    return max(max(sweep.exact.values()) for sweep in group.values())


def width(sweep: Sweep, bound: float) -> float:
    """The highest over the lowest rate of the good ones in a row around the best; 0 for none."""
    rates = list(sweep.exact)
    low = high = max(range(len(rates)), key=lambda i: sweep.exact[rates[i]])
    if sweep.exact[rates[low]] < bound:
        return 0.0
    while low > 0 and sweep.exact[rates[low - 1]] >= bound:
        low -= 1
    while high + 1 < len(rates) and sweep.exact[rates[high + 1]] >= bound:
        high += 1
    return rates[high] / rates[low]


def share_away(sweeps: Sequence[Sweep], factor: float) -> str:
    """Mean of the exact answers at a multiple of each sweep's best rate, where it was run."""
    shares = [
        share
        for sweep in sweeps
        for lr, share in sweep.exact.items()
        if lr == factor * sweep.best  # exact: factors are powers of two
    ]
    if not shares:
        return "-"
    some = f" ({len(shares)})" if len(shares) < len(sweeps) else ""
    return f"{100 * mean(shares):.0f} %{some}"


def betas(sweeps: Sweeps) -> list[str]:
    """Losses by betas, at the best rate of each and at one rate for all settings."""
    lines = []
    for family, names in BY_BETAS.items():
        for setting, group in sweeps.items():
            cells = [group[name].lowest if name in group else None for name in names.values()]
            if sum(x is not None for x in cells) > 2:
                lines.append([family, f"{setting}, best rates", *marked(cells)])
        groups = {x: g for x, g in sweeps.items() if all(name in g for name in names.values())}
        if groups:
            lowest = {x: min(g[name].lowest for name in names.values()) for x, g in groups.items()}
            worst = [
                max(g[name].lowest - lowest[x] for x, g in groups.items())
                for name in names.values()
            ]
            lines.append([family, "worst regret, best rates", *marked(worst)])
            single = [one_rate_regret(groups, name, lowest) for name in names.values()]
            lines.append([family, "worst regret, one rate", *marked(single)])
    caption = (
        "Validation loss, nats a digit, of settings with three betas or more; bold: the lowest of "
        "a row; -: not run. Regret: loss less the lowest of the method in the setting, for "
        "settings with all betas; one rate: the one whose worst regret is least."
    )
    heads = next(iter(BY_BETAS.values()))
    return captioned(caption, ["method", "", *map(str, heads)], lines)


def marked(values: Sequence[float | None]) -> list[str]:
    """Numbers, the lowest in bold; a dash where there is none."""
    low = min((x for x in values if x is not None), default=None)
    return ["-" if x is None else f"**{x:.4f}**" if x == low else f"{x:.4f}" for x in values]


def one_rate_regret(
    groups: Mapping[Setting, Mapping[str, Sweep]], name: str, lowest: Mapping[Setting, float]
) -> float | None:
    """The least worst regret of a method with one rate in all settings; None if none was run."""
    worst = [
        max(group[name].losses[lr] - lowest[x] for x, group in groups.items())
        for lr in common_rates(group[name] for group in groups.values())
    ]
    return min(worst, default=None)


def clipping(sweeps: Sweeps) -> list[str]:
    """Losses by learning rate of methods without and with a trust region."""
    main = main_settings(sweeps)
    groups = [
        (setting, name, group[name])
        for setting, group in sweeps.items()
        if setting in main or DATASETS[setting.dataset].base != "small"
        for usual, clipped in CLIPPED.items()
        if usual in group and any(name in group for name in clipped)
        for name in (usual, *clipped)
        if name in group
    ]
    rates = METHODS["scaled-clipped"].rates
    rows = [
        [
            *(str(setting), f"`{name}`"),
            *(f"{sweep.losses[lr]:.3f}" if lr in sweep.losses else "-" for lr in rates),
        ]
        for setting, name, sweep in groups
    ]
    caption = (
        f"Validation loss, nats a digit, by learning rate; -: not run. Clipped: no step moves the "
        f"entries of s B A by more than {100 * SHARE:g} % of those of W0, or the share in the "
        f"name, in the root mean square."
    )
    return captioned(caption, ["setting", "method", *(f"{lr:.2g}" for lr in rates)], rows)

"""Tables of the study of strings: seed by seed, away from the best rate, and by betas."""

from collections.abc import Mapping, Sequence
from statistics import mean, median, stdev
from typing import Final

from .plan import Record
from .stacks import BY_BETAS, METHODS
from .sweeps import (
    GUESSING,
    Setting,
    Sweep,
    Sweeps,
    baseline,
    setting_of,
    sorted_settings,
    sweeps_of,
    table,
)

QUANTILES: Final = (12.71, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)
"""Quantiles of Student's t, 97.5 %, for 1, 2, ... degrees of freedom."""


def paired(rows: Sequence[Record]) -> list[str]:
    """Differences of test losses to the baseline, each method at its best rate, on equal seeds."""
    found: dict[Setting, dict[str, dict[int, Record]]] = {}
    for row in rows:
        if row["tested"]:
            group = found.setdefault(setting_of(row), {})
            group.setdefault(row["method"], {})[row["seed"]] = row
    lines, sweeps = [], sweeps_of(rows)
    for setting in sorted_settings(found):
        group = found[setting]
        base = baseline({name: sweeps[setting][name] for name in group})
        for name in [x for x in METHODS if x in group and base]:
            mine, theirs = group[name], group[base or name]
            seeds = sorted(mine.keys() & theirs.keys())
            gains = [tested(mine[k], "loss") - tested(theirs[k], "loss") for k in seeds]
            lines.append(
                [
                    *(str(setting), f"`{name}`", f"{mine[seeds[0]]['lr']:.2g}"),
                    f"{mean(tested(mine[k], 'loss') for k in seeds):.4f}",
                    "-" if name == base else interval(gains),
                    f"{100 * mean(tested(mine[k], 'exact') for k in seeds):.1f} %",
                    str(len(seeds)),
                ]
            )
    caption = (
        "Test loss, nats a digit, at the rate that another seed chose; difference: less that of "
        "AdamW with the betas that the other seed chose (-) on the same seeds, with a 95 % "
        "interval of Student's t."
    )
    head = ["setting", "method", "rate", "test loss", "difference", "exact", "seeds"]
    return table(caption, head, lines) if lines else []


def tested(row: Record, name: str) -> float:
    """A score on the test part; that of guessing if the run diverged or is worse."""
    if name == "loss":
        return min(float(row.get("test", {name: GUESSING})[name]), GUESSING)
    return float(row.get("test", {name: 0.0})[name])


def interval(values: Sequence[float]) -> str:
    """Mean with a 95 % interval, as "-0.010 (-0.012 to -0.008)"."""
    if len(values) == 1:
        return f"{values[0]:+.4f}"
    half = QUANTILES[len(values) - 2] * stdev(values) / len(values) ** 0.5
    center = mean(values)
    return f"{center:+.4f} ({center - half:+.4f} to {center + half:+.4f})"


AWAY: Final = (1 / 4, 1 / 2, 1.0, 2.0, 4.0)
"""Multiples of the best rate."""

GOOD: Final = 0.05
"""Share of exact answers that a good rate may lose against the best method of the setting."""


def away(sweeps: Sweeps) -> list[str]:
    """Widths of the ranges of good rates, and exact answers at multiples of the best rate."""
    lines = []
    for name in METHODS:
        groups = [group for group in sweeps.values() if name in group and baseline(group)]
        if groups:
            mine = [group[name] for group in groups]
            widths = [width(group[name], best_share(group) - GOOD) for group in groups]
            means = [share_away(mine, factor) for factor in AWAY]
            lines.append([f"`{name}`", str(len(mine)), f"{median(widths):.0f}x", *means])
    caption = (
        f"Good rates give exact answers at most {100 * GOOD:.0f} points below the best of all "
        f"methods in the setting; the highest over the lowest, as far as rates were run, is 1 for "
        f"a single one and 0 for none. Exact answers at multiples of the best rate of each "
        f"setting, averaged over settings; in brackets the number of settings in which that rate "
        f"was run, if not all."
    )
    head = [f"{'1/' if x < 1 else ''}{max(x, 1 / x):.0f} of the best" for x in AWAY]
    head = ["method", "settings", "good rates, median", *head]
    return table(caption, head, lines) if lines else []


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
        if abs(lr / (factor * sweep.best) - 1) < 1e-6  # the same but for rounding
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
            if sum(x is not None for x in cells) > 1:
                lines.append([family, f"{setting}, best rates", *marked(cells)])
        groups = {x: g for x, g in sweeps.items() if all(name in g for name in names.values())}
        if groups:
            lowest = {x: min(g[name].lowest for name in names.values()) for x, g in groups.items()}
            worst = [
                max(g[name].lowest - lowest[x] for x, g in groups.items())
                for name in names.values()
            ]
            lines.append([family, "worst regret, best rates", *marked(worst)])
            worst = [one_rate_regret(groups, name, lowest) for name in names.values()]
            lines.append([family, "worst regret, one rate", *marked(worst)])
    caption = (
        "Validation loss, nats a digit; bold: the lowest of a row; -: not run. Regret: loss less "
        "the lowest of the method in the setting, for settings with all betas; one rate: the one "
        "whose worst regret is least."
    )
    heads = next(iter(BY_BETAS.values()))
    return table(caption, ["method", "", *map(str, heads)], lines) if lines else []


def marked(values: Sequence[float | None]) -> list[str]:
    """Numbers, the lowest in bold; a dash where there is none."""
    low = min(x for x in values if x is not None)
    return ["-" if x is None else f"**{x:.4f}**" if x == low else f"{x:.4f}" for x in values]


def one_rate_regret(
    groups: Mapping[Setting, Mapping[str, Sweep]], name: str, lowest: Mapping[Setting, float]
) -> float:
    """The least worst regret of a method that has the same rate in all settings."""
    tried = set.intersection(*(set(group[name].losses) for group in groups.values()))
    return min(
        max(group[name].losses[lr] - lowest[x] for x, group in groups.items()) for lr in tried
    )

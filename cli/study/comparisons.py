"""Tables of the study of strings: seed by seed, away from the best rate, and by betas."""

from collections.abc import Iterable, Mapping, Sequence
from itertools import zip_longest
from statistics import mean, median, stdev
from typing import Final, NamedTuple

from .csv_tables import Row
from .plan import Record
from .stacked_methods import BY_BETAS, METHODS
from .sweeps import GUESSING, Setting, Sweep, Sweeps, common_rates, compared, setting_of

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


def test_losses(sweeps: Sweeps, rows: Iterable[Record]) -> list[Row]:
    """Test losses of each setting, less those of the baseline on the same seeds."""
    return [
        {
            **x.setting._asdict(),
            "method": x.name,
            "learning rate": f"{x.rate:g}",
            "test loss [nats/digit]": f"{mean(tested(row, 'loss') for row in x.mine):.4f}",
            **interval([] if x.mine == x.theirs else x.differences()),
            "exact [%]": f"{100 * mean(tested(row, 'exact') for row in x.mine):.1f}",
            "seeds": len(x.mine),
        }
        for x in pairs_of_runs(sweeps, rows)
    ]


def test_wins(sweeps: Sweeps, rows: Iterable[Record]) -> list[Row]:
    """Numbers of settings in which a method is better, or worse, than the baseline on test."""
    made = pairs_of_runs(sweeps, rows)
    lines: list[Row] = []
    for name in METHODS:
        mine = [x for x in made if x.name == name and len(x.mine) > 1]
        if mine:
            bounds = [limits(x.differences()) for x in mine]
            exact = mean(mean(x.differences("exact")) for x in mine)
            lines.append(
                {
                    "method": name,
                    "settings": len(mine),
                    "better": sum(high < 0 for _, high in bounds),
                    "worse": sum(low > 0 for low, _ in bounds),
                    "difference [nats/digit]": f"{mean(mean(x.differences()) for x in mine):+.3f}",
                    "difference, exact [points]": f"{100 * exact:+.1f}",
                }
            )
    return lines


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


def interval(values: Sequence[float]) -> dict[str, str]:
    """Cells of the mean difference and of its 95 % interval, which a single seed does not have."""
    found = [mean(values)] if values else []
    if len(values) > 1:
        found += limits(values)
    heads = ("difference [nats/digit]", "from [nats/digit]", "to [nats/digit]")
    return {head: "" if x is None else f"{x:+.4f}" for head, x in zip_longest(heads, found)}


AWAY: Final = (1 / 4, 1 / 2, 1.0, 2.0, 4.0)
"""Multiples of the best rate."""

LOST: Final = 0.05
"""Share of exact answers that a good rate may lose against the best method of the setting."""


def good_rates(sweeps: Sweeps) -> list[Row]:
    """Widths of the ranges of good rates, and exact answers at multiples of the best rate."""
    lines: list[Row] = []
    for name in METHODS:
        groups = [sweeps[x] for x in compared(sweeps) if name in sweeps[x]]
        if groups:
            widths = [width(group[name], best_share(group) - LOST) for group in groups]
            row: Row = {"method": name, "settings": len(groups)}
            row["median of highest / lowest good rate"] = f"{median(widths):.0f}"
            for factor in AWAY:
                shares = shares_away([group[name] for group in groups], factor)
                at = f"at {factor:g} x best rate"
                row[f"exact {at} [%]"] = f"{100 * mean(shares):.0f}" if shares else ""
                row[f"settings {at}"] = len(shares)
            lines.append(row)
    return lines


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


def shares_away(sweeps: Iterable[Sweep], factor: float) -> list[float]:
    """Exact answers at a multiple of each sweep's best rate, where it was run."""
    return [
        share
        for sweep in sweeps
        for lr, share in sweep.exact.items()
        if lr == factor * sweep.best  # exact: factors are powers of two
    ]


def beta_regrets(sweeps: Sweeps) -> list[Row]:
    """Worst regrets by betas, at the best rate of each and at one rate for all settings."""
    lines: list[Row] = []
    for names in BY_BETAS:
        groups = {x: g for x, g in sweeps.items() if all(name in g for name in names)}
        lowest = {x: min(g[name].lowest for name in names) for x, g in groups.items()}
        for name in names if groups else ():
            worst = max(g[name].lowest - lowest[x] for x, g in groups.items())
            single = one_rate_regret(groups, name, lowest)
            at_one_rate = "" if single is None else f"{single:.4f}"
            lines.append(
                {
                    "method": name,
                    "settings": len(groups),
                    "worst regret, best rates [nats/digit]": f"{worst:.4f}",
                    "worst regret, one rate [nats/digit]": at_one_rate,
                }
            )
    return lines


def one_rate_regret(
    groups: Mapping[Setting, Mapping[str, Sweep]], name: str, lowest: Mapping[Setting, float]
) -> float | None:
    """The least worst regret of a method with one rate in all settings; None if none was run."""
    worst = [
        max(group[name].losses[lr] - lowest[x] for x, group in groups.items())
        for lr in common_rates(group[name] for group in groups.values())
    ]
    return min(worst, default=None)

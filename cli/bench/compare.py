"""``rlora bench compare``: what has become faster or slower between two records."""

import statistics
from pathlib import Path
from typing import Any, NamedTuple

import click

from rlora.cli.chart import Interval
from rlora.cli.console import console

from .join import problem, setups
from .schema import Row, read_record
from .stats import FEWEST, quotient_interval, round_ratios
from .table import print_rows

REGRESSED = 1
"""Exit code."""


class Change(NamedTuple):
    """One row of both records, or of one."""

    row: Row
    of: str
    """Quantity compared: "ratio" to the baseline, or "time"."""

    quotient: float | None
    interval: Interval | None
    verdict: str


@click.command()
@click.argument("old", type=Path)
@click.argument("new", type=Path)
@click.option("--threshold", type=float, default=0.10, show_default=True, help="What is tolerated.")
def compare(old: Path, new: Path, threshold: float) -> int:
    """Compare the records OLD and NEW row by row.

    The exit code is 1 if any row became slower: if the whole interval of new over old lies above
    1 + threshold (bootstrap; 95 %, of the three samples of --quick about 90 %).
    """
    if not 0 <= threshold < float("inf"):
        msg = f"--threshold must be a number from 0 up, got {threshold}"
        raise ValueError(msg)
    before, after = read_record(old), read_record(new)
    found = changes(before, after, threshold)
    if not any(change.quotient for change in found):
        msg = f"{old.name} and {new.name} have no row in common"
        raise ValueError(msg)
    keep, texts = ("method", "on", "rank", "new/old", "verdict"), ("method", "on", "of", "verdict")
    print_rows(None, list(map(_cells, found)), console(), keep=keep, texts=texts)
    if any(setups([before, after])):
        click.echo("Ratios differ for that too: two machines, or two numbers of threads.")
    return REGRESSED if any(change.verdict == "slower" for change in found) else 0


def changes(old: dict[str, Any], new: dict[str, Any], threshold: float) -> list[Change]:
    """Compare two records: the rows of the new one, then those that only the old one has."""
    before, after = _by_key(old), _by_key(new)
    # In a record a backend has one device.
    both = {x for x in before.keys() & after.keys() if before[x]["device"] == after[x]["device"]}
    return [
        _change(key, before, after, threshold)
        if key in both
        else Change(row, "-", None, None, "only in new")
        for key, row in after.items()
    ] + [
        Change(row, "-", None, None, "only in old")
        for key, row in before.items()
        if key not in both
    ]


def _by_key(record: dict[str, Any]) -> dict[Any, Row]:
    return {_key(row, row["backend"], row["method"]): row for row in record["rows"]}


def _key(row: Row, backend: str, method: str) -> Any:
    return backend, method, *problem(row)


def _change(key: Any, before: dict[Any, Row], after: dict[Any, Row], threshold: float) -> Change:
    row = after[key]
    pair = [(before[key], before), (row, after)]
    samples, of = [_ratios(x, rows) for x, rows in pair], "ratio"
    plain = row["method"] == row["ratio_to"]
    baselines = {(x["ratio_to_backend"], x["ratio_to"]) for x, _ in pair}
    if plain or len(baselines) > 1 or not all(samples):
        samples, of = [x["samples_s"] for x, _ in pair], "time"
    medians = [statistics.median(x) for x in samples]
    interval = quotient_interval(samples[1], samples[0])
    # Time tells machines apart as well as code: the baseline is there to be divided by.
    verdict = "baseline" if plain else _verdict(interval, threshold)
    if min(map(len, samples)) < FEWEST:
        verdict = "too few samples"
    return Change(row, of, medians[1] / medians[0], interval, verdict)


def _ratios(row: Row, rows: dict[Any, Row]) -> list[float]:
    plain = rows.get(_key(row, row["ratio_to_backend"], row["ratio_to"]))
    return round_ratios(row["samples_s"], plain["samples_s"]) if plain else []


def _verdict(interval: Interval, threshold: float) -> str:
    if interval[0] > 1 + threshold:
        return "slower"
    return "faster" if interval[1] < 1 / (1 + threshold) else "same"


def _cells(change: Change) -> dict[str, str]:
    row, quotient, interval = change.row, change.quotient, change.interval
    return {
        "method": row["method"],
        "on": f"{row['backend']} {row['device']}",
        "rank": str(row["rank"]),
        "of": change.of,
        "new/old": "-" if quotient is None else f"{quotient:.2f}",
        "interval": "-" if interval is None else f"{interval[0]:.2f}-{interval[1]:.2f}",
        "verdict": change.verdict,
    }

"""Tables of a benchmark, for a terminal; ``rlora bench show``."""

from collections.abc import Callable, Mapping, Sequence
from itertools import groupby
from operator import itemgetter
from pathlib import Path
from typing import Any, Final, NamedTuple

import click
from rich.console import Console
from rich.table import Table
from rich.text import Text

from rlora.cli.console import console, fitted
from rlora.pairing.report import number_of

from .problem import TOKENS
from .schema import Record, Row, read_record

KEEP = ("method", "on", "rank", "ratio")
"""Columns of a table at any width."""

ORDER = (
    *("step", "verdict", "spread", "state", "peak temporary", "interval", "of training"),
    *("to", "operations", "first", "compile", "samples", "model", "of roofline"),
)
"""Other columns; where not all fit, the last are left out first."""

TEXTS = ("method", "on", "to", "verdict")

SIGNS = {"at most": "<=", "at least": ">=", "exactly": "=="}
EXACT = 1000
"""From here on a figure counts something."""

NOTES = {
    "step": "step: median.",
    "spread": "spread: interquartile range / median.",
    "ratio": "ratio: step / step of the baseline (plain AdamW or SGD) in the same round, median "
    "over the rounds.",
    "interval": "interval: of the ratio, 95 %.",
    "first": "first: the first step, after compiling.",
    "peak temporary": "peak (temporary): most bytes held at once in a step that were not "
    "before it.",
    "operations": "operations: handed to torch's dispatcher in a step.",
    "model": "model: the least time for the bytes and flops of the method at the peaks below.",
    "of roofline": "of roofline: model / step, above 100 % where arrays fit a cache.",
    "of training": f"of training: step / (step + forward + backward, {TOKENS} tokens).",
}
"""The meaning of columns; printed for those that are there."""


@click.command()
@click.argument("record", type=Path)
def show(record: Path) -> None:
    """Print the table of RECORD again."""
    show_record(read_record(record), console())


def show_record(record: Record, out: Console) -> None:
    """Print the rows of a record, a table for each preset, and the verdicts of a suite."""
    partial = ", interrupted" if record["partial"] else ""
    dtype = record["command"]["dtype"]
    for where, group in groupby(record["rows"], lambda row: row["preset"] or row["adapter"]):
        rows = list(group)
        show_rows(f"{where}: {number_of(rows[0]['pairs'], 'pair')}, {dtype}{partial}", rows, out)
    for peak in record["peaks"]:
        rates = f"{size(round(peak['bytes_per_s']))}/s, {peak['flops_per_s'] / 1e9:.3g} Gflop/s"
        out.print(Text(f"peak of {peak['backend']} {peak['device']}: {rates}"))
    if record["checks"]:
        out.print(_verdicts(record["checks"], out))
        passed = sum(check["passed"] for check in record["checks"])
        unsure = sum(not check["stable"] for check in record["checks"])
        note = f"; {unsure}, with a ?, by rows that are unstable" if unsure else ""
        out.print(Text(f"{passed} of {number_of(len(record['checks']), 'target')} reached{note}"))


def _verdicts(checks: Sequence[dict[str, Any]], out: Console) -> Table:
    lines = [
        {
            "": ("PASS" if check["passed"] else "FAIL") + "?" * (not check["stable"]),
            "what": check["what"],
            "preset": check["preset"],
            "rank": "-" if check["rank"] is None else str(check["rank"]),
            "limit": f"{SIGNS[check['sense']]} {figure(check['limit'])}",
            "measured": figure(check["measured"]),
            "goal": "" if check["goal"] is None else figure(check["goal"]),
        }
        for check in checks
    ]
    keep, texts = ("", "what", "preset", "rank"), ("what", "preset", "limit")
    return fitted(None, lines, out, keep=keep, texts=texts, order=("measured", "limit"))


def figure(value: float) -> str:
    """A ratio to two digits behind the point, a number of bytes whole."""
    return f"{value:.2f}" if value < EXACT else f"{value:.0f}"


def show_rows(title: str, rows: Sequence[Row], out: Console) -> None:
    """Print the rows as a table, and under it the meaning of its columns."""
    found = [{**cells(row), "verdict": row["verdict"].partition(":")[0]} for row in rows]
    lines = [{name: line[name] for name in filled(found)} for line in found]
    table = print_rows(title, lines, out, keep=KEEP, texts=TEXTS, order=ORDER, section="rank")
    shown = [str(column.header) for column in table.columns]
    notes = [note for name, note in NOTES.items() if name in shown]
    for note in (*notes, *filter(None, (instability(rows),))):
        out.print(Text(note))


def print_rows(
    title: str | None,
    lines: Sequence[Mapping[str, str]],
    out: Console,
    *,
    keep: Sequence[str],
    order: Sequence[str] = (),
    **options: Any,
) -> Table:
    """Print a table whose `on` may be left out where all rows are on one, which is then said."""
    places = {line["on"] for line in lines}
    if len(places) == 1:
        keep, order = [name for name in keep if name != "on"], ("on", *order)
    table = fitted(title, lines, out, keep=keep, order=order, **options)
    out.print(table)
    if "on" not in [column.header for column in table.columns]:
        out.print(Text(f"all rows: on {places.pop()}."))
    return table


def instability(rows: Sequence[Row]) -> str | None:
    """Say once for all rows why they are unstable and what to do; None if none is."""
    advice: dict[str, list[str]] = {}
    for row in rows:
        word, _, why = row["verdict"].partition(": ")
        if word != "ok":
            reason, _, hint = why.partition("; ")
            advice.setdefault(hint, []).append(reason)
    if not advice:
        return None
    said = [
        f"{len(reasons)} of {number_of(len(rows), 'row')}, "
        f"{'for example ' if len(set(reasons)) > 1 else ''}{reasons[0]} ({hint})"
        for hint, reasons in advice.items()
    ]
    return f"unstable: {'; '.join(said)}."


def filled(lines: Sequence[Mapping[str, str]]) -> list[str]:
    """List the columns in which any line has something."""
    return [name for name in lines[0] if any(x[name] != "-" for x in lines)]


ROUNDED: Final = 0.9995
"""The least part of a unit that three digits round up to it."""


def seconds(value: float) -> str:
    """Say a time in the unit that suits it, three digits."""
    if value >= 1e3 * ROUNDED:
        return f"{value:.0f} s"
    for factor, unit in ((1.0, "s"), (1e3, "ms")):
        if value * factor >= ROUNDED:
            return f"{value * factor:.3g} {unit}"
    return f"{value * 1e6:.3g} us"


def size(value: int | None) -> str:
    """Bytes in the decimal unit that suits them, three digits."""
    if value is None:
        return "-"
    for factor, unit in ((1e12, "TB"), (1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if value >= factor * ROUNDED:
            return f"{value / factor:.3g} {unit}"
    return f"{value} B"


class Column(NamedTuple):
    """A column: its value in a row, None where that was not measured, and how it is written."""

    value: Callable[[Row], Any]
    write: Callable[[Any], str] = str


def _ratio_to(row: Row) -> str:
    to, backend = str(row["ratio_to"]), row["ratio_to_backend"]
    return to if backend == row["backend"] else f"{to} on {backend}"


def _of_roofline(row: Row) -> float | None:
    return None if row["model_s"] is None else float(row["model_s"] / row["median_s"])


def _of_training(row: Row) -> float | None:
    step, rest = row["median_s"], row["forward_backward_s"]
    return None if rest is None else float(step / (step + rest))


def _span(ranks: int | list[int]) -> str:
    return f"{ranks[0]}-{ranks[-1]}" if isinstance(ranks, list) else str(ranks)


COLUMNS: Final[Mapping[str, Column]] = {
    "method": Column(itemgetter("method")),
    "on": Column("{0[backend]} {0[device]}".format),
    "rank": Column(itemgetter("rank"), _span),
    "samples": Column(lambda row: len(row["samples_s"])),
    "step": Column(itemgetter("median_s"), seconds),
    "spread": Column(itemgetter("spread"), "{:.0%}".format),
    "ratio": Column(itemgetter("ratio"), "{:.2f}".format),
    "interval": Column(itemgetter("ratio_interval"), "{0[0]:.2f}-{0[1]:.2f}".format),
    "to": Column(_ratio_to),
    "compile": Column(itemgetter("compile_s"), seconds),
    "first": Column(itemgetter("first_call_s"), seconds),
    "state": Column(itemgetter("state_bytes"), size),
    "peak temporary": Column(itemgetter("peak_temporary_bytes"), size),
    "operations": Column(itemgetter("operations")),
    "model": Column(itemgetter("model_s"), seconds),
    "of roofline": Column(_of_roofline, "{:.0%}".format),
    "of training": Column(_of_training, "{:.1%}".format),
    "verdict": Column(itemgetter("verdict")),
}


def cells(row: Row) -> dict[str, str]:
    """One row as text, by column; "-" for what was not measured."""
    values = {name: column.value(row) for name, column in COLUMNS.items()}
    return {
        name: "-" if value is None else COLUMNS[name].write(value) for name, value in values.items()
    }

"""What a person sees of a benchmark."""

from collections.abc import Sequence
from itertools import groupby
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text

PIPED_WIDTH = 280
"""Columns where there is no terminal: enough that nothing is ever cut."""

NARROW = ("method", "rank", "step", "spread", "ratio", "state", "peak", "verdict")
"""The columns for a terminal on which not all of them fit."""

SIGNS = {"at most": "<=", "at least": ">=", "exactly": "=="}
EXACT = 1000
"""From here on a figure counts something."""

NOTES = {
    "step": "step: median; spread: interquartile range / median.",
    "ratio": "ratio: median over the rounds of the step against the plain method's in the same "
    "round; interval: of that median, 95 %.",
    "first": "first: the first step, after compiling.",
    "peak temporary": "peak (temporary): most bytes held at once in a step that were not "
    "before it.",
    "operations": "operations: handed to torch's dispatcher in a step.",
    "model": "model: the least time for the bytes and flops of the method at the peaks below; of "
    "roofline: that over the step, above 100 % where arrays fit a cache.",
    "of training": "of training: step / (step + forward + backward of these layers, 128 tokens).",
}
"""What columns mean; said of those that are there."""


def console() -> Console:
    """Open standard output, as wide as the terminal, or wide enough."""
    out = Console(highlight=False)
    return out if out.is_terminal else Console(highlight=False, width=PIPED_WIDTH)


def show_record(record: dict[str, Any], out: Console) -> None:
    """Print the rows of a record, a table for each preset, and the verdicts of a suite."""
    if not record["rows"]:
        out.print(Text("no rows: it was interrupted before the first round"))
    partial = ", interrupted" if record["partial"] else ""
    dtype = record["command"]["dtype"]
    for where, group in groupby(record["rows"], lambda row: row["preset"] or row["adapter"]):
        rows = list(group)
        show(f"{where}: {rows[0]['pairs']} pairs, {dtype}{partial}", rows, out)
    for peak in record["peaks"]:
        rates = f"{size(round(peak['bytes_per_s']))}/s, {peak['flops_per_s'] / 1e9:.3g} Gflop/s"
        out.print(Text(f"peak of {peak['backend']} {peak['device']}: {rates}"))
    if record["checks"]:
        out.print(_verdicts(record["checks"]))
        passed = sum(check["passed"] for check in record["checks"])
        unsure = sum(not check.get("stable", True) for check in record["checks"])
        note = f"; {unsure}, with a ?, by rows that are unstable" if unsure else ""
        out.print(Text(f"{passed} of {len(record['checks'])} targets reached{note}"))


def _verdicts(checks: Sequence[dict[str, Any]]) -> Table:
    names = ("", "what", "preset", "rank", "limit", "measured")
    table = Table(*names, box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for check in checks:
        verdict = ("PASS" if check["passed"] else "FAIL") + "?" * (not check.get("stable", True))
        rank = "-" if check["rank"] is None else str(check["rank"])
        numbers = (f"{SIGNS[check['sense']]} {figure(check['limit'])}", figure(check["measured"]))
        table.add_row(*map(Text, (verdict, check["what"], check["preset"], rank, *numbers)))
    return table


def figure(value: float) -> str:
    """A ratio to two digits behind the point, a number of bytes whole."""
    return f"{value:.2f}" if value < EXACT else f"{value:.0f}"


def show(title: str, rows: Sequence[dict[str, Any]], out: Console) -> None:
    """Print the rows as a table, and under it what its columns mean."""
    lines, reasons = _without_empty([cells(row) for row in rows]), []
    table = _table(title, lines)
    unbounded = out.options.update(width=PIPED_WIDTH)
    if out.measure(table, options=unbounded).maximum > out.width:
        # The verdicts go under the table: only their first word stays in it.
        reasons = [
            f"{line['method']}, rank {line['rank']}: {line['verdict']}"
            for line in lines
            if line["verdict"] != "ok"
        ]
        table = _table(title, [_narrow(line) for line in lines])
    out.print(table)
    for note in (*reasons, *(note for name, note in NOTES.items() if name in lines[0])):
        out.print(Text(note))


def _table(title: str, lines: Sequence[dict[str, str]]) -> Table:
    table = Table(box=SIMPLE_HEAD, title=Text(title), title_justify="left", title_style="bold")
    table.padding = (0, 1, 0, 0)
    for name in lines[0]:
        text = name in ("method", "on", "to", "verdict")
        table.add_column(name, justify="left" if text else "right", no_wrap=True)
    for before, line in zip([lines[0], *lines], lines, strict=False):
        if before["rank"] != line["rank"]:
            table.add_section()
        table.add_row(*map(Text, line.values()))
    return table


def _without_empty(lines: list[dict[str, str]]) -> list[dict[str, str]]:
    kept = [name for name in lines[0] if any(line[name] != "-" for line in lines)]
    return [{name: line[name] for name in kept} for line in lines]


def _narrow(line: dict[str, str]) -> dict[str, str]:
    short = {"peak": line.get("peak temporary", "-"), "verdict": line["verdict"].partition(":")[0]}
    return {name: {**line, **short}.get(name, "-") for name in NARROW}


def cells(row: dict[str, Any]) -> dict[str, str]:
    """One row as text, by column."""
    rank, home = row["rank"], row["ratio_to_backend"]
    interval, operations = row["ratio_interval"], row["operations"]
    model, rest = row["model_s"], row["forward_backward_s"]
    return {
        "method": row["method"],
        "on": f"{row['backend']} {row['device']}",
        "rank": f"{rank[0]}-{rank[-1]}" if isinstance(rank, list) else str(rank),
        "samples": str(len(row["samples_s"])),
        "step": seconds(row["median_s"]),
        "spread": "-" if row["spread"] is None else f"{row['spread']:.0%}",
        "ratio": "-" if row["ratio"] is None else f"{row['ratio']:.2f}",
        "interval": "-" if interval is None else f"{interval[0]:.2f}-{interval[1]:.2f}",
        "to": row["ratio_to"] if home == row["backend"] else f"{row['ratio_to']} on {home}",
        "compile": "-" if row["compile_s"] is None else seconds(row["compile_s"]),
        "first": seconds(row["first_call_s"]),
        "state": size(row["state_bytes"]),
        "peak temporary": size(row["peak_temporary_bytes"]),
        "operations": "-" if operations is None else str(operations),
        "model": "-" if model is None else seconds(model),
        "of roofline": "-" if model is None else f"{model / row['median_s']:.0%}",
        "of training": "-" if rest is None else f"{row['median_s'] / (row['median_s'] + rest):.1%}",
        "verdict": row["verdict"],
    }


def seconds(value: float) -> str:
    """Say a time in the unit that suits it, three digits."""
    for factor, unit in ((1.0, "s"), (1e3, "ms")):
        if value * factor >= 1:
            return f"{value * factor:.3g} {unit}" if value * factor < 1e3 else f"{value:.0f} s"
    return f"{value * 1e6:.3g} us"


def size(value: int | None) -> str:
    """Bytes in the decimal unit that suits them, three digits."""
    if value is None:
        return "-"
    for factor, unit in ((1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if value >= factor:
            return f"{value / factor:.3g} {unit}"
    return f"{value} B"

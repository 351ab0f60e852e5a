"""What a person sees of a benchmark."""

from collections.abc import Sequence
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text

PIPED_WIDTH = 250
"""Columns where there is no terminal: enough that nothing is ever cut."""

NARROW = ("method", "rank", "step", "spread", "ratio", "state", "peak", "verdict")
"""The columns for a terminal on which not all of them fit."""

NOTES = (
    "step: median; spread: interquartile range / median.",
    "ratio: median over the rounds of the step against the plain method's in the same round.",
    "peak (temporary): most bytes held at once in a step that were not before it.",
)


def console() -> Console:
    """Open standard output, as wide as the terminal, or wide enough."""
    out = Console(highlight=False)
    return out if out.is_terminal else Console(highlight=False, width=PIPED_WIDTH)


def show(title: str, rows: Sequence[dict[str, Any]], out: Console) -> None:
    """Print the rows as a table, and under it what its columns mean."""
    lines, reasons = [cells(row) for row in rows], []
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
    for note in (*reasons, *NOTES):
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


def _narrow(line: dict[str, str]) -> dict[str, str]:
    short = {"peak": line["peak temporary"], "verdict": line["verdict"].partition(":")[0]}
    return {name: {**line, **short}[name] for name in NARROW}


def cells(row: dict[str, Any]) -> dict[str, str]:
    """One row as text, by column."""
    rank = row["rank"]
    return {
        "method": row["method"],
        "on": f"{row['backend']} {row['device']}",
        "rank": f"{rank[0]}-{rank[-1]}" if isinstance(rank, list) else str(rank),
        "samples": str(len(row["samples_s"])),
        "step": seconds(row["median_s"]),
        "spread": "-" if row["spread"] is None else f"{row['spread']:.0%}",
        "ratio": "-" if row["ratio"] is None else f"{row['ratio']:.2f}",
        "to": row["ratio_to"],
        "state": size(row["state_bytes"]),
        "peak temporary": size(row["peak_temporary_bytes"]),
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

"""Standard output and stderr: tables that fit a terminal, progress bars, messages on one line."""

import importlib
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from types import ModuleType
from typing import Any

import click
from rich.box import SIMPLE_HEAD
from rich.console import Console, JustifyMethod
from rich.markup import escape
from rich.progress import Progress
from rich.table import Table
from rich.text import Text

PIPED_WIDTH = 280
"""Columns where there is no terminal: enough that nothing is ever cut."""


def console(*, stderr: bool = False) -> Console:
    """Open standard output, or stderr, as wide as the terminal, or wide enough.

    What stands in brackets or between colons is text: names of files and of layers have both.
    """
    made = partial(Console, stderr=stderr, highlight=False, markup=False, emoji=False)
    out = made()
    return out if out.is_terminal else made(width=PIPED_WIDTH)


def escape_unencodable() -> None:
    r"""Let streams of a narrow encoding print \u2265 where they would fail: a table is no error."""
    for stream in (sys.stdout, sys.stderr):
        encoding = (getattr(stream, "encoding", None) or "").lower()
        reconfigure = getattr(stream, "reconfigure", None)
        if reconfigure is not None and not encoding.startswith("utf"):
            reconfigure(errors="backslashreplace")


def one_line(message: str) -> str:
    """Strip a message of line breaks, and of the control codes a file name may carry."""
    parts = [part.strip() for part in message.splitlines() if part.strip()]
    flat = "; ".join(parts).replace(":; ", ": ").replace(",; ", ", ")  # lists of click
    return printable(flat)


def printable(text: str) -> str:
    r"""Write control codes, which could steer a terminal, out as \x1b; line breaks likewise."""
    return "".join(c if c.isprintable() else f"\\x{ord(c):02x}" for c in text)


def text_table(
    *heads: str,
    rows: Iterable[Iterable[str]] = (),
    title: str | None = None,
    wrap_first: bool = False,
) -> Table:
    """Make a table of text, whose cells wrap and are never cut; the first are names, and whole."""
    table = Table(box=SIMPLE_HEAD, title=None if title is None else Text(title))
    table.title_justify, table.title_style = "left", "bold"
    for i, head in enumerate(heads):
        table.add_column(head, overflow="fold", no_wrap=i == 0 and not wrap_first)
    for row in rows:
        table.add_row(*map(Text, row))
    return table


def fitted(
    title: str | None,
    lines: Sequence[Mapping[str, str]],
    out: Console,
    *,
    keep: Sequence[str],
    texts: Sequence[str],
    order: Sequence[str] = (),
    section: str | None = None,
) -> Table:
    """Make a table of as many columns as fit; numbers are never cut.

    Each line has text by column. The columns of `keep` stay at any width; the last of `order`, then
    of the others, go first. Those of `texts` are to the left, and wrap when even what is kept does
    not fit. A line is left free where the column `section` changes.
    """
    names = list(lines[0])
    ranked = [name for name in dict.fromkeys((*keep, *order, *names)) if name in names]
    least = sum(name in keep for name in names)
    unbounded = out.options.update(width=sys.maxsize)
    for count in range(len(ranked), least - 1, -1):
        table = text_table(title=title)
        table.padding = (0, 1, 0, 0)
        shown = [name for name in names if name in ranked[:count]]
        for name in shown:
            text = name in texts
            side: JustifyMethod = "left" if text else "right"
            table.add_column(name, justify=side, no_wrap=not text, overflow="fold")
        for line, after in zip(lines, (*lines[1:], lines[-1]), strict=True):
            ends = section is not None and line[section] != after[section]
            table.add_row(*(Text(line[name]) for name in shown), end_section=ends)
        if out.measure(table, options=unbounded).maximum <= out.width:
            break
    return table


@contextmanager
def progress(label: str, total: int, *, log: bool = False) -> Iterator[Any]:
    """Show a bar on a terminal's stderr, drawn between rounds only: a thread would disturb them.

    Elsewhere one line says where it is, if a log is wanted.
    """
    stderr = Console(stderr=True)
    if log and not stderr.is_terminal:
        click.echo(label, err=True)
    with Progress(
        console=stderr, auto_refresh=False, transient=True, disable=not stderr.is_terminal
    ) as bar:
        task = bar.add_task(escape(label), total=total)
        bar.refresh()

        def tick() -> None:
            bar.advance(task)
            bar.refresh()

        yield tick


def load_plots(module: str = "rlora.cli.plots") -> ModuleType:
    """Import what draws, or what writes HTML; an ImportError says how to get what it needs."""
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        msg = "figures need matplotlib and Jinja2: pip install 'rlora[plot]'"
        raise ImportError(msg) from error

"""``rlora info``: what there is to run on, for a person and for a bug report."""

import platform

import click
from rich.table import Table
from rich.text import Text

import rlora
import rlora.backends

from .console import console, one_line, text_table
from .environment import BASE, EXTRAS, blas, cpu_count, cpu_model, versions


@click.command()
def info() -> None:
    """Show versions, backends with their devices, and BLAS libraries."""
    backends = rlora.backends.available()
    out = console()
    out.print(_pairs({"rlora": rlora.__version__, **_system(), **_versions()}))
    table = text_table("backend", "version", "devices, or why it cannot be used")
    for name, found in backends.items():
        says = ", ".join(found.devices) if found.usable else one_line(found.why_not or "unusable")
        table.add_row(Text(name), Text(found.version or "-"), Text(says))
    out.print(table)
    out.print(_blas())


def _system() -> dict[str, str]:
    return {
        "python": f"{platform.python_version()} ({platform.system()} {platform.machine()})",
        "cpu": f"{cpu_model()}, {cpu_count()} logical",
    }


def _versions() -> dict[str, str]:
    return {name: found or "not installed" for name, found in versions((*BASE, *EXTRAS)).items()}


def _pairs(lines: dict[str, str]) -> Table:
    grid = Table.grid(padding=(0, 2))
    for name, value in lines.items():
        grid.add_row(Text(name), Text(value))
    return grid


def _blas() -> Table:
    table = text_table("BLAS, OpenMP", "version", "threads")
    for library in blas():
        told = (library["library"], library["version"] or "-", str(library["threads"]))
        table.add_row(*map(Text, told))
    return table

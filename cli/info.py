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
    found = rlora.backends.available()  # first: CuPy tells its version when it is imported
    told = {
        "rlora": rlora.__version__,
        "python": f"{platform.python_version()} ({platform.system()} {platform.machine()})",
        "cpu": f"{cpu_model()}, {cpu_count()} logical",
        **versions((*BASE, *EXTRAS)),
    }
    grid = Table.grid(padding=(0, 2))
    for name, value in told.items():
        grid.add_row(Text(name), Text(value or "not installed"))
    heads = ("backend", "version", "devices, or why it cannot be used")
    backends = [(name, x.version or "-", usable(x)) for name, x in found.items()]
    libraries = [(x["library"], x["version"] or "-", str(x["threads"])) for x in blas()]
    out = console()
    out.print(grid)
    out.print(text_table(*heads, rows=backends))
    out.print(text_table("BLAS, OpenMP", "version", "threads", rows=libraries))


def usable(found: rlora.backends.BackendInfo) -> str:
    """Name the devices of a backend, or say why it cannot be used."""
    return ", ".join(found.devices) if found.usable else one_line(found.why_not or "unusable")

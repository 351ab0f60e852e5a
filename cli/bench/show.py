"""``rlora bench show``: the table of a record."""

from pathlib import Path

import click

from rlora.cli.console import console

from .schema import read_record
from .table import show_record


@click.command()
@click.argument("record", type=Path)
def show(record: Path) -> None:
    """Print the table of RECORD again."""
    show_record(read_record(record), console())

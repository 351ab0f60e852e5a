"""Tables as CSV files."""

import csv
import io
from collections.abc import Sequence
from pathlib import Path

from rlora.cli.records import write_text

Row = dict[str, str | int]
"""Head of a column, with its unit, -> cell; a cell is empty where nothing was run."""


def write_csv(path: Path, rows: Sequence[Row]) -> None:
    """Write rows that have the columns of the first; nothing without rows."""
    if rows:
        text = io.StringIO()
        writer = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
        write_text(path, text.getvalue())

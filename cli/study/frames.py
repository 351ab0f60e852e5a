"""Records of a study for tables of pandas, and cells of these."""

import math
from pathlib import Path
from typing import Any

from .plan import Record, Records

Frame = Any
"""A table or a column of pandas, which has no types."""


def records_in(folder: Path) -> list[Record]:
    """All records in the files of a folder; ValueError without a file."""
    paths = sorted(folder.glob("*.jsonl"))
    if not paths:
        msg = f"{folder} has no records of a study (*.jsonl)"
        raise ValueError(msg)
    rows = [row for path in paths for row in Records(path).rows.values()]
    if not rows:
        msg = f"the records of a study in {folder} (*.jsonl) are empty"
        raise ValueError(msg)
    return rows


def text(values: Frame, spec: str) -> Frame:
    """Cells of numbers; empty where there is none."""
    return values.map(lambda x: "" if math.isnan(x) else format(x, spec))

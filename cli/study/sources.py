"""Rows of a data set, from files on this machine or from the Hugging Face hub."""

import csv
import importlib
import json
from pathlib import Path
from typing import Any, Final

Row = dict[str, Any]

SUFFIXES: Final = (".jsonl", ".tsv", ".csv")


def need(package: str) -> Any:
    """Import what only these workloads use, or say how to get it."""
    try:
        return importlib.import_module(package)
    except ImportError as error:
        msg = f"{error}; pip install 'rlora[study-gpu]' brings what this model and its data need"
        raise ImportError(msg) from error


def from_folder(folder: Path, stem: str) -> list[Row]:
    """Read the table that is called so in a folder, whichever of the formats it has."""
    for suffix in SUFFIXES:
        path = folder / f"{stem}{suffix}"
        if path.is_file():
            return read(path)
    wanted = ", ".join(f"{stem}{suffix}" for suffix in SUFFIXES)
    here = sorted(p.name for p in folder.iterdir()) if folder.is_dir() else "no folder"
    msg = f"expected one of {wanted} in {folder}, found {here or 'nothing'}"
    raise ValueError(msg)


def from_hub(path: str, name: str | None, split: str, **options: Any) -> list[Row]:
    """Let the package datasets fetch a split, or take it from its cache."""
    return list(need("datasets").load_dataset(path, name, split=split, **options))


def read(path: Path) -> list[Row]:
    """All rows: JSON lines, or values with a header, in quotes if CSV and as they are if TSV."""
    with path.open(encoding="utf-8-sig", newline="") as file:
        if path.suffix == ".jsonl":
            rows = [json.loads(line) for line in file if line.strip()]
        elif path.suffix == ".tsv":
            rows = list(csv.DictReader(file, delimiter="\t", quoting=csv.QUOTE_NONE))
        else:
            rows = list(csv.DictReader(file))
    if not rows:
        msg = f"{path} has no rows"
        raise ValueError(msg)
    return rows


def columns(rows: list[Row], *names: str) -> list[tuple[Any, ...]]:
    """The named values of every row."""
    for number, row in enumerate(rows, 1):
        if missing := [name for name in names if row.get(name) is None]:
            msg = f"row {number} lacks {', '.join(missing)}; it has {', '.join(map(str, row))}"
            raise ValueError(msg)
    return [tuple(row[name] for name in names) for row in rows]


def hold_out(rows: list[Row], most: int) -> tuple[list[Row], list[Row]]:
    """The rows without a tenth of them, or so many at most, evenly spread; and those."""
    count = min(most, len(rows) // 10)
    if count == 0:
        msg = f"{len(rows)} rows are too few to hold a tenth of them out; 10 are the least"
        raise ValueError(msg)
    held = {(2 * k + 1) * len(rows) // (2 * count) for k in range(count)}
    return (
        [row for i, row in enumerate(rows) if i not in held],
        [row for i, row in enumerate(rows) if i in held],
    )

"""The file that a timing leaves behind: its samples, its conditions, and its AdamW row."""

import json
import os
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final

import rlora

from .environment import environment
from .schema import NAME, fault

NOT_YET: Final[Mapping[str, Any]] = {"peaks": [], "checks": []}
COMMAND_NOT_YET: Final[Mapping[str, Any]] = {"threads": None, "suite": None}
ROW_NOT_YET: Final = {
    **dict.fromkeys(("build_s", "compile_s", "outliers", "ratio_interval", "operations")),
    **dict.fromkeys(("flops", "bytes_moved", "model_s", "forward_backward_s")),
}
"""Values for keys that the first version of the record lacks."""

LONGEST: Final = 18
"""Digits of a whole number: more bytes than there are, and no float overflows."""


def make_record(
    command: Mapping[str, Any],
    rows: Sequence[Mapping[str, Any]],
    *,
    peaks: Sequence[Mapping[str, Any]] = (),
    checks: Sequence[Mapping[str, Any]] = (),
    partial: bool = False,
) -> dict[str, Any]:
    """Make the record of a run.

    Parameters
    ----------
    command : mapping
        The options as they were understood, without paths.
    rows : sequence of mapping
        From `Race.rows`, with what they were measured on.
    peaks : sequence of mapping
        What each backend can do at best.
    checks : sequence of mapping
        The verdicts of a suite.
    partial : bool
        Whether the run was interrupted.

    Returns
    -------
    dict
        Valid by `schema.SCHEMA`.
    """
    return {
        "schema": NAME,
        "rlora": rlora.__version__,
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "partial": partial,
        "command": dict(command),
        "environment": environment(),
        "rows": [dict(row) for row in rows],
        "peaks": [dict(peak) for peak in peaks],
        "checks": [dict(check) for check in checks],
    }


def read_record(path: Path) -> dict[str, Any]:
    """Read a record, of this or the first version, and see that it is one.

    Raises
    ------
    ValueError
        When it is not; the message says where it stops to be.
    OSError
        When it cannot be opened.
    """
    try:
        record = json.loads(path.read_text(encoding="utf-8"), parse_int=_whole)
    except (ValueError, RecursionError) as error:
        msg = f"{path.name} is no record of rlora bench: it is not JSON: {error}"
        raise ValueError(msg) from error
    if isinstance(record, dict) and record.get("schema") == "rlora-bench/1":
        record = _upgraded(record)
    if (found := fault(record) or _timeless(record)) is not None:
        msg = f"{path.name} is no record of rlora bench: {found}"
        raise ValueError(msg)
    made: dict[str, Any] = record
    return made


def _timeless(record: dict[str, Any]) -> str | None:
    for i, row in enumerate(record["rows"]):
        if min(row["median_s"], *row["samples_s"]) <= 0:
            return f"it.rows[{i}] took no time"
    return None


def _whole(digits: str) -> int:
    if len(digits) > LONGEST:
        msg = f"a number of {len(digits)} digits"
        raise ValueError(msg)
    return int(digits)


def _upgraded(old: dict[str, Any]) -> dict[str, Any]:
    """Give a record of the first version the keys it had not yet; None says "not measured"."""
    record = {**NOT_YET, **old, "schema": NAME}
    rows, command = record.get("rows"), record.get("command")
    if isinstance(command, dict) and isinstance(command.get("rounds"), dict):
        kept = {key: value for key, value in command.items() if key != "backend"}
        rounds = {"precision": None, **command["rounds"]}
        backends = [command.get("backend")]
        record["command"] = {**COMMAND_NOT_YET, **kept, "backends": backends, "rounds": rounds}
    if isinstance(rows, list) and all(isinstance(row, dict) for row in rows):
        homes = {str(row.get("method")): row.get("backend") for row in rows}
        record["rows"] = [
            {**ROW_NOT_YET, "ratio_to_backend": homes.get(str(row.get("ratio_to"))), **row}
            for row in rows
        ]
    return record


def check_writable(path: Path) -> None:
    """Raise an OSError now if `write_record` could not write there later."""
    if path.is_dir():
        msg = f"--output {path} is a directory; give it a file name"
        raise IsADirectoryError(msg)
    part = _part(path)
    try:
        part.touch(exist_ok=False)
        part.unlink()
    except OSError as error:
        msg = f"--output {path} cannot be written: {error.strerror or error}"
        raise OSError(msg) from error


def make_folder(option: str, folder: Path) -> None:
    """Make a folder with those that it lies in, unless it is there."""
    if folder.exists() and not folder.is_dir():
        msg = f"{option} {folder} is a file; give it a folder"
        raise NotADirectoryError(msg)
    folder.mkdir(parents=True, exist_ok=True)


def write_record(path: Path, record: Mapping[str, Any]) -> None:
    """Write a record whole or not at all."""
    write_text(path, json.dumps(record, indent=1, allow_nan=False) + "\n")


def write_text(path: Path, text: str) -> None:
    """Write a file whole or not at all."""
    write_bytes(path, text.encode())


def write_bytes(path: Path, data: bytes) -> None:
    """Write a file whole or not at all."""
    part = _part(path)
    try:
        with part.open("xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


def _part(path: Path) -> Path:
    """Path of a file until it is whole: in the same folder, or the last move would be a copy."""
    return path.with_name(f".{path.name}.{os.getpid()}.tmp")

"""The file that a timing leaves behind: its samples, its conditions, and its AdamW row."""

import json
import os
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final

import rlora

from .environment import environment

_NUMBER: Final = {"type": "number", "minimum": 0}
_COUNT: Final = {"type": "integer", "minimum": 0}
_TEXT: Final = {"type": "string"}
_TEXTS: Final = {"type": "array", "items": _TEXT}


def _optional(schema: Mapping[str, Any]) -> dict[str, Any]:
    return {"anyOf": [schema, {"type": "null"}]}


def _object(properties: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "type": "object",
        "properties": dict(properties),
        "required": list(properties),
        "additionalProperties": False,
    }


_RANK: Final = {"type": "integer", "minimum": 1}
_RANKS: Final = {"type": "array", "items": _RANK, "minItems": 1}

_COMMAND: Final = _object(
    {
        "backend": _TEXT,
        "methods": _TEXTS,
        "ranks": _optional(_RANKS),
        "preset": _optional(_TEXT),
        "adapter": _optional(_TEXT),
        "dtype": _TEXT,
        "device": _optional(_TEXT),
        "against": _TEXTS,
        "rounds": _object({"least": _COUNT, "most": _COUNT, "seconds": _NUMBER}),
        "seed": _COUNT,
    }
)

_BLAS: Final = _object(
    {"library": _TEXT, "version": _optional(_TEXT), "threads": _optional(_COUNT)}
)

_ENVIRONMENT: Final = _object(
    {
        "python": _TEXT,
        "system": _TEXT,
        "machine": _TEXT,
        "cpu": _TEXT,
        "cpus": _COUNT,
        "memory_bytes": _optional(_COUNT),
        "versions": {"type": "object", "additionalProperties": _TEXT},
        "accelerators": _TEXTS,
        "blas": {"type": "array", "items": _BLAS},
        "load_average": _optional({"type": "array", "items": _NUMBER}),
    }
)

_ROW: Final = _object(
    {
        "method": _TEXT,
        "backend": _TEXT,
        "device": _TEXT,
        "dtype": _TEXT,
        "preset": _optional(_TEXT),
        "adapter": _optional(_TEXT),
        # A list for an adapter whose pairs have several.
        "rank": {"anyOf": [_RANK, _RANKS]},
        "pairs": _COUNT,
        "parameters": _COUNT,
        "samples_s": {"type": "array", "items": _NUMBER, "minItems": 1},
        "first_call_s": _NUMBER,
        "median_s": _NUMBER,
        "spread": _optional(_NUMBER),
        "ratio": _optional(_NUMBER),
        "ratio_to": _TEXT,
        "state_bytes": _COUNT,
        "peak_temporary_bytes": _optional(_COUNT),
        "verdict": _TEXT,
    }
)

SCHEMA: Final[dict[str, Any]] = {
    "$schema": "https://json-schema.org/draft/2020-12/schema",
    "title": "rlora bench",
    **_object(
        {
            "schema": {"const": "rlora-bench/1"},
            "rlora": _TEXT,
            "created": {"type": "string", "format": "date-time"},
            "partial": {"type": "boolean"},
            "command": _COMMAND,
            "environment": _ENVIRONMENT,
            "rows": {"type": "array", "items": _ROW},
        }
    ),
}
"""JSON Schema of the record."""


def make_record(
    command: Mapping[str, Any], rows: Sequence[Mapping[str, Any]], *, partial: bool = False
) -> dict[str, Any]:
    """Make the record of a run.

    Parameters
    ----------
    command : mapping
        The options as they were understood, without paths.
    rows : sequence of mapping
        From `Race.rows`, with what they were measured on.
    partial : bool
        Whether the run was interrupted.

    Returns
    -------
    dict
        Valid by `SCHEMA`.
    """
    return {
        "schema": "rlora-bench/1",
        "rlora": rlora.__version__,
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "partial": partial,
        "command": dict(command),
        "environment": environment(),
        "rows": [dict(row) for row in rows],
    }


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


def write_record(path: Path, record: Mapping[str, Any]) -> None:
    """Write a record whole or not at all."""
    part = _part(path)
    text = json.dumps(record, indent=1, allow_nan=False) + "\n"
    try:
        with part.open("x", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


def _part(path: Path) -> Path:
    """Where a file lies until it is whole: in the same folder, or the last move would be a copy."""
    return path.with_name(f".{path.name}.{os.getpid()}.tmp")

"""The record of a timing: its samples, its conditions, and its AdamW row."""

from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final

import rlora
from rlora.cli.environment import environment
from rlora.cli.records import (
    COUNT,
    ENVIRONMENT,
    NUMBER,
    TEXT,
    TEXTS,
    closed,
    fault,
    optional,
    read_json,
)

NAME: Final = "rlora-bench/2"

Record = dict[str, Any]
"""Valid by `SCHEMA`."""

Row = dict[str, Any]
"""One line of the table: an item of the record's `rows`."""

_RANK: Final = {"type": "integer", "minimum": 1}
_RANKS: Final = {"type": "array", "items": _RANK, "minItems": 1}

_COMMAND: Final = closed(
    {
        "backends": TEXTS,
        "methods": TEXTS,
        "ranks": optional(_RANKS),
        "preset": optional(TEXT),
        "adapter": optional(TEXT),
        "dtype": TEXT,
        "device": optional(TEXT),
        "against": TEXTS,
        "rounds": closed(
            {
                "least": COUNT,
                "most": COUNT,
                "seconds": optional(NUMBER),
                "precision": optional(NUMBER),
            }
        ),
        "seed": COUNT,
        "threads": optional(COUNT),
        "suite": optional(TEXT),
    }
)

_ROW: Final = closed(
    {
        "method": TEXT,
        "backend": TEXT,
        "device": TEXT,
        "dtype": TEXT,
        "preset": optional(TEXT),
        "adapter": optional(TEXT),
        # A list for an adapter whose pairs have several.
        "rank": {"anyOf": [_RANK, _RANKS]},
        "pairs": COUNT,
        "parameters": COUNT,
        "samples_s": {"type": "array", "items": NUMBER, "minItems": 1},
        "build_s": optional(NUMBER),
        "compile_s": optional(NUMBER),
        "first_call_s": NUMBER,
        "median_s": NUMBER,
        "spread": optional(NUMBER),
        "outliers": optional(COUNT),
        "ratio": optional(NUMBER),
        "ratio_interval": optional(
            {"type": "array", "items": NUMBER, "minItems": 2, "maxItems": 2}
        ),
        "ratio_to": TEXT,
        "ratio_to_backend": TEXT,
        "state_bytes": COUNT,
        "peak_temporary_bytes": optional(COUNT),
        "operations": optional(COUNT),
        "flops": optional(COUNT),
        "bytes_moved": optional(COUNT),
        "model_s": optional(NUMBER),
        "forward_backward_s": optional(NUMBER),
        "verdict": TEXT,
    }
)

_PEAKS: Final = closed(
    {"backend": TEXT, "device": TEXT, "bytes_per_s": NUMBER, "flops_per_s": NUMBER}
)

_CHECK: Final = closed(
    {
        "what": TEXT,
        "preset": TEXT,
        "rank": optional(_RANK),
        "sense": {"anyOf": [{"const": x} for x in ("at most", "at least", "exactly")]},
        "limit": NUMBER,
        "measured": NUMBER,
        "passed": {"type": "boolean"},
    }
)
# Records of before do not say whether the timings behind a check could be believed, nor what is to
# be reached one day.
_CHECK["properties"] |= {"stable": {"type": "boolean"}, "goal": optional(NUMBER)}

SCHEMA: Final[dict[str, Any]] = {
    "$schema": "https://json-schema.org/draft/2020-12/schema",
    "title": "rlora bench",
    **closed(
        {
            "schema": {"const": NAME},
            "rlora": TEXT,
            "created": {"type": "string", "format": "date-time"},
            "partial": {"type": "boolean"},
            "command": _COMMAND,
            "environment": ENVIRONMENT,
            "rows": {"type": "array", "items": _ROW},
            "peaks": {"type": "array", "items": _PEAKS},
            "checks": {"type": "array", "items": _CHECK},
        }
    ),
}
"""JSON Schema of the record."""

NOT_YET: Final[Mapping[str, Any]] = {"peaks": [], "checks": []}
COMMAND_NOT_YET: Final[Mapping[str, Any]] = {"threads": None, "suite": None}
ROW_NOT_YET: Final = {
    **dict.fromkeys(("build_s", "compile_s", "outliers", "ratio_interval", "operations")),
    **dict.fromkeys(("flops", "bytes_moved", "model_s", "forward_backward_s")),
}
"""Values for keys that the first version of the record lacks."""


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
        From `Timing.rows`, with what they were measured on.
    peaks : sequence of mapping
        What each backend can do at best.
    checks : sequence of mapping
        The verdicts of a suite.
    partial : bool
        Whether the run was interrupted.

    Returns
    -------
    dict
        Valid by `SCHEMA`.
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
    record = read_json(path, "rlora bench")
    if isinstance(record, dict) and record.get("schema") == "rlora-bench/1":
        record = _upgraded(record)
    if (found := fault(record, SCHEMA) or _timeless(record)) is not None:
        msg = f"{path.name} is no record of rlora bench: {found}"
        raise ValueError(msg)
    made: dict[str, Any] = record
    return made


def _timeless(record: dict[str, Any]) -> str | None:
    for i, row in enumerate(record["rows"]):
        if min(row["median_s"], *row["samples_s"]) <= 0:
            return f"it.rows[{i}] took no time"
    return None


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

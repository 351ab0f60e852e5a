"""The record of a timing: its samples, its conditions, and its AdamW row."""

from pathlib import Path
from typing import Any, Final

from rlora.cli.records import (
    COUNT,
    ENVIRONMENT,
    NUMBER,
    TEXT,
    TEXTS,
    TIME,
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
        **dict.fromkeys(("method", "backend", "device", "dtype"), TEXT),
        **dict.fromkeys(("ratio_to", "ratio_to_backend", "verdict"), TEXT),
        **dict.fromkeys(("preset", "adapter"), optional(TEXT)),
        **dict.fromkeys(("pairs", "parameters", "state_bytes"), COUNT),
        **dict.fromkeys(("peak_temporary_bytes", "operations", "outliers"), optional(COUNT)),
        **dict.fromkeys(("flops", "bytes_moved"), optional(COUNT)),
        **dict.fromkeys(("first_call_s", "median_s"), NUMBER),
        **dict.fromkeys(("build_s", "compile_s", "spread", "ratio"), optional(NUMBER)),
        **dict.fromkeys(("model_s", "forward_backward_s"), optional(NUMBER)),
        # A list for an adapter whose pairs have several.
        "rank": {"anyOf": [_RANK, _RANKS]},
        "samples_s": {"type": "array", "items": NUMBER, "minItems": 1},
        "ratio_interval": optional(
            {"type": "array", "items": NUMBER, "minItems": 2, "maxItems": 2}
        ),
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
        "stable": {"type": "boolean"},
        "goal": optional(NUMBER),
    }
)

SCHEMA: Final[dict[str, Any]] = {
    "$schema": "https://json-schema.org/draft/2020-12/schema",
    "title": "rlora bench",
    **closed(
        {
            "schema": {"const": NAME},
            "rlora": TEXT,
            "created": TIME,
            "partial": {"type": "boolean"},
            "command": _COMMAND,
            "environment": ENVIRONMENT,
            "rows": {"type": "array", "items": _ROW, "minItems": 1},
            "peaks": {"type": "array", "items": _PEAKS},
            "checks": {"type": "array", "items": _CHECK},
        }
    ),
}
"""JSON Schema of the record."""


def read_record(path: Path) -> Record:
    """Read a record; a ValueError says where it stops to be one."""
    record: Record = read_json(path, "rlora bench")
    if (found := fault(record, SCHEMA) or _timeless(record)) is not None:
        msg = f"{path.name} is no record of rlora bench: {found}"
        raise ValueError(msg)
    return record


def _timeless(record: Record) -> str | None:
    for i, row in enumerate(record["rows"]):
        if min(row["median_s"], *row["samples_s"]) <= 0:
            return f"it.rows[{i}] took no time"
    return None

"""The JSON Schema of a record, and a check of the part of that language which it uses."""

from collections.abc import Mapping
from typing import Any, Final

NAME: Final = "rlora-bench/2"

_NUMBER: Final = {"type": "number", "minimum": 0}
_COUNT: Final = {"type": "integer", "minimum": 0}
TEXT: Final = {"type": "string"}
TEXTS: Final = {"type": "array", "items": TEXT}


def optional(schema: Mapping[str, Any]) -> dict[str, Any]:
    """Allow null too."""
    return {"anyOf": [schema, {"type": "null"}]}


def closed(properties: Mapping[str, Any]) -> dict[str, Any]:
    """Ask for an object of exactly these keys."""
    return {
        "type": "object",
        "properties": dict(properties),
        "required": list(properties),
        "additionalProperties": False,
    }


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
                "least": _COUNT,
                "most": _COUNT,
                "seconds": optional(_NUMBER),
                "precision": optional(_NUMBER),
            }
        ),
        "seed": _COUNT,
        "threads": optional(_COUNT),
        "suite": optional(TEXT),
    }
)

_BLAS: Final = closed({"library": TEXT, "version": optional(TEXT), "threads": optional(_COUNT)})

ENVIRONMENT: Final = closed(
    {
        "python": TEXT,
        "system": TEXT,
        "machine": TEXT,
        "cpu": TEXT,
        "cpus": _COUNT,
        "memory_bytes": optional(_COUNT),
        "versions": {"type": "object", "additionalProperties": TEXT},
        "accelerators": TEXTS,
        "blas": {"type": "array", "items": _BLAS},
        "load_average": optional({"type": "array", "items": _NUMBER}),
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
        "pairs": _COUNT,
        "parameters": _COUNT,
        "samples_s": {"type": "array", "items": _NUMBER, "minItems": 1},
        "build_s": optional(_NUMBER),
        "compile_s": optional(_NUMBER),
        "first_call_s": _NUMBER,
        "median_s": _NUMBER,
        "spread": optional(_NUMBER),
        "outliers": optional(_COUNT),
        "ratio": optional(_NUMBER),
        "ratio_interval": optional(
            {"type": "array", "items": _NUMBER, "minItems": 2, "maxItems": 2}
        ),
        "ratio_to": TEXT,
        "ratio_to_backend": TEXT,
        "state_bytes": _COUNT,
        "peak_temporary_bytes": optional(_COUNT),
        "operations": optional(_COUNT),
        "flops": optional(_COUNT),
        "bytes_moved": optional(_COUNT),
        "model_s": optional(_NUMBER),
        "forward_backward_s": optional(_NUMBER),
        "verdict": TEXT,
    }
)

_PEAKS: Final = closed(
    {"backend": TEXT, "device": TEXT, "bytes_per_s": _NUMBER, "flops_per_s": _NUMBER}
)

_CHECK: Final = closed(
    {
        "what": TEXT,
        "preset": TEXT,
        "rank": optional(_RANK),
        "sense": {"anyOf": [{"const": x} for x in ("at most", "at least", "exactly")]},
        "limit": _NUMBER,
        "measured": _NUMBER,
        "passed": {"type": "boolean"},
    }
)
# Records of before do not say whether the timings behind a check could be believed.
_CHECK["properties"]["stable"] = {"type": "boolean"}

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

_TYPES: Final[dict[str, Any]] = {
    "object": dict,
    "array": list,
    "string": str,
    "boolean": bool,
    "number": (int, float),
    "integer": int,
    "null": type(None),
}


def fault(value: Any, schema: Mapping[str, Any] = SCHEMA, path: str = "it") -> str | None:
    """Say what first is not as the schema has it; None for a valid value."""
    if "anyOf" in schema:
        faults = [fault(value, option, path) for option in schema["anyOf"]]
        return None if None in faults else faults[0]
    if "const" in schema:
        good = value == schema["const"]
        return None if good else f"{path} must be {schema['const']!r}, got {str(value)[:40]!r}"
    kind = schema["type"]
    if not isinstance(value, _TYPES[kind]) or (kind != "boolean" and isinstance(value, bool)):
        return f"{path} must be of type {kind}, got {type(value).__name__}"
    if kind in ("number", "integer") and not schema.get("minimum", value) <= value < float("inf"):
        return f"{path} must be a number from {schema.get('minimum')} up, got {value}"
    if kind == "array":
        least, most = schema.get("minItems", 0), schema.get("maxItems", len(value))
        if not least <= len(value) <= most:
            return f"{path} must have {least} items or more, got {len(value)}"
        parts = [(x, schema["items"], f"{path}[{i}]") for i, x in enumerate(value)]
        return _first(parts)
    return _fault_of_object(value, schema, path) if kind == "object" else None


def _fault_of_object(value: dict[str, Any], schema: Mapping[str, Any], path: str) -> str | None:
    known, others = schema.get("properties", {}), schema.get("additionalProperties", True)
    missing = [name for name in schema.get("required", ()) if name not in value]
    if missing:
        return f"{path} lacks {missing[0]!r}"
    unknown = [name for name in value if name not in known]
    if unknown and others is False:
        return f"{path} has an unknown key {unknown[0][:40]!r}"
    return _first([(x, known.get(name, others), f"{path}.{name}") for name, x in value.items()])


def _first(parts: list[tuple[Any, Mapping[str, Any], str]]) -> str | None:
    return next((found for part in parts if (found := fault(*part)) is not None), None)

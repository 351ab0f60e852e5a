"""Records: JSON files that are checked by a schema, and written whole or not at all."""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

LONGEST: Final = 18
"""Digits of a whole number: more bytes than there are, and no float overflows."""

NUMBER: Final = {"type": "number", "minimum": 0}
COUNT: Final = {"type": "integer", "minimum": 0}
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


_BLAS: Final = closed({"library": TEXT, "version": optional(TEXT), "threads": optional(COUNT)})

ENVIRONMENT: Final = closed(
    {
        "python": TEXT,
        "system": TEXT,
        "machine": TEXT,
        "cpu": TEXT,
        "cpus": COUNT,
        "memory_bytes": optional(COUNT),
        "versions": {"type": "object", "additionalProperties": TEXT},
        "accelerators": TEXTS,
        "blas": {"type": "array", "items": _BLAS},
        "load_average": optional({"type": "array", "items": NUMBER}),
    }
)

_TYPES: Final[dict[str, Any]] = {
    "object": dict,
    "array": list,
    "string": str,
    "boolean": bool,
    "number": (int, float),
    "integer": int,
    "null": type(None),
}


def fault(value: Any, schema: Mapping[str, Any], path: str = "it") -> str | None:
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


def read_json(path: Path, command: str) -> Any:
    """Read a file; a ValueError says that it is no record of the command."""
    try:
        return json.loads(path.read_text(encoding="utf-8"), parse_int=_whole)
    except (ValueError, RecursionError) as error:
        msg = f"{path.name} is no record of {command}: it is not JSON: {error}"
        raise ValueError(msg) from error


def _whole(digits: str) -> int:
    if len(digits) > LONGEST:
        msg = f"a number of {len(digits)} digits"
        raise ValueError(msg)
    return int(digits)


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

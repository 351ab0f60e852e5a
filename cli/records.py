"""Records: JSON files that are checked by a schema, and written whole or not at all."""

import errno
import json
import math
import os
from collections.abc import Iterator, Mapping
from datetime import datetime
from pathlib import Path
from typing import Any, Final

from rlora.pairing.report import number_of

from .console import printable

LONGEST: Final = 18
"""Digits of a whole number: more bytes than there are, and no float overflows."""

NUMBER: Final = {"type": "number", "minimum": 0}
COUNT: Final = {"type": "integer", "minimum": 0}
TEXT: Final = {"type": "string"}
TEXTS: Final = {"type": "array", "items": TEXT}
TIME: Final = {"type": "string", "format": "date-time"}


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
    return next(_faults(value, schema, path), None)


def _faults(value: Any, schema: Mapping[str, Any], path: str) -> Iterator[str]:
    if "anyOf" in schema:
        faults = [fault(value, option, path) for option in schema["anyOf"]]
        if None not in faults:
            yield str(faults[0])
        return
    if "const" in schema:
        if value != schema["const"]:
            yield f"{path} must be {schema['const']!r}, got {str(value)[:40]!r}"
        return
    kind = schema["type"]
    if not isinstance(value, _TYPES[kind]) or (kind != "boolean" and isinstance(value, bool)):
        yield f"{path} must be of type {kind}, got {type(value).__name__}"
    elif schema.get("format") == "date-time":
        try:
            datetime.fromisoformat(value)
        except ValueError:
            yield f"{path} must be a time as in 2026-01-31T12:00:00+00:00, got {value[:40]!r}"
    elif kind in ("number", "integer"):
        if not math.isfinite(value):
            yield f"{path} must be a finite number, got {value}"
        elif value < schema.get("minimum", value):
            yield f"{path} must be a number from {schema['minimum']} up, got {value}"
    elif kind == "array":
        count, least, most = len(value), schema.get("minItems", 0), schema.get("maxItems", math.inf)
        if not least <= count <= most:
            bound, wanted = ("at least", least) if count < least else ("at most", most)
            yield f"{path} must have {bound} {number_of(wanted, 'item')}, got {count}"
        for i, x in enumerate(value):
            yield from _faults(x, schema["items"], f"{path}[{i}]")
    elif kind == "object":
        known, others = schema.get("properties", {}), schema.get("additionalProperties", True)
        yield from (f"{path} lacks {x!r}" for x in schema.get("required", ()) if x not in value)
        if others is False:
            unknown = (x for x in value if x not in known)
            yield from (f"{path} has an unknown key {x[:40]!r}" for x in unknown)
        for name, x in value.items():
            yield from _faults(x, known.get(name, others), f"{path}.{name}")


def read_json(path: Path, command: str) -> Any:
    """Read a file, control codes in its strings written out; a ValueError says it is no record."""
    try:
        return _printable(json.loads(path.read_text(encoding="utf-8"), parse_int=_whole))
    except (ValueError, RecursionError) as error:
        msg = f"{path.name} is no record of {command}: it is not JSON: {error}"
        raise ValueError(msg) from error


def _printable(value: Any) -> Any:
    if isinstance(value, str):
        return printable(value)
    if isinstance(value, list):
        return [_printable(x) for x in value]
    if isinstance(value, dict):
        return {printable(key): _printable(x) for key, x in value.items()}
    return value


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
    try:
        if is_stream(path):
            if not os.access(path, os.W_OK):
                raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
            return
        part = _part(path)
        part.touch(exist_ok=False)
        part.unlink()
    except (OSError, RuntimeError) as error:  # before Python 3.13 of symlinks in a circle
        raise _unwritable(error, "--output", path) from error


def check_folder(option: str, folder: Path) -> None:
    """Raise an OSError now if a file is in the place of a folder, or of one that it lies in."""
    for path in (folder, *folder.parents):
        if path.exists() and not path.is_dir():
            msg = f"{option} {path} is a file; give it a folder"
            raise NotADirectoryError(msg)


def make_folder(option: str, folder: Path) -> None:
    """Make a folder with those that it lies in, unless it is there."""
    check_folder(option, folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise _unwritable(error, option, folder) from error


def _unwritable(error: Exception, *what: object) -> OSError:
    reason = getattr(error, "strerror", None) or error
    return OSError(f"{' '.join(map(str, what))} cannot be written: {reason}")


def write_record(path: Path, record: Mapping[str, Any]) -> None:
    """Write a record whole or not at all."""
    write_text(path, as_json(record))


def as_json(record: Mapping[str, Any]) -> str:
    """Give a record as the text of its file."""
    return json.dumps(record, indent=1, allow_nan=False) + "\n"


def write_text(path: Path, text: str) -> None:
    """Write a file whole or not at all."""
    write_bytes(path, text.encode())


def write_bytes(path: Path, data: bytes) -> None:
    """Write a file whole or not at all; what is no file, such as a pipe, as it comes."""
    try:
        _write_bytes(path, data)
    except BrokenPipeError:  # whoever read it has had enough
        raise
    except OSError as error:
        raise _unwritable(error, path) from error


def _write_bytes(path: Path, data: bytes) -> None:
    if is_stream(path):
        with path.open("ab") as stream:  # standard output may go to the end of a file
            stream.write(data)
        return
    part = _part(path)
    try:
        with part.open("xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        part.replace(path.resolve())  # a symlink stays one
    finally:
        part.unlink(missing_ok=True)


def _part(path: Path) -> Path:
    """Path of a file until it is whole: in the same folder, or the last move would be a copy."""
    path = path.resolve()
    return path.with_name(f".{path.name}.{os.getpid()}.tmp")


FD: Final = ("/dev/fd", "/proc/self/fd")
"""Folders of the files that a process has open."""


def is_stream(path: Path) -> bool:
    """Return whether this is a device, a pipe or an open file, in whose place no other may come."""
    opened = str(path) in ("/dev/stdout", "/dev/stderr") or str(path.parent) in FD
    return path.exists() and (opened or not (path.is_file() or path.is_dir()))

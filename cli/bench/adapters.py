"""The factors of a saved adapter, read from a safetensors file with NumPy alone.

The format: eight bytes with the length of the header, little-endian; the header, JSON; the data.
A file may come from anywhere, so nothing in it is believed before it has been checked.
"""

import json
from collections.abc import Mapping
from math import prod
from pathlib import Path
from typing import Any, Final, NamedTuple

import numpy as np
from numpy.typing import NDArray

import rlora
from rlora.pairing import nothing_paired

HEADER_LIMIT: Final = 100_000_000
"""Bytes; the limit of the format's own reader."""

ADAPTER_NAMES: Final = ("adapter_model.safetensors", "pytorch_lora_weights.safetensors")
"""Names that PEFT and diffusers give the file in an adapter's directory."""

ITEM_BYTES: Final[Mapping[str, int]] = {
    **dict.fromkeys(("BOOL", "U8", "I8", "F8_E4M3", "F8_E5M2", "F8_E8M0"), 1),
    **dict.fromkeys(("F8_E4M3FNUZ", "F8_E5M2FNUZ"), 1),
    **dict.fromkeys(("U16", "I16", "F16", "BF16"), 2),
    **dict.fromkeys(("U32", "I32", "F32"), 4),
    **dict.fromkeys(("U64", "I64", "F64", "C64"), 8),
}

READABLE: Final[Mapping[str, str]] = {"F16": "<f2", "BF16": "<u2", "F32": "<f4", "F64": "<f8"}


class Tensor(NamedTuple):
    """One tensor of the file: its dtype and shape, and where its bytes are in the data."""

    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int


def read_adapter(path: Path) -> list[rlora.Factors]:
    """Every LoRA pair of an adapter, as NumPy arrays A (r, n) and B (m, r).

    Parameters
    ----------
    path : Path
        A safetensors file, or the directory in which PEFT or diffusers saved one.

    Returns
    -------
    list of Factors
        In the file's order; kernels of convolutions flattened; bfloat16 widened to float32.

    Raises
    ------
    ValueError
        When it is not a sound safetensors file, or a factor cannot be read as real numbers.
    PairingError
        When nothing in it forms a pair.
    OSError
        When it cannot be opened.
    """
    path = locate(path)
    with path.open("rb") as file:
        size = path.stat().st_size
        start, header = _read_header(file, size, path.name)
        entries = _checked(header, size - start, path.name)
        report = rlora.find_pairs(entries)
        if not report.pairs:
            raise nothing_paired(entries, report)

        def load(name: str) -> NDArray[Any]:
            entry = entries[name]
            file.seek(start + entry.begin)
            raw = file.read(entry.end - entry.begin)
            return _decode(raw, entry.dtype, f"tensor {name!r} of {path.name}").reshape(entry.shape)

        return [factors for p in report for factors in p.read(load(p.a), load(p.b))]


def locate(path: Path) -> Path:
    """Find the file itself, or the one a directory is known to keep its adapter in."""
    if not path.is_dir():
        if path.exists() and not path.is_file():
            msg = f"{path.name} is no regular file"
            raise ValueError(msg)
        return path
    for name in ADAPTER_NAMES:
        if (path / name).is_file():
            return path / name
    msg = f"the directory {path.name or path} has no {' and no '.join(ADAPTER_NAMES)}"
    raise ValueError(msg)


def _read_header(file: Any, size: int, name: str) -> tuple[int, dict[str, Any]]:
    """Return where the data starts, and the header as JSON has it."""
    prefix = file.read(8)
    length = int.from_bytes(prefix, "little")
    if len(prefix) < 8 or length > min(size - 8, HEADER_LIMIT):
        msg = (
            f"{name} is no safetensors file, or cut short: its header would take {length} bytes, "
            f"but {max(size - 8, 0)} follow (and {HEADER_LIMIT} are allowed)"
        )
        raise ValueError(msg)
    try:
        header = json.loads(file.read(length).decode(), object_pairs_hook=_without_doubles)
    except (ValueError, RecursionError) as error:
        msg = f"the header of {name} is not the JSON it should be: {error}"
        raise ValueError(msg) from error
    if not isinstance(header, dict):
        msg = f"the header of {name} must be a JSON object, got {type(header).__name__}"
        raise ValueError(msg)
    header.pop("__metadata__", None)
    return 8 + length, header


def _without_doubles(items: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(items)
    if len(found) != len(items):
        msg = "a name stands in it twice"
        raise ValueError(msg)
    return found


def _checked(header: Mapping[str, Any], size: int, file: str) -> dict[str, Tensor]:
    """Give the entries, once it is sure that they share out the data without gap or overlap."""
    entries = {name: _entry(value, f"{name!r} of {file}") for name, value in header.items()}
    reached = 0
    for name, entry in sorted(entries.items(), key=lambda item: item[1][2:]):
        if entry.begin != reached:
            kind = "overlaps the one before" if entry.begin < reached else "leaves a gap before it"
            msg = f"tensor {name!r} of {file} {kind}: it begins at {entry.begin}, not {reached}"
            raise ValueError(msg)
        reached = entry.end
    if reached != size:
        msg = f"the tensors of {file} take {reached} bytes, but the file has {size}; it is damaged"
        raise ValueError(msg)
    return entries


def _entry(value: Any, where: str) -> Tensor:
    if not (isinstance(value, dict) and {"dtype", "shape", "data_offsets"} <= value.keys()):
        msg = f"tensor {where} must have dtype, shape and data_offsets"
        raise ValueError(msg)
    dtype, shape, offsets = value["dtype"], value["shape"], value["data_offsets"]
    if not (isinstance(dtype, str) and dtype in ITEM_BYTES):
        msg = f"tensor {where} has the unknown dtype {str(dtype)[:40]!r}"
        raise ValueError(msg)
    if not (_sizes(shape) and _sizes(offsets) and len(offsets) == 2):
        msg = (
            f"tensor {where} must have a shape and two offsets of whole numbers from 0 up, "
            f"got {str(shape)[:40]} and {str(offsets)[:40]}"
        )
        raise ValueError(msg)
    begin, end = offsets
    if end - begin != prod(shape) * ITEM_BYTES[dtype]:
        msg = f"tensor {where}: {dtype} of shape {shape} does not fill the bytes {begin} to {end}"
        raise ValueError(msg)
    return Tensor(dtype, tuple(shape), begin, end)


def _sizes(value: Any) -> bool:
    # Eight axes and 2^48 are far beyond any factor, and keep products of hostile sizes small.
    return (
        isinstance(value, list)
        and len(value) <= 8
        and all(type(x) is int and 0 <= x < 1 << 48 for x in value)
    )


def _decode(raw: bytes, dtype: str, where: str) -> NDArray[Any]:
    if dtype not in READABLE:
        msg = f"{where} is {dtype}; factors must be one of {', '.join(READABLE)}"
        raise ValueError(msg)
    x: NDArray[Any] = np.frombuffer(raw, READABLE[dtype])
    if dtype == "BF16":
        x = (x.astype("<u4") << 16).view("<f4")  # bfloat16 is the upper half of float32
    x = x.astype(np.float64 if dtype == "F64" else np.float32)
    if not np.isfinite(x).all():
        msg = f"{where} holds NaN or inf"
        raise ValueError(msg)
    return x

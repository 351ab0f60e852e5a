"""The factors of a saved adapter, from a safetensors file that the format's own library checks."""

import json
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open

import rlora
from rlora.pairing import nothing_paired

ADAPTER_NAMES: Final = ("adapter_model.safetensors", "pytorch_lora_weights.safetensors")
"""Names that PEFT and diffusers give the file in an adapter's directory."""

READABLE: Final[Mapping[str, str]] = {"F16": "<f2", "BF16": "<u2", "F32": "<f4", "F64": "<f8"}


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
        try:
            with safe_open(path, framework="np"):  # sees that the tensors share out the data
                length = int.from_bytes(file.read(8), "little")
                header = json.loads(file.read(length))
        except (SafetensorError, ValueError) as error:
            msg = f"{path.name} is no sound safetensors file: {error}"
            raise ValueError(msg) from error
        header.pop("__metadata__", None)
        tensors = {name: SimpleNamespace(**header[name]) for name in header}
        report = rlora.find_pairs(tensors)
        if not report.pairs:
            raise nothing_paired(tensors, report)

        # By hand: the library reads the whole file, or for NumPy no bfloat16.
        def load(name: str) -> NDArray[Any]:
            tensor, (begin, end) = tensors[name], tensors[name].data_offsets
            file.seek(8 + length + begin)
            x = _decode(file.read(end - begin), tensor.dtype, f"tensor {name!r} of {path.name}")
            return x.reshape(tensor.shape)

        return [factors for p in report for factors in p.read(load(p.a), load(p.b))]


def locate(path: Path) -> Path:
    """Find the file itself, or the one a directory is known to keep its adapter in."""
    if not path.is_dir():
        if path.is_file():
            return path
        wanted = f"a safetensors file, or a folder that has {' or '.join(ADAPTER_NAMES)}"
        if path.exists():
            msg = f"--adapter {path} is no regular file; give {wanted}"
            raise ValueError(msg)
        msg = f"--adapter {path}: No such file or folder; give {wanted}"
        raise FileNotFoundError(msg)
    for name in ADAPTER_NAMES:
        if (path / name).is_file():
            return path / name
    msg = f"--adapter {path}: the folder has no {' and no '.join(ADAPTER_NAMES)}"
    raise ValueError(msg)


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

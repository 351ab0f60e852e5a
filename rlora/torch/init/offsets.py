"""The share of a start that was taken from the base weights: kept, restored, saved and loaded."""

from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from rlora.core.dispatch import get_backend
from rlora.core.errors import PairingError, ShapeError
from rlora.core.factors import Factors
from rlora.initializers import Start
from rlora.torch.pairing.base_weights import module_places, weight_places, writable_weight

PREFIX = "base_model.model."
"""Prefix of PEFT before the names of the model that it wraps."""

PARTS = ("A", "B", "scaling_overlap")
"""The names of an offset's tensors in a file, behind that of its layer and a colon."""


def spellings(layer: str) -> tuple[str, str, str]:
    """A layer's name as it is, without what PEFT puts before it, and with it."""
    bare = layer.removeprefix(PREFIX)
    return layer, bare, PREFIX + bare


class Offset(NamedTuple):
    """The product taken from one base weight, which is ``W0 - s B A`` now.

    Parameters
    ----------
    A, B : Tensor
        (r, n) and (m, r): the adapter's factors at the start, as they are stored, in its dtype.
    scaling : float
        The s.
    overlap : float
        ``<W0, B A>``, by which `restore_offsets` knows the weight that it was taken from.
    """

    A: Tensor
    B: Tensor
    scaling: float
    overlap: float


def take_offset(weight: Tensor, pair: Factors, scaling: float) -> Offset:
    """``W <- W - s B A`` in place, computed in at least float32; the weight is (m, n)."""
    offset = Offset(
        pair.A.detach().cpu().clone(), pair.B.detach().cpu().clone(), scaling, overlap(weight, pair)
    )
    shift(weight, offset)
    return offset


@torch.no_grad()
def shift(weight: Tensor, offset: Offset) -> None:
    """The one place that writes to a base weight."""
    pair = Factors(offset.A.to(weight.device), offset.B.to(weight.device))
    weight.copy_(Start(pair, offset=pair).base(weight, offset.scaling))


@torch.no_grad()
def overlap(weight: Tensor, pair: Factors) -> float:
    """``<W, B A>``, (m, n) with (r, n) and (m, r), without forming the product B A."""
    backend = get_backend(weight)
    wide = backend.compute_dtype(torch.promote_types(weight.dtype, pair.A.dtype))
    A, B = (x.to(weight.device, wide) for x in pair)
    with backend.exact(weight):
        terms = (B.mT @ weight.to(wide)) * A  # (r, n)
    return float(terms.cpu().double().sum())


def restore_offsets(model: nn.Module, offsets: Mapping[str, Offset]) -> None:
    """Take the offsets of a start from the base weights of a freshly loaded model, in place.

    Parameters
    ----------
    model : nn.Module
        With the original base weights, with or without PEFT around it.
    offsets : mapping of str to Offset
        ``InitReport.offsets``, or from `load_offsets`.

    Raises
    ------
    PairingError
        When a layer is missing or quantised, or when its weight is not the one that the offset
        was made for, for example because the offset has been taken already. Nothing has been
        written then.
    ShapeError
        When a layer has another shape.

    Examples
    --------
    >>> import torch
    >>> from rlora.torch.init.offsets import Offset, restore_offsets
    >>> model = torch.nn.Sequential(torch.nn.Linear(2, 2))
    >>> torch.nn.init.eye_(model[0].weight).requires_grad_(False).tolist()
    [[1.0, 0.0], [0.0, 1.0]]
    >>> ones = Offset(torch.ones(1, 2), torch.ones(2, 1), scaling=0.5, overlap=2.0)
    >>> restore_offsets(model, {"0": ones})
    >>> model[0].weight.tolist()
    [[0.5, -0.5], [-0.5, 0.5]]
    """
    modules, holders = dict(model.named_modules()), weight_places(module_places(model))
    weights: list[tuple[Tensor, Offset]] = []
    for name, offset in offsets.items():
        found = next((n for n in spellings(name) if n in modules), None)
        if found is None:
            msg = f"the model has no module {name}; pass the model as it was given to initialize"
            raise PairingError(msg)
        shape = (offset.B.shape[0], offset.A.shape[1])
        weight = writable_weight(found, modules[found], shape, holders)
        if isinstance(weight, str):
            msg = f"{weight}; load the model as it was when training began"
            raise PairingError(msg)
        if tuple(weight.shape) != shape:
            msg = f"the offset of {name} is {shape}, but the base weight {tuple(weight.shape)}"
            raise ShapeError(msg)
        if not _is_its_weight(weight, offset):
            msg = (
                f"the base weight of {name} is not the one its offset was made for, or the offset "
                f"has been taken already; load the original base model"
            )
            raise PairingError(msg)
        weights.append((weight, offset))
    for weight, offset in weights:
        shift(weight, offset)


@torch.no_grad()
def _is_its_weight(weight: Tensor, offset: Offset) -> bool:
    """Return whether a weight is what an offset was made for, up to the rounding of its dtype.

    ``<W0, B A>`` differs by ``s |B A|²`` once the offset is taken, and by about ``|W0∘(B A)|`` in a
    weight that has nothing to do with it. Rounding W0 to bfloat16 changes it by 0.001 of that, and
    where all entries are rounded to one side by at most 0.008 of itself. A weight that has been
    trained a little is not told from W0.
    """
    A, B = (x.to(weight.device, torch.float32) for x in (offset.A, offset.B))
    product, norm = B @ A, torch.linalg.matrix_norm
    taken = offset.scaling * float(norm(product)) ** 2
    rounding = max(0.02 * float(norm(product * weight)), 0.01 * abs(offset.overlap))
    found = overlap(weight, Factors(offset.A, offset.B))
    return abs(found - offset.overlap) <= min(0.5 * taken, rounding)


def save_offsets(offsets: Mapping[str, Offset], path: str | Path) -> None:
    """Write offsets beside an adapter: tensors only.

    Parameters
    ----------
    offsets : mapping of str to Offset
        ``InitReport.offsets``.
    path : str or Path
        Written with safetensors if it ends in ``.safetensors``, else with ``torch.save``.
    """
    state: dict[str, Tensor] = {}
    for name, offset in offsets.items():
        numbers = torch.tensor([offset.scaling, offset.overlap], dtype=torch.float64)
        state |= {f"{name}:A": offset.A.contiguous(), f"{name}:B": offset.B.contiguous()}
        state[f"{name}:scaling_overlap"] = numbers
    if Path(path).suffix == ".safetensors":
        from safetensors.torch import save_file

        save_file(state, path)
    else:
        torch.save(state, path)


def load_offsets(path: str | Path) -> dict[str, Offset]:
    """Read what `save_offsets` has written.

    Parameters
    ----------
    path : str or Path
        Read with safetensors, or with ``torch.load(weights_only=True)``.

    Returns
    -------
    dict of str to Offset

    Raises
    ------
    ValueError
        When the file has something else, as an adapter's own has.
    """
    if Path(path).suffix == ".safetensors":
        from safetensors.torch import load_file

        state = load_file(path)
    else:
        state = torch.load(path, map_location="cpu", weights_only=True)
    keys = [*map(str, state)] if isinstance(state, Mapping) else [type(state).__name__]
    names = [key.removesuffix(":A") for key in keys if key.endswith(":A")]
    if odd := {*keys} ^ {f"{name}:{part}" for name in names for part in PARTS}:
        msg = (
            f"{path} is no file of save_offsets, which has the tensors A, B and scaling_overlap of "
            f"each layer: {min(odd)!r} is missing or one too many; give the path that save_offsets "
            f"was given"
        )
        raise ValueError(msg)
    found = {}
    for name in names:
        s, inner = state[f"{name}:scaling_overlap"].tolist()
        found[name] = Offset(state[f"{name}:A"], state[f"{name}:B"], s, inner)
    return found

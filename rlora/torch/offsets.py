"""What a start has taken from the base weights: kept, restored, or folded into a plain adapter."""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from rlora.core.axes import Layout, View
from rlora.core.dispatch import get_backend
from rlora.core.errors import PairingError, ShapeError
from rlora.core.factors import Factors
from rlora.initializers import Start
from rlora.pairing import Known, PairReport, find_pairs
from rlora.torch.layers import plain_weight, weight_owners
from rlora.torch.matching import what_modules_know

PREFIX = "base_model.model."
"""What PEFT puts before the names of the model it wraps."""


def spellings(layer: str) -> tuple[str, str, str]:
    """A layer's name as it is, without what PEFT puts before it, and with it."""
    bare = layer.removeprefix(PREFIX)
    return layer, bare, PREFIX + bare


class Offset(NamedTuple):
    """What was taken from one base weight: it is ``W0 - s B A`` now.

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
    >>> from rlora.torch.offsets import Offset, restore_offsets
    >>> model = torch.nn.Sequential(torch.nn.Linear(2, 2))
    >>> torch.nn.init.eye_(model[0].weight).requires_grad_(False).tolist()
    [[1.0, 0.0], [0.0, 1.0]]
    >>> ones = Offset(torch.ones(1, 2), torch.ones(2, 1), scaling=0.5, overlap=2.0)
    >>> restore_offsets(model, {"0": ones})
    >>> model[0].weight.tolist()
    [[0.5, -0.5], [-0.5, 0.5]]
    """
    modules, owners = dict(model.named_modules()), weight_owners(model)
    weights: list[tuple[Tensor, Offset]] = []
    for name, offset in offsets.items():
        module = next((modules[n] for n in spellings(name) if n in modules), None)
        if module is None:
            msg = f"the model has no module {name}; pass the model as it was given to initialize"
            raise PairingError(msg)
        weight = plain_weight(name, module, owners)
        if isinstance(weight, str):
            msg = f"{weight}; load the model as it was when training began"
            raise PairingError(msg)
        shape = (offset.B.shape[0], offset.A.shape[1])
        if tuple(weight.shape) != shape:
            msg = f"the offset of {name} is {shape}, but the base weight {tuple(weight.shape)}"
            raise ShapeError(msg)
        pair = Factors(offset.A, offset.B)
        taken = offset.scaling * float(
            ((offset.B.double().mT @ offset.B.double()) * _gram(offset.A)).sum()
        )
        if not abs(overlap(weight, pair) - offset.overlap) <= 0.5 * abs(taken):
            msg = (
                f"the base weight of {name} is not the one its offset was made for, or the offset "
                f"has been taken already; load the original base model"
            )
            raise PairingError(msg)
        weights.append((weight, offset))
    for weight, offset in weights:
        shift(weight, offset)


def _gram(A: Tensor) -> Tensor:
    return A.double() @ A.double().mT


def as_plain_lora(
    adapter: nn.Module | Mapping[str, Tensor],
    offsets: Mapping[str, Offset],
    *,
    name: str = "default",
    known: Known | None = None,
) -> dict[str, Tensor]:
    """A trained adapter as an ordinary LoRA of rank 2r for the untouched base model.

    ``W0 - s B₀A₀ + s B A = W0 + s [B, -B₀] [A; A₀]``. Load it with r and the scaling's alpha
    changed: r and all of ``rank_pattern`` doubled; alpha and all of ``alpha_pattern`` doubled too,
    or with rsLoRA times the root of 2, so that s stays.

    Parameters
    ----------
    adapter : nn.Module or mapping of str to Tensor
        The model, or an adapter's state: ``peft.get_peft_model_state_dict(model)``, or what
        ``adapter_model.safetensors`` holds. It is not changed.
    offsets : mapping of str to Offset
        ``InitReport.offsets``, or from `load_offsets`. Their names may lack what PEFT puts before
        those of the state (``base_model.model.``), or the other way round.
    name : str
        Of the adapter, where a model is given.
    known : mapping of str to Layout, optional
        Of layers of a state how their factors lie, as in `rlora.find_pairs`; a model knows it.

    Returns
    -------
    dict of str to Tensor
        Under the names of the state. Those of a model are as PEFT saves them, without its
        ``modules_to_save``. Layers without an offset are filled up with zeros to rank 2r, inside
        each expert, group or block where a tensor holds several pairs.

    Raises
    ------
    PairingError
        When there is no offset, or an offset's layer is not in the state; when factors have no
        partner, have a diagonal between them, or may be experts whose number nobody tells; when
        there is no such adapter, or the state has several.
    ShapeError
        When an offset's layer is there with another shape.

    Notes
    -----
    Over a base in half precision the two agree to its rounding only: ``W0 - s B₀A₀`` was rounded.

    Examples
    --------
    >>> import torch
    >>> from rlora.torch.offsets import Offset, as_plain_lora
    >>> state = {"q.lora_A.weight": torch.ones(1, 3), "q.lora_B.weight": torch.ones(2, 1)}
    >>> start = {"q": Offset(torch.ones(1, 3), torch.ones(2, 1), scaling=1.0, overlap=0.0)}
    >>> as_plain_lora(state, start)["q.lora_B.weight"].tolist()
    [[1.0, -1.0], [1.0, -1.0]]
    """
    if not offsets:
        msg = "there is no offset: the adapter is an ordinary LoRA already, save it as it is"
        raise PairingError(msg)
    state = adapter
    if isinstance(adapter, nn.Module):
        told = (what_modules_know(adapter) or {}).items()
        # What is no single pair for an optimizer, as a shared factor, is filled up all the same.
        mine = {x.removesuffix(f" ({name})"): how for x, how in told if isinstance(how, Layout)}
        state, known = _state(adapter, name), {**mine, **(known or {})}
    plain = {key: tensor.detach().clone() for key, tensor in state.items()}
    met: set[str] = set()
    for pair in _pairs(state, known):
        layer = next((n for n in spellings(pair.layer) if n in offsets), None)
        met |= {layer} - {None}
        for side, key in enumerate((pair.a, pair.b)):
            start = torch.zeros_like(plain[key])
            if layer is not None:
                start = -offsets[layer].B if side else offsets[layer].A
            if start.shape != plain[key].shape:
                msg = f"{key} is {tuple(plain[key].shape)}, but its start was {tuple(start.shape)}"
                raise ShapeError(msg)
            plain[key] = _joined([views[side] for views in pair.views], side, plain[key], start)
    if missing := sorted(offsets.keys() - met):
        msg = f"no factors of {missing[0]} in the adapter's state; its layers must be named so"
        raise PairingError(msg)
    return plain


def _pairs(state: Mapping[str, Tensor], known: Known | None) -> PairReport:
    """The pairs of a state; an error unless all factors in it are of one adapter, and in pairs."""
    report = find_pairs(state, known=known)
    for key, why in report.refused.items():
        msg = f"{key} cannot be brought to rank 2r: {why}"
        raise PairingError(msg)
    for pair in report:
        if pair.middle is not None:
            msg = f"{pair.name} cannot be brought to rank 2r: {pair.middle} is between its factors"
            raise PairingError(msg)
    if len(names := {pair.adapter for pair in report}) > 1:
        msg = f"the state has the adapters {', '.join(sorted(map(str, names)))}; give that of one"
        raise PairingError(msg)
    return report


def _joined(views: Sequence[View], side: int, tensor: Tensor, start: Tensor) -> Tensor:
    """A stored factor and its start side by side along the rank, in the layout of the factor."""
    start = start.to(tensor.device, tensor.dtype)
    parts = []
    for view in views:
        both = torch.cat([view.read(tensor), view.read(start)], dim=side - 2)
        parts.append(view.of_rank(both.shape[side - 2], side).write(both))
    return torch.cat(parts)


def _state(model: nn.Module, name: str) -> dict[str, Tensor]:
    """An adapter's tensors under the names that PEFT saves them by."""
    part = re.compile(rf"(\.lora_\w+)\.{re.escape(name)}(?=\.|$)")
    named = {key: p for key, p in model.named_parameters() if ".lora_" in key}
    mine = {part.sub(r"\1", key): p.detach() for key, p in named.items() if part.search(key)}
    adapters = {pair.adapter for pair in find_pairs(named, known={})} - {None}
    if adapters and not mine:
        msg = f"the model has no adapter {name!r}; it has {', '.join(sorted(map(repr, adapters)))}"
        raise PairingError(msg)
    return mine or named


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
    """
    if Path(path).suffix == ".safetensors":
        from safetensors.torch import load_file

        state = load_file(path)
    else:
        state = torch.load(path, map_location="cpu", weights_only=True)
    found = {}
    for name in (key.removesuffix(":A") for key in state if key.endswith(":A")):
        s, inner = state[f"{name}:scaling_overlap"].tolist()
        found[name] = Offset(state[f"{name}:A"], state[f"{name}:B"], s, inner)
    return found

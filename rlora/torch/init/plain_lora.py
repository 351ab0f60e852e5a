"""A trained adapter whose start was taken from the base weights, as an ordinary LoRA of rank 2r."""

import re
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from rlora.core.errors import PairingError, ShapeError
from rlora.core.layout import Layout, View
from rlora.pairing import Known, PairReport, find_pairs
from rlora.torch.init.offsets import Offset, spellings
from rlora.torch.pairing.modules import what_modules_know
from rlora.torch.pairing.pairs import memory


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
        ``InitReport.offsets``, or from `load_offsets`. Their names may lack the prefix that PEFT
        gives to those of the state (``base_model.model.``), or the other way round.
    name : str
        Name of the adapter, where a model is given.
    known : mapping of str to Layout, optional
        Layouts of factors in a state, by layer, as in `rlora.find_pairs`; a model knows them.

    Returns
    -------
    dict of str to Tensor
        Under the names of the state; of a model as PEFT saves it. Layers without an offset are
        filled up with zeros to rank 2r, inside each expert, group or block where a tensor holds
        several pairs.

    Raises
    ------
    PairingError
        When there is no offset, or an offset's layer is not in the state; when factors have no
        partner, have a diagonal between them, or may be experts of unknown number; when
        there is no such adapter, or the state has several.
    ShapeError
        When an offset's layer is there with another shape.

    Notes
    -----
    Over a base in half precision the two agree to its rounding only: ``W0 - s B₀A₀`` was rounded.

    Examples
    --------
    >>> import torch
    >>> from rlora.torch import Offset, as_plain_lora
    >>> state = {"q.lora_A.weight": torch.ones(1, 3), "q.lora_B.weight": torch.ones(2, 1)}
    >>> start = {"q": Offset(torch.ones(1, 3), torch.ones(2, 1), scaling=1.0, overlap=0.0)}
    >>> as_plain_lora(state, start)["q.lora_B.weight"].tolist()
    [[1.0, -1.0], [1.0, -1.0]]
    """
    if not offsets:
        msg = "there is no offset: the adapter is an ordinary LoRA already, save it as it is"
        raise PairingError(msg)
    state, known = state_of(adapter, name, known)
    plain = {key: tensor.detach().clone() for key, tensor in state.items()}
    met: set[str] = set()
    for pair in _pairs(state, known):
        layer = next((n for n in spellings(pair.layer) if n in offsets), None)
        for side, key in enumerate((pair.a, pair.b)):
            start = torch.zeros_like(plain[key])
            if layer is not None:
                met.add(layer)
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
        if pair.diagonal is not None:
            msg = (
                f"{pair.name} cannot be brought to rank 2r: {pair.diagonal} is between its factors"
            )
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


def state_of(
    adapter: nn.Module | Mapping[str, Tensor], name: str, known: Known | None
) -> tuple[dict[str, Tensor], Known | None]:
    """An adapter's state, and with a model what its modules know of layouts."""
    if not isinstance(adapter, nn.Module):
        return dict(adapter), known
    told = (what_modules_know([(0, adapter)]) or {}).items()
    # Factors in no single pair of an optimizer, as a shared one, count all the same.
    mine = {x.removesuffix(f" ({name})"): how for x, how in told if isinstance(how, Layout)}
    return _state(adapter, name), {**mine, **(known or {})}


def _state(model: nn.Module, name: str) -> dict[str, Tensor]:
    """An adapter's tensors under the names that PEFT saves them by, trained heads among them."""
    config = (getattr(model, "peft_config", None) or {}).get(name)
    if getattr(config, "peft_type", None) == "LORA":
        from peft import get_peft_model_state_dict

        saved = get_peft_model_state_dict(model, adapter_name=name, save_embedding_layers=False)
        # Of a factor that two layers share one name is left: it has no single partner.
        first = {memory(x): key for key, x in reversed(saved.items())}
        return {key: x.detach() for key, x in saved.items() if first[memory(x)] == key}
    part = re.compile(rf"(\.lora_\w+)\.{re.escape(name)}(?=\.|$)")
    named = {key: p.detach() for key, p in model.named_parameters() if ".lora_" in key}
    mine = {part.sub(r"\1", key): p for key, p in named.items() if part.search(key)}
    adapters = {pair.adapter for pair in find_pairs(named, known={})} - {None}
    if not named or (adapters and not mine):
        known = ", ".join(sorted(map(repr, adapters))) or "none"
        msg = f"the model has no adapter {name!r}; it has {known}"
        raise PairingError(msg)
    return mine or named

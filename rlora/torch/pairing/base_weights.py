"""Base weights of LoRA layers: which may be written to, and which others use too."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from rlora.core.errors import PairingError
from rlora.torch.pairing.layers import LoraLayer, base_of, is_conv1d, is_plain

Places = Mapping[int, list[tuple[str, nn.Module]]]
"""Every place of a model that has a parameter, by the address of its memory, with the module."""


def weight_places(model: nn.Module) -> Places:
    """The places of every parameter; a module that two others call stands in two places."""
    modules = [("", model)]
    for path, parent in model.named_modules():
        start = f"{path}." if path else ""
        children = parent._modules.items()  # `named_children` has each child once
        modules += [(start + key, child) for key, child in children if child is not None]
    places: dict[int, list[tuple[str, nn.Module]]] = {}
    for name, module in modules:
        for p in module._parameters.values():
            if p is not None:
                places.setdefault(p.data_ptr(), []).append((name, module))
    return places


def other_places(name: str, module: nn.Module, places: Places) -> list[str]:
    """The places of a layer's base weight outside of the layer."""
    base = base_of(module)
    weight = None if base is None else base._parameters.get("weight")
    if weight is None:
        return []
    inside = f"{name}." if name else ""
    return [
        place
        for place, holder in places.get(weight.data_ptr(), ())
        if holder is not base or not (base is module or place.startswith(inside))
    ]


def plain_weight(name: str, module: nn.Module, places: Places) -> Tensor | str:
    """The base weight as (m, n), to be written to, or why it must stay as it is."""
    base = base_of(module)
    weight = None if base is None else base._parameters.get("weight")
    if weight is None or not is_plain(weight):
        what = f"{type(weight).__name__} {getattr(weight, 'dtype', '')}".strip()
        return f"the base weight of {name} is quantised or packed ({type(base).__name__}: {what})"
    if any(n > 1 and not step for n, step in zip(weight.shape, weight.stride(), strict=True)):
        return f"the base weight of {name} has entries that share memory, as Tensor.expand makes"
    if elsewhere := other_places(name, module, places):
        return f"the base weight of {name} is that of {elsewhere[0]} too, which must not change"
    # Conv1D and loralib's fan_in_fan_out store W as (n, m).
    turned = is_conv1d(base) or getattr(module, "fan_in_fan_out", False)
    return weight.mT if turned else weight


def movable_weight(layer: LoraLayer, places: Places) -> Tensor:
    """The base weight of a layer as (m, n), unless there is a reason not to change it."""
    weight = plain_weight(layer.name, layer.module, places)
    if isinstance(weight, str):
        why = weight
    elif layer.adapters:
        why = f"the base weight of {layer.name} is under adapter {layer.adapters[0]} too"
    elif isinstance(layer.base, NonDynamicallyQuantizableLinear):
        # PEFT 0.21 adds its product to this weight twice.
        why = f"{layer.name} is read by nn.MultiheadAttention, which does not call it"
    elif bool(torch.any(layer.B != 0)):
        why = f"the adapter of {layer.name} is in use: B is not zero"
    elif layer.scaling is None:
        msg = f"{layer.name} does not say its scaling s; pass scaling="
        raise ValueError(msg)
    else:
        return weight
    msg = f"{why}, and this method changes base weights; lora_one, lora_sb and eva do not"
    raise PairingError(msg)

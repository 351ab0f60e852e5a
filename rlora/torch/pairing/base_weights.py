"""Base weights of LoRA layers: which may be written to, and which others use too."""

from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from rlora.core.errors import PairingError
from rlora.torch.pairing.layers import LoraLayer, base_of, is_conv1d, is_plain
from rlora.torch.pairing.pairs import memory

Place = tuple[str, nn.Module]
"""A name by which a model has a module; one that two others call has two of them."""


Holders = Mapping[int, Sequence[Place]]
"""The places of the modules that hold a parameter, by the address of its memory."""


def module_places(model: nn.Module) -> list[Place]:
    """The places of every module, the model itself included."""
    places = [("", model)]
    for path, parent in model.named_modules():
        start = f"{path}." if path else ""
        children = parent._modules.items()  # `named_children` has each child once
        places += [(start + key, child) for key, child in children if child is not None]
    return places


def weight_places(places: Iterable[Place]) -> Holders:
    """The places of a model's modules by the parameters that these hold."""
    found: dict[int, list[Place]] = {}
    for name, module in places:
        for p in module._parameters.values():
            if p is not None:
                found.setdefault(memory(p), []).append((name, module))
    return found


def is_called_elsewhere(layer: LoraLayer, places: Iterable[Place]) -> bool:
    """Return whether a layer's base module stands in a place outside of the layer too."""
    return any(
        base is layer.base and not _is_inside(place, layer.name, layer.module, base)
        for place, base in places
    )


def plain_weight(name: str, module: nn.Module, shape: tuple[int, int]) -> Tensor | str:
    """The base weight as `shape`, (m, n), to be read, or why it cannot be."""
    base = base_of(module)
    weight = None if base is None else base._parameters.get("weight")
    if weight is None or not is_plain(weight):
        what = f"{type(weight).__name__} {getattr(weight, 'dtype', '')}".strip()
        return f"the base weight of {name} is quantised or packed ({type(base).__name__}: {what})"
    # Conv1D and loralib's fan_in_fan_out store W as (n, m), and so may a layer of one's own.
    turned = is_conv1d(base) or getattr(module, "fan_in_fan_out", False)
    own = base is module and not isinstance(base, nn.Linear)
    turned = turned or (own and weight.shape != shape and weight.mT.shape == shape)
    return weight.mT if turned else weight


def writable_weight(
    name: str, module: nn.Module, shape: tuple[int, int], holders: Holders
) -> Tensor | str:
    """The base weight as `shape`, (m, n), to be written to, or why it must stay as it is."""
    weight, base = plain_weight(name, module, shape), base_of(module)
    if isinstance(weight, str):
        return weight
    if any(n > 1 and not step for n, step in zip(weight.shape, weight.stride(), strict=True)):
        return f"the base weight of {name} has entries that share memory, as Tensor.expand makes"
    if weight.is_inference() and not torch.is_inference_mode_enabled():
        return (
            f"the base weight of {name} is an inference tensor: make it outside of inference_mode()"
        )
    for place, holder in holders.get(memory(weight), ()):
        if holder is not base or not _is_inside(place, name, module, holder):
            return f"the base weight of {name} is that of {place} too, which must not change"
    return weight


def _is_inside(place: str, name: str, module: nn.Module, holder: nn.Module) -> bool:
    """Return whether a place of a base is in the layer, or is the layer itself."""
    return holder is module or place.startswith(f"{name}." if name else "")


def movable_weight(layer: LoraLayer, holders: Holders) -> Tensor:
    """The base weight of a layer as (m, n), unless there is a reason not to change it."""
    weight = writable_weight(layer.name, layer.module, layer.shape, holders)
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
    msg = f"{why}, and this method changes base weights; lora_one, lora_sb and eva, say, do not"
    raise PairingError(msg)

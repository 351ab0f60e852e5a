"""Layouts of LoRA factors and scalings of layers, from the attributes of a model's modules."""

from collections.abc import Iterable, Sequence
from typing import Any
from weakref import ref

from torch import Tensor, nn

from rlora.core.layout import Layout
from rlora.pairing import find_pairs as find_named_pairs
from rlora.torch.pairing.layers import own_scalings


def models_in(params: Any) -> list[tuple[int, nn.Module]]:
    """The models that an optimizer is given, with the positions of their groups."""
    groups = [{"params": params}] if isinstance(params, nn.Module) else params
    groups = [] if isinstance(groups, Tensor) else groups
    held = [group.get("params") if isinstance(group, dict) else None for group in groups]
    return [(i, model) for i, model in enumerate(held) if isinstance(model, nn.Module)]


def references(
    models: Iterable[tuple[int, nn.Module]],
) -> tuple[tuple[int, ref[nn.Module]], ...]:
    """Weak references to models, with the positions of their groups."""
    return tuple((i, ref(model)) for i, model in models)


def scalings_in(models: Iterable[tuple[int, nn.Module]]) -> dict[int, float]:
    """The s of the layers of models, as `own_scalings` has it."""
    return {key: s for _, model in models for key, s in own_scalings(model).items()}


def what_modules_know(models: Sequence[tuple[int, nn.Module]]) -> dict[str, Layout | str] | None:
    """Layouts of the factors that shapes alone do not determine, or the reasons against a pair.

    None without any model.
    """
    known: dict[str, Layout | str] = {}
    for i, model in models:
        told = _known_of(model)
        known |= told | {in_group(i, layer): x for layer, x in told.items()}
    return known if models else None


def _known_of(model: nn.Module) -> dict[str, Layout | str]:
    known: dict[str, Layout | str] = {}
    for name, module in model.named_modules():
        known |= _of_adapters(name, module)
        if told := _of_module(module):
            known[name] = told
    return known | _shared(model)


def in_group(i: int, name: str) -> str:
    """A name that parameters of several groups have, made unique by its group."""
    return f"groups.{i}.{name}"


def _of_module(module: Any) -> Layout | str | None:
    experts, blocks = getattr(module, "num_experts", None), getattr(module, "qkv_shapes", None)
    enabled = getattr(module, "enable_lora", None)
    if getattr(module, "lora_A", None) is not None:
        if hasattr(module, "parameter_name") and isinstance(experts, int) and experts > 1:  # PEFT
            return Layout("(e r) n", "m (r e)", sizes={"e": experts})
        if isinstance(blocks, Sequence):  # litgpt
            return Layout(blocks=tuple(blocks))
        if isinstance(enabled, Sequence):  # loralib
            return Layout("(e r) n", "(e m) r", sizes={"e": sum(map(bool, enabled))})
    activation = getattr(module, "activation", None)
    if hasattr(module, "linear_in") and not isinstance(activation, nn.Identity | None):  # NeMo
        word = getattr(activation, "__name__", type(activation).__name__)
        return f"{word} stands between its factors: no product"
    return None


def _of_adapters(name: str, module: Any) -> dict[str, Layout]:
    """BD-LoRA (PEFT): one factor is block-diagonal, its blocks stored below each other."""
    return {
        f"{name} ({adapter})": Layout("(e r) n", b, sizes={"e": count})
        for word, b in (("lora_A", "m (e r)"), ("lora_B", "(e m) r"))
        if isinstance(factors := getattr(module, word, None), nn.ModuleDict)
        for adapter, factor in factors.items()
        if isinstance(count := getattr(factor, "nblocks", None), int)
    }


def _shared(model: nn.Module) -> dict[str, str]:
    """Layers that have one factor in common, so that it has no single partner."""
    named = dict(model.named_parameters(remove_duplicate=False))
    partners: dict[int, dict[int, str]] = {}
    for pair in find_named_pairs(named):
        a, b = id(named[pair.a]), id(named[pair.b])
        partners.setdefault(a, {})[b] = partners.setdefault(b, {})[a] = pair.name
    tied = [sorted(layers.values()) for layers in partners.values() if len(layers) > 1]
    return {
        layer: f"{' and '.join(layers)} share a factor: it has no single partner"
        for layers in tied
        for layer in layers
    }

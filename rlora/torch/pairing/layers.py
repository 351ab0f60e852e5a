"""The modules of a model that compute ``W x + s B A x``: factors, base weight and scaling."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from numbers import Real
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from rlora.core.errors import PairingError, ShardingError
from rlora.torch.pairing.pairs import is_distributed, memory
from rlora.torch.pairing.sharding_checks import check_whole

FACTORS = (("lora_A", "lora_B"), ("lora_a", "lora_b"))
"""Names of the two factors on the module that holds them; torchtune writes them small."""

MORE_THAN_A_PRODUCT = {
    "lora_E": "AdaLoRA's diagonal stands between its factors",
    "lora_mid": "Tucker factors are three tensors, not a pair",
    "lora_diag": "KaSA's diagonal stands between its factors",
    "magnitude": "DoRA's output is not linear in B A",
}
Held = dict[str | None, tuple[Tensor, Tensor]]
"""The pairs of one module by adapter; None is the name of a pair that has none."""

PLAIN_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


class Target(NamedTuple):
    """A module that computes ``X Wᵀ``, the shape (m, n) of W, and where to form the gradient."""

    module: nn.Module
    shape: tuple[int, int]
    device: torch.device


@dataclass(frozen=True, eq=False)
class LoraLayer:
    """One adapted linear layer.

    Parameters
    ----------
    name : str
        Name of the module that holds the factors, in ``named_modules()``.
    module, base : nn.Module
        That module, and the one whose forward has W; they may be the same.
    A, B : Tensor
        The factors, (r, n) and (m, r).
    scaling : float, optional
        The s, where the module says it.
    adapters : tuple of str
        Other adapters of the same module.
    """

    name: str
    module: nn.Module
    base: nn.Module
    A: Tensor
    B: Tensor
    scaling: float | None = None
    adapters: tuple[str, ...] = ()

    @property
    def rank(self) -> int:
        return self.A.shape[0]

    @property
    def shape(self) -> tuple[int, int]:
        return self.B.shape[0], self.A.shape[1]

    def target(self, *, whole: bool = False) -> Target:
        """The module whose calls are watched: the base, or the `whole` layer ``W x + s B A x``."""
        return Target(self.module if whole else self.base, self.shape, self.A.device)


def linear_target(name: str, module: Any) -> Target:
    """A linear layer without adapters, as a target."""
    if isinstance(module, nn.Linear):
        return Target(module, (module.out_features, module.in_features), module.weight.device)
    if is_conv1d(module):
        n, m = module.weight.shape
        return Target(module, (m, n), module.weight.device)
    kind = "not in the model" if module is None else f"a {type(module).__name__}"
    msg = f"{name!r} is {kind}; name nn.Linear layers as model.named_modules() does"
    raise PairingError(msg)


def is_conv1d(module: Any) -> bool:
    """Return whether this is transformers' linear layer with W stored as (n, m)."""
    return type(module).__name__ == "Conv1D" and hasattr(module, "nf")


def find_layers(
    model: nn.Module, adapter: str = "default", scaling: float | None = None
) -> tuple[list[LoraLayer], dict[str, str]]:
    """The adapted linear layers of a model, and of its other adapted modules why they are none."""
    check_whole(model.named_parameters())
    if any(map(is_distributed, model.parameters())):
        msg = "the model is sharded already: call initialize and suggest_lr before fully_shard"
        raise ShardingError(msg)
    held = {name: pairs for name, module in model.named_modules() if (pairs := _held(module))}
    owners: dict[int, list[str]] = {}
    for name, pairs in held.items():
        for p in {id(p): p for pair in pairs.values() for p in pair}.values():
            owners.setdefault(memory(p), []).append(name)
    layers: list[LoraLayer] = []
    skipped: dict[str, str] = {}
    for name, pairs in held.items():
        key = adapter if adapter in pairs else None
        if key not in pairs:
            continue
        found = _read(name, model.get_submodule(name), pairs, key, owners)
        if isinstance(found, str):
            skipped[name] = found
        else:
            layers.append(replace(found, scaling=_scaling(found, adapter, scaling)))
    if not layers:
        adapters = {str(key) for pairs in held.values() for key in pairs if key is not None}
        raise _nothing(adapter, adapters, skipped)
    return layers, skipped


def choose(found: Iterable[LoraLayer], wanted: Iterable[str] | None) -> dict[str, LoraLayer]:
    """Those of the layers whose names are wanted, or all; every name must be there."""
    if isinstance(wanted, str):
        msg = f"layers must be a list of names, as [{wanted!r}], got the text {wanted!r}"
        raise TypeError(msg)
    known = {layer.name: layer for layer in found}
    names = set(known if wanted is None else wanted)
    if not names or not names <= known.keys():
        unknown = min(names - known.keys(), default="in an empty list")
        msg = f"no adapted linear layer {unknown}; there are {', '.join(list(known)[:5])}"
        raise PairingError(msg)
    return {name: layer for name, layer in known.items() if name in names}


def _read(
    name: str, module: nn.Module, pairs: Held, key: str | None, owners: Mapping[int, list[str]]
) -> LoraLayer | str:
    A, B = pairs[key]
    base = base_of(module)
    if base is None:
        return "no base layer found in it"
    if why := _no_layer(module, base, key, A, B):
        return why
    holders = {n for p in (A, B) for n in owners[memory(p)]} - {name}
    if holders:
        return f"shares a factor with {min(holders)}"
    others = tuple(str(other) for other in pairs if other != key)
    return LoraLayer(name, module, base, A, B, adapters=others)


def _held(module: nn.Module) -> Held:
    held: Held = {}
    for names in (*FACTORS, ("lora_embedding_A", "lora_embedding_B")):
        a, b = (getattr(module, name, None) for name in names)
        if a is None or b is None:
            continue
        named = isinstance(a, (nn.ModuleDict, nn.ParameterDict, Mapping))
        for key in sorted(a.keys() & b.keys(), key=str) if named else [None]:
            A, B = ((x[key] if named else x) for x in (a, b))
            A, B = (getattr(x, "weight", x) for x in (A, B))
            if isinstance(A, Tensor) and isinstance(B, Tensor):
                held[key] = (A, B)
    return held


def base_of(module: nn.Module) -> nn.Module | None:
    """The module whose forward has the base weight: below ``base_layer``, itself, or a child."""
    while isinstance(inner := getattr(module, "base_layer", None), nn.Module):
        module = inner
    if "weight" in module._parameters or not _held(module):
        return module
    children = [c for n, c in module.named_children() if "lora" not in n and _is_linear(c)]
    return children[0] if len(children) == 1 else None


def _is_linear(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear) or is_conv1d(module) or "Linear" in type(module).__name__


def _no_layer(
    module: nn.Module, base: nn.Module, adapter: str | None, A: Tensor, B: Tensor
) -> str | None:
    kind = type(base).__name__
    variant = getattr(module, "lora_variant", {}).get(adapter)
    if variant is not None or adapter in getattr(module, "lora_magnitude_vector", ()):
        return f"it has a variant of PEFT's, {type(variant).__name__}, and is no plain LoRA"
    for sibling, why in MORE_THAN_A_PRODUCT.items():
        if hasattr(module, sibling):
            return why
    if isinstance(base, nn.Embedding) or hasattr(base, "num_embeddings"):
        return f"the base is an embedding ({kind}), which has no dense input"
    wrapped = hasattr(module, "num_experts")  # PEFT's, of one parameter
    if wrapped and (parameter := getattr(module, "parameter_name", "weight")) != "weight":
        return f"it adapts {parameter!r} of a {kind}, not the weight of a linear layer"
    if A.is_meta or B.is_meta:
        return (
            "its factors are on the meta device; load the adapter without low_cpu_mem_usage, and "
            "offload the model later"
        )
    if A.ndim != 2 or B.ndim != 2:
        return f"the base is a convolution ({kind}); only linear layers have a start here"
    weight = base._parameters.get("weight")
    shape = (B.shape[0], A.shape[1])
    fits = weight is not None and tuple(weight.shape) in (shape, shape[::-1])
    if A.shape[0] != B.shape[1] or (is_plain(weight) and not fits):
        of = f" of a weight {tuple(weight.shape)}" if weight is not None else ""
        return f"A {tuple(A.shape)} and B {tuple(B.shape)} are not one pair{of}"
    if not (_is_linear(base) or (base is module and fits)):
        return f"the base is a {kind}, which is no linear layer"
    return None


def is_plain(weight: Any) -> bool:
    """Return whether a weight is a matrix of reals, neither packed nor quantised nor elsewhere."""
    return (
        type(weight) in (nn.Parameter, Tensor)
        and weight.dtype in PLAIN_DTYPES
        and weight.ndim == 2
        and not weight.is_meta
        and not hasattr(weight, "quant_state")
    )


def _scaling(layer: LoraLayer, adapter: str, given: float | None) -> float | None:
    own = own_scaling(layer.module, adapter)
    if given is not None and getattr(given, "shape", None) == ():
        given = float(given)
    if own is not None and given is not None and own != given:
        msg = f"scaling={given!r} was given, but {layer.name} has {own!r}; leave it out"
        raise ValueError(msg)
    return given if own is None else own


def own_scaling(module: Any, adapter: str | None) -> float | None:
    """The s that a module says of one of its adapters."""
    own: Any = getattr(module, "scaling", None)
    own = own.get(adapter) if isinstance(own, Mapping) else own
    # The α of SD-LoRA is trained.
    if own is None and not hasattr(module, "magnitudes"):
        alpha, rank = getattr(module, "alpha", None), getattr(module, "rank", None)
        own = alpha / rank if isinstance(alpha, Real) and isinstance(rank, Real) else None
    fixed = isinstance(own, Tensor) and own.numel() == 1 and not own.requires_grad
    return float(own) if fixed or isinstance(own, Real) else None


def own_scalings(model: nn.Module) -> dict[int, float]:
    """The s of every layer that says it, by the identity of both of its factors."""
    return {
        id(p): s
        for module in model.modules()
        for adapter, pair in _held(module).items()
        if (s := own_scaling(module, adapter))  # of 0 no step is right: the layer is switched off
        for p in pair
    }


def _nothing(adapter: str, adapters: set[str], skipped: Mapping[str, str]) -> PairingError:
    why = "".join(f"\n  skipped {name}: {why}" for name, why in list(skipped.items())[:5])
    known = ", ".join(sorted(adapters)) or "none"
    base = "(a module with lora_A, lora_B and a base)"
    msg = f"no adapted linear layer {base} has {adapter!r}; the model has {known}{why}"
    if skipped and adapter in adapters:
        msg = f"no adapted linear layer of adapter {adapter!r} has the output W x + s B A x{why}"
    return PairingError(msg)

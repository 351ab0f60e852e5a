"""The start of one layer by a method of `rlora.initializers`."""

import inspect
import zlib
from collections.abc import Mapping
from typing import Any, Final, Literal

import torch
from torch import Tensor, nn

from rlora import initializers
from rlora.core.checks import check_count, check_scaling
from rlora.core.errors import NumericsError, PairingError, ShapeError
from rlora.core.factors import Factors
from rlora.initializers import Start
from rlora.initializers.svd import randomized_svd
from rlora.torch.pairing.layers import LoraLayer

Method = Literal[
    "lora_one",
    "lora_ga",
    "lora_sb",
    "loi",
    "eva",
    "pissa",
    "milora",
    "olora",
    "gaussian",
    "init_ab",
    "orthogonal",
]
FROM_GRADIENT: Final = ("lora_one", "lora_ga", "lora_sb", "loi")
FROM_SHAPE: Final = ("gaussian", "init_ab", "orthogonal")


def moves_weights(method: str, options: Mapping[str, Any]) -> bool:
    """Return whether the method changes base weights; raises for options that it does not take."""
    names = option_names(method)
    if unknown := [name for name in options if name not in names]:
        msg = (
            f"initialize(method={method!r}) has no option {unknown[0]!r}; it has "
            f"{', '.join(names) or 'none'}"
        )
        raise TypeError(msg)
    given = {**options, **of_layer(method, options, "", 1.0, 4)}
    start: Start = getattr(initializers, method)(torch.eye(4), 2, **given)
    return start.offset is not None


def option_names(method: str) -> list[str]:
    """Options of a method that do not come from the layer."""
    parameters = [*inspect.signature(getattr(initializers, method)).parameters.values()]
    if any(p.kind is p.VAR_KEYWORD for p in parameters):  # those of the decomposition
        parameters += inspect.signature(randomized_svd).parameters.values()
    own = [p.name for p in parameters if p.kind is p.KEYWORD_ONLY]
    return [name for name in own if name not in ("scaling", "out_features")]


def check_model(model: Any) -> None:
    """TypeError unless this is a module of torch."""
    if not isinstance(model, nn.Module):
        msg = f"expected a model, an nn.Module, got a {type(model).__name__}; give the model itself"
        raise TypeError(msg)


def of_layer(
    method: str, options: Mapping[str, Any], name: str, scaling: float | None, out_features: int
) -> dict[str, Any]:
    """Options of a method that come from the layer."""
    if method in ("pissa", "milora"):
        return {"scaling": scaling}
    if method == "eva":
        return {"out_features": out_features}
    if method in FROM_SHAPE:  # the order of the layers must not matter
        check_count("seed", options.get("seed", 0), 0)
        return {"seed": options.get("seed", 0) + zlib.crc32(name.encode())}
    return {}


def check_unmerged(layer: LoraLayer) -> None:
    """PairingError if the weight of a layer is no longer W0."""
    if getattr(layer.module, "merged", False):
        msg = f"{layer.name} has its adapter merged into W; unmerge it first"
        raise PairingError(msg)


def check_layer(layer: LoraLayer, method: str) -> None:
    check_unmerged(layer)
    if layer.scaling is not None:
        try:
            check_scaling(layer.scaling)
        except (TypeError, ValueError) as error:
            error.add_note(f"in layer {layer.name}")
            raise
    if method == "lora_sb" and layer.scaling != 1.0:
        msg = (
            f"lora_sb needs a scaling of 1, but that of {layer.name} is {layer.scaling}; set "
            f"alpha = r, or pass scaling=1.0 if the layer says none"
        )
        raise ValueError(msg)


@torch.no_grad()
def start_of(
    chosen: Mapping[str, LoraLayer],
    method: str,
    options: Mapping[str, Any],
    name: str,
    matrix: Tensor,
) -> tuple[Start, float | None] | str:
    """The start in the dtype of the layer's factors and the norm of its gradient, or why none."""
    layer = chosen[name]
    from_gradient = method in FROM_GRADIENT
    if (from_gradient or method in ("pissa", "milora")) and not matrix.any():
        return f"its {'gradient' if from_gradient else 'base weight'} is zero"
    if method == "eva":
        if len(matrix) < layer.rank:
            return f"{len(matrix)} rows of inputs came for rank {layer.rank}; give more batches"
        if _are_alike(matrix):
            return "its inputs are all alike"
    told = of_layer(method, options, name, layer.scaling, layer.shape[0])
    try:
        start: Start = getattr(initializers, method)(matrix, layer.rank, **{**options, **told})
    except ShapeError as error:
        return f"{error} ({method}); method='gaussian' starts a layer of any rank"
    except Exception as error:
        _check_finite(matrix, method, layer)  # LAPACK's own error says less
        error.add_note(f"in layer {layer.name}, {layer.shape}, rank {layer.rank}")
        raise
    params = _rounded(layer, start.params)
    offset = None if start.offset is None else _rounded(layer, start.offset)
    for x in params:
        if not torch.isfinite(x).all():
            _check_finite(matrix, method, layer)
            msg = f"the start of {layer.name} is not finite in {x.dtype}"
            raise NumericsError(msg)
    norm = float(torch.linalg.matrix_norm(matrix)) if from_gradient else None
    return Start(params, offset), norm


def _check_finite(matrix: Tensor, method: str, layer: LoraLayer) -> None:
    if not torch.isfinite(matrix).all():
        kind = "inputs" if method == "eva" else "base weight"
        source = "gradient" if method in FROM_GRADIENT else kind
        msg = f"{method} needs finite numbers, and those of {layer.name}, its {source}, are not"
        raise NumericsError(msg)


def _are_alike(X: Tensor) -> bool:
    """Return whether the rows (t, n) differ by no more than their rounding."""
    wide = X.to(torch.promote_types(X.dtype, torch.float32))
    about_mean, whole = (torch.linalg.matrix_norm(x) for x in (wide - wide.mean(0), wide))
    eps = max(torch.finfo(X.dtype).eps, 10 * torch.finfo(wide.dtype).eps)
    return bool(about_mean <= eps * whole)


def _rounded(layer: LoraLayer, pair: Factors) -> Factors:
    A, B = pair
    return Factors(A.to(layer.A.device, layer.A.dtype), B.to(layer.B.device, layer.B.dtype))

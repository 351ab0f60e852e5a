"""A first learning rate for a model with adapters, from its frozen weights."""

import math
from statistics import median

import torch
from torch import Tensor, nn

from rlora.core.errors import NumericsError, PairingError
from rlora.core.suggest_lr import suggest_lr as of_numbers
from rlora.torch.init.starts import check_model, check_unmerged
from rlora.torch.pairing.base_weights import plain_weight
from rlora.torch.pairing.layers import find_layers


@torch.no_grad()
def suggest_lr(
    model: nn.Module, *, adapter: str = "default", scaling: float | None = None
) -> float:
    """First learning rate to try with `ScaledAdamW`: the median over layers of `rlora.suggest_lr`.

    It is for classes whose steps are normalised as Adam's. Those of `ScaledSGD`, `AltLoRA`,
    `LoRAProSGD`, `OPLoRA`, `RACLoRA` and `RefLoRA` go with the size of the gradient: begin at 4e-3
    and sweep by factors of 10.

    Parameters
    ----------
    model : nn.Module
        A PEFT model, or any with modules that have lora_A, lora_B and a base, as for `initialize`.
    adapter : str
        Where adapters have names.
    scaling : float, optional
        The s of layers that do not say it themselves.

    Returns
    -------
    float
        The highest rate of a schedule with a short warm-up.

    Raises
    ------
    PairingError
        When no layer is a linear one with the output ``W x + s B A x``, which DoRA, AdaLoRA,
        convolutions and embeddings are not; when no base weight can be read: a quantised one
        cannot; when an adapter is merged.
    ValueError
        When a layer does not say its s and none is given.
    NumericsError, TypeError
        When a base weight is not finite; when `model` is no nn.Module.

    Examples
    --------
    >>> import torch, rlora.torch
    >>> layer = torch.nn.Linear(16, 32)
    >>> layer.weight = torch.nn.Parameter(torch.full((32, 16), 0.02))
    >>> layer.lora_A = torch.nn.Parameter(torch.ones(4, 16))
    >>> layer.lora_B = torch.nn.Parameter(torch.zeros(32, 4))
    >>> round(rlora.torch.suggest_lr(torch.nn.Sequential(layer), scaling=2.0), 5)
    0.00125
    """
    check_model(model)
    layers, _ = find_layers(model, adapter, scaling)
    rates, why = [], ""
    for layer in layers:
        check_unmerged(layer)
        weight = plain_weight(layer.name, layer.module, layer.shape)
        if isinstance(weight, str):
            why = weight
        elif layer.scaling is None:
            msg = f"{layer.name} does not say its scaling s; pass scaling="
            raise ValueError(msg)
        elif (size := size_of(weight)) == 0.0:
            why = f"the base weight of {layer.name} is zero"
        elif not math.isfinite(size):
            msg = f"the base weight of {layer.name} must be finite, and its entries are not"
            raise NumericsError(msg)
        else:
            rates.append(of_numbers(size, rank=layer.rank, scaling=layer.scaling))
    if not rates:
        msg = (
            f"{why}; call rlora.suggest_lr(size, rank=..., scaling=...) with the root mean square "
            f"of the entries of the weight that was trained"
        )
        raise PairingError(msg)
    return median(rates)


def size_of(weight: Tensor) -> float:
    """Root mean square of the entries."""
    norm = torch.linalg.vector_norm(weight, dtype=torch.promote_types(weight.dtype, torch.float32))
    return float(norm) / math.sqrt(weight.numel())

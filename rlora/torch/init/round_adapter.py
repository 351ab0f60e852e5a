"""A trained adapter in a narrower dtype, with as little change of its products as may be."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from rlora.core.errors import PairingError, ShardingError
from rlora.core.factors import Factors
from rlora.core.layout import read_pairs
from rlora.core.rebalance import rebalance
from rlora.pairing import Known, find_pairs
from rlora.torch.init.plain_lora import state_of
from rlora.torch.pairing.pairs import is_distributed


def round_adapter(
    adapter: nn.Module | Mapping[str, Tensor],
    dtype: torch.dtype = torch.bfloat16,
    *,
    name: str = "default",
    known: Known | None = None,
) -> dict[str, Tensor]:
    """A trained adapter's state in `dtype`, its factors rebalanced before they are rounded.

    `rlora.rebalance` gives every pair factors of the same product that lose the least in rounding.
    The model goes on as it is: train on with that, not with the result.

    Parameters
    ----------
    adapter : nn.Module or mapping of str to Tensor
        The model, or an adapter's state: ``peft.get_peft_model_state_dict(model)``, or what
        ``adapter_model.safetensors`` holds. It is not changed.
    dtype : torch.dtype
        A floating-point one.
    name : str
        Name of the adapter, where a model is given.
    known : mapping of str to Layout, optional
        As for `rlora.find_pairs`; a model of PEFT says it itself.

    Returns
    -------
    dict of str to Tensor
        For ``safetensors.torch.save_file`` or ``peft.set_peft_model_state_dict``. Floating-point
        tensors in no plain pair (AdaLoRA's, heads) are rounded as they are.

    Raises
    ------
    TypeError
        When `dtype` is not a floating-point one.
    ShardingError
        When a factor is a DTensor: gather the state first.
    PairingError
        When the model has no adapter `name`, or something like a factor is in no pair, as one that
        two layers share.

    Examples
    --------
    >>> import torch
    >>> from rlora.torch import round_adapter
    >>> state = {"q.lora_A.weight": torch.randn(4, 16), "q.lora_B.weight": torch.randn(32, 4)}
    >>> round_adapter(state)["q.lora_A.weight"].dtype
    torch.bfloat16
    """
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        msg = f"dtype must be a floating-point torch.dtype, such as torch.bfloat16, got {dtype!r}"
        raise TypeError(msg)
    state, known = state_of(adapter, name, known)
    for key, x in state.items():
        if is_distributed(x):
            msg = f"{key} is a DTensor: gather the state first (full_tensor), then round it"
            raise ShardingError(msg)
    rounded = {key: _cast(x, dtype) for key, x in state.items()}
    report = find_pairs(state, known=known)
    for key, why in report.refused.items():
        msg = f"{key} cannot be rebalanced: {why}; round this adapter as it is, by .to({dtype})"
        raise PairingError(msg)
    for pair in report:
        if pair.diagonal is None:
            factors = read_pairs(pair.views, state[pair.a].detach(), state[pair.b].detach())
            even = rebalance([Factors(*map(_wide, x)) for x in factors])
            for side, key in enumerate((pair.a, pair.b)):
                parts = [
                    views[side].write(x[side]) for views, x in zip(pair.views, even, strict=True)
                ]
                rounded[key] = _cast(torch.cat(parts), dtype)
    return rounded


def _wide(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _cast(x: Tensor, dtype: torch.dtype) -> Tensor:
    """A copy in `dtype`, or in its own if that is of integers."""
    return x.detach().to(dtype if x.is_floating_point() else x.dtype, copy=True).contiguous()

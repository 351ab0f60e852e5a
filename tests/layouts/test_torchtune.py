"""torchtune's layers: PEFT's shapes under other names."""

import warnings

import numpy as np
import pytest
import torch
from layouts import (
    Layer,
    batch,
    check,
    randomize,
    squares,
    stacked_turned,
)
from torch import nn

import rlora
import rlora.torch

try:
    with warnings.catch_warnings(action="ignore"):  # it wants to come before torch
        from torchtune.modules.peft import (
            DoRALinear,
            LoRALinear,
            get_adapter_params,
            set_trainable_params,
        )
except ImportError as error:  # its last release wants a torchao that is older than torch
    pytest.skip(f"torchtune does not import here: {error}", allow_module_level=True)

LAYERS = [Layer(f"{k}.lora_a.weight", f"{k}.lora_b.weight") for k in (0, 2)]


def build(kind):
    torch.manual_seed(0)
    model = nn.Sequential(
        kind(6, 10, rank=3, alpha=3.0), nn.Tanh(), kind(10, 4, rank=2, alpha=2.0)
    ).double()
    for layer in model:
        if kind is DoRALinear and isinstance(layer, kind):
            layer.initialize_dora_magnitude()
    set_trainable_params(model, get_adapter_params(model))
    return randomize(model)


def test_linear():
    model = build(LoRALinear)
    layer, x = model[0], batch(16, 6)
    low_rank = (layer(x) - nn.functional.linear(x, layer.weight)).detach()
    np.testing.assert_allclose(low_rank, x.numpy() @ LAYERS[0].products(model)[0].T, atol=1e-12)
    check(model, squares(x), LAYERS)


def test_dora():
    model = build(DoRALinear)
    assert set(rlora.torch.find_pairs(model).plain) == {"0.magnitude", "2.magnitude"}
    check(model, squares(batch(16, 6)), LAYERS)


@pytest.mark.works("torchtune", "linear, DoRA, experts")
def test_experts():
    """A is (E, n, r) and B (E, r, m); the down-projection's A is no kohya "lora_down"."""
    moe = pytest.importorskip("torchtune.modules.moe.experts")
    torch.manual_seed(0)
    model = moe.LoRAGroupedExperts(dim=6, hidden_dim=8, rank=2, alpha=4.0, num_experts=3).double()
    set_trainable_params(model, get_adapter_params(model))
    randomize(model)
    layers = [
        Layer(f"lora_{word}_a", f"lora_{word}_b", stacked_turned, stacked_turned)
        for word in ("gate", "down", "up")
    ]
    x, counts = batch(12, 6), torch.tensor([3, 5, 4])
    gate, down, up = (layer.products(model) for layer in layers)
    expected = []
    for e, part in enumerate(x.split(counts.tolist())):
        weights = zip(
            (model.gate_proj, model.down_proj, model.up_proj), (gate, down, up), strict=True
        )
        w = [(base[e].detach() + 2.0 * torch.tensor(delta[e]).mT) for base, delta in weights]
        expected.append((nn.functional.silu(part @ w[0]) * (part @ w[2])) @ w[1])
    torch.testing.assert_close(model(x, counts).detach(), torch.cat(expected), rtol=0, atol=1e-11)
    check(model, squares(x, counts), layers)

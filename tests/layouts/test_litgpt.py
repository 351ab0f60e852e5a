"""litgpt's layers: queries, keys and values of unequal widths in one parameter each."""

import numpy as np
import pytest
import torch
from layouts import Layer, batch, check, heights, randomize, rows, squares
from torch import nn

pytest.importorskip("litgpt")
from litgpt.lora import GPT, Config, LoRALinear, LoRAQKVLinear, mark_only_lora_as_trainable

HEAD = 4


def trained(*layers):
    model = nn.Sequential(*layers).double()
    mark_only_lora_as_trainable(model)
    return randomize(model)


def test_linear():
    model = trained(LoRALinear(6, 10, r=3, lora_alpha=6), nn.Tanh(), LoRALinear(10, 4, r=2))
    layers = [Layer("0.lora_A", "0.lora_B"), Layer("2.lora_A", "2.lora_B")]
    np.testing.assert_allclose(
        model[0].get_lora_AB().detach() / 2.0, layers[0].products(model)[0], atol=1e-12
    )
    check(model, squares(batch(16, 6)), layers)


@pytest.mark.parametrize("groups", [4, 2, 1])
@pytest.mark.parametrize("enabled", [
    (True, True, True), (True, False, True), (False, True, True), (True, False, False),
])  # fmt: skip
@pytest.mark.works("litgpt", "linear, QKV of unequal blocks")
def test_qkv(enabled, groups):
    """Grouped queries: 4 heads of queries on 1, 2 or 4 of keys and of values."""
    widths = (4 * HEAD, groups * HEAD, groups * HEAD)
    model = trained(
        LoRAQKVLinear(
            6, sum(widths), head_size=HEAD, n_head=4, n_query_groups=groups, r=2, lora_alpha=6,
            enable_lora=enabled,
        )
    )  # fmt: skip
    present = [width for width, on in zip(widths, enabled, strict=True) if on]
    layer = Layer("0.lora_A", "0.lora_B", rows(len(present)), heights(*present))
    blocks = iter(layer.products(model))
    dense = np.vstack([
        next(blocks) if on else np.zeros((width, 6))
        for width, on in zip(widths, enabled, strict=True)
    ])  # fmt: skip
    np.testing.assert_allclose(model[0].get_lora_AB() / 3.0, dense, atol=1e-12)
    check(model, squares(batch(2, 8, 6)), [layer])


def test_whole_model():
    """Every place a LoRA layer can take in a small GPT of grouped queries."""
    config = Config(
        n_layer=2, n_embd=16, n_head=4, n_query_groups=2, head_size=HEAD, padded_vocab_size=13,
        block_size=8, lora_r=2, lora_query=True, lora_value=True, lora_projection=True,
        lora_mlp=True, lora_head=True,
    )  # fmt: skip
    model = GPT(config).double()
    mark_only_lora_as_trainable(model)
    randomize(model)
    qkv = {"cut_a": rows(2), "cut_b": heights(16, 8)}
    layers = [
        Layer(name, name.replace("lora_A", "lora_B"), **(qkv if ".qkv." in name else {}))
        for name, _ in model.named_parameters()
        if name.endswith("lora_A")
    ]
    assert len(layers) == 1 + 2 * 4
    check(model, squares(torch.arange(16).reshape(2, 8) % 13), layers)

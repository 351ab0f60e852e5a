"""microsoft/LoRA's own layers, merged projections and convolutions included."""

import numpy as np
import pytest
import torch
from layouts import Layer, batch, check, randomize, rows, squares
from torch import nn

import rlora.torch

lora = pytest.importorskip("loralib")


def net(*layers):
    return randomize(nn.Sequential(*layers).double())


def merged_difference(layer, weight):
    """The library's change of the weight when it merges."""
    before = weight.detach().clone()
    layer.eval()
    difference = (weight - before).detach().numpy() / layer.scaling
    layer.train()
    return difference


@pytest.mark.parametrize("turned", [False, True])
def test_linear(turned):
    model = net(lora.Linear(6, 10, r=3, fan_in_fan_out=turned), nn.Tanh(), lora.Linear(10, 4, r=2))
    layers = [Layer("0.lora_A", "0.lora_B"), Layer("2.lora_A", "2.lora_B")]
    difference = merged_difference(model[0], model[0].weight)
    np.testing.assert_allclose(
        difference.T if turned else difference, layers[0].products(model)[0], atol=1e-12
    )
    check(model, squares(batch(16, 6)), layers)


def test_embedding_starts_with_a_zero_factor_a():
    """A is zero and B random: the mirror image of a linear layer, and a step moves A only."""
    model = nn.Sequential(lora.Embedding(11, 6, r=2), lora.Linear(6, 4, r=2)).double()
    tokens = torch.arange(22).reshape(2, 11) % 11
    layers = [Layer("0.lora_A", "0.lora_B"), Layer("1.lora_A", "1.lora_B")]
    old = {name: p.detach().clone() for name, p in model.named_parameters()}
    randomize(model[1])
    optimizer = rlora.torch.ScaledSGD(model, lr=0.1)
    squares(tokens)(model).backward()
    optimizer.step()
    assert torch.equal(model[0].lora_B, old["0.lora_B"])
    assert not torch.equal(model[0].lora_A, old["0.lora_A"])
    randomize(model)
    np.testing.assert_allclose(
        merged_difference(model[0], model[0].weight).T, layers[0].products(model)[0], atol=1e-12
    )
    check(model, squares(tokens), layers)


@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize("enabled", [
    [True, False, True], [True, True, True], [False, True, False], [True, True],
])  # fmt: skip
@pytest.mark.works("loralib", "linear, merged, embedding, convolution")
def test_merged_linear(enabled, turned):
    """Each enabled projection is a pair of its own: the library multiplies them by groups."""
    count, width = sum(enabled), 12 // len(enabled)
    model = net(lora.MergedLinear(6, 12, r=2, enable_lora=enabled, fan_in_fan_out=turned))
    layer = Layer("0.lora_A", "0.lora_B", rows(count), rows(count))
    blocks = iter(layer.products(model))
    dense = np.vstack([next(blocks) if on else np.zeros((width, 6)) for on in enabled])
    difference = merged_difference(model[0], model[0].weight)
    np.testing.assert_allclose(difference.T if turned else difference, dense, atol=1e-12)
    check(model, squares(batch(16, 6)), [layer])


@pytest.mark.parametrize("groups", [1, 2])
def test_conv2d(groups):
    """One pair of matrices of rank r k; the product is folded into the kernel."""
    model = net(lora.Conv2d(4, 6, 3, r=2, groups=groups))
    layer = Layer("0.lora_A", "0.lora_B")
    np.testing.assert_allclose(
        merged_difference(model[0], model[0].conv.weight).ravel(),
        layer.products(model)[0].ravel(),
        atol=1e-12,
    )
    check(model, squares(batch(3, 4, 7, 7)), [layer])


def test_conv1d():
    """Only kernels of size 1 work in the library."""
    model = net(lora.Conv1d(4, 6, 1, r=2))
    check(model, squares(batch(3, 4, 7)), [Layer("0.lora_A", "0.lora_B")])


def test_a_trained_bias_is_plain():
    model = net(lora.Linear(6, 10, r=3))
    lora.mark_only_lora_as_trainable(model, bias="lora_only")
    assert model[0].bias.requires_grad
    check(model, squares(batch(16, 6)), [Layer("0.lora_A", "0.lora_B")])

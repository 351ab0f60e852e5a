"""LyCORIS: LoCon is a pair, also of convolutions; its other algorithms are none."""

import numpy as np
import pytest
import torch
from layouts import Layer, batch, check, check_report, randomize, squares, values_of
from torch import nn

import rlora
import rlora.torch

lycoris = pytest.importorskip("lycoris")


class Adapted(nn.Module):
    """A base model and the network that LyCORIS has put around its layers."""

    def __init__(self, algo="lora", base=None, **options):
        super().__init__()
        torch.manual_seed(0)
        self.base = base or nn.Sequential(
            nn.Conv2d(4, 8, 3, padding=1), nn.Tanh(), nn.Conv2d(8, 8, 1), nn.Flatten(1),
            nn.Linear(8 * 25, 8),
        )  # fmt: skip
        self.base.requires_grad_(False)
        lycoris.LycorisNetwork.apply_preset({"target_module": ["Linear", "Conv1d", "Conv2d"]})
        options = {"linear_dim": 3, "linear_alpha": 3, "conv_dim": 2, "conv_alpha": 2} | options
        self.net = lycoris.create_lycoris(self.base, 1.0, algo=algo, **options)
        self.net.apply_to()
        self.double()
        randomize(self.net)

    def forward(self, x):
        return self.base(x)

    def layers(self):
        return [
            Layer(
                f"net.{name}.lora_down.weight",
                f"net.{name}.lora_up.weight",
            )
            for name, module in self.net.named_children()
            if hasattr(module, "lora_down")
        ]


IMAGES = batch(3, 4, 5, 5)


@pytest.mark.works("LyCORIS", "LoCon")
def test_locon():
    model = Adapted()
    layers = model.layers()
    assert len(layers) == 3
    for layer, module in zip(layers, model.net.children(), strict=True):
        difference = module.get_diff_weight()[0].detach().numpy()
        np.testing.assert_allclose(
            difference.reshape(len(difference), -1), layer.products(model)[0], atol=1e-12
        )
    check(model, squares(IMAGES), layers)


def test_locon_of_a_grouped_convolution():
    """Unlike PEFT's it is one pair, of the kernel as stored."""
    model = Adapted(base=nn.Sequential(nn.Conv2d(4, 6, 3, groups=2)))
    (layer,) = model.layers()
    difference = model.net.get_submodule(layer.a.split(".")[1]).get_diff_weight()[0]
    assert difference.shape == (6, 2, 3, 3)
    np.testing.assert_allclose(
        difference.detach().numpy().reshape(6, -1), layer.products(model)[0], atol=1e-12
    )
    check(model, squares(IMAGES), [layer])


@pytest.mark.parametrize("option", ["dora_wd", "use_scalar"])
def test_scales_beside_the_pair_are_plain(option):
    model = Adapted(**{option: True})
    extra = {"dora_wd": "dora_scale", "use_scalar": "scalar"}[option]
    report = rlora.torch.find_pairs(model)
    assert {name.split(".")[-1] for name in report.plain} == {extra}
    check(model, squares(IMAGES), model.layers())


@pytest.mark.refuses("LyCORIS", "Tucker, LoHa, LoKr")
def test_tucker_is_refused_by_name():
    """The convolution with a kernel is refused; the others remain pairs."""
    model = Adapted(use_tucker=True)
    layers = model.layers()
    tucker = [x for x in layers if x.a.replace("down", "mid") in values_of(model)]
    assert len(tucker) == 1
    others = [x for x in layers if x not in tucker]
    report = rlora.torch.find_pairs(model)
    for name in tucker[0][:2]:
        assert "Tucker" in report.refused[name]
    refused = [name for name in report.refused if name.startswith(tucker[0].a.split(".lora")[0])]
    check_report(model, report, others, refused)
    check(model, squares(IMAGES), others, refused=refused)


@pytest.mark.parametrize("algo, word", [("loha", "LoHa"), ("lokr", "LoKr")])
def test_products_of_pairs_are_refused_by_name(algo, word):
    model = Adapted(algo, factor=2)
    report = rlora.torch.find_pairs(model)
    assert len(report) == 0
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert set(report.refused) == trained
    assert all(word in why for why in report.refused.values())
    with pytest.raises(rlora.PairingError, match=word):
        rlora.torch.ScaledAdamW(model)


@pytest.mark.parametrize("algo", ["full", "ia3", "diag-oft", "boft", "glora", "tlora", "dylora"])
def test_no_other_algorithm_is_paired(algo):
    model = Adapted(algo, block_size=1)
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trained
    assert len(rlora.torch.find_pairs(model)) == 0

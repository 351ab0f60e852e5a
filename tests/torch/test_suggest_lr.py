"""The first learning rate of a model: sizes of its weights, and what cannot be read."""

import pytest
import torch
from torch import nn

import rlora
from rlora import PairingError
from rlora.torch import suggest_lr


def layer(size, rank=4, *, m=6, n=8, dtype=torch.float32):
    made = nn.Linear(n, m, bias=False, dtype=dtype)
    made.weight = nn.Parameter(size * torch.ones(m, n, dtype=dtype), requires_grad=False)
    made.lora_A = nn.Parameter(torch.zeros(rank, n))
    made.lora_B = nn.Parameter(torch.zeros(m, rank))
    made.scaling = 2.0
    return made


def test_it_is_the_median_over_layers():
    model = nn.Sequential(layer(0.1), layer(0.3, rank=16), layer(0.9))
    each = [rlora.suggest_lr(s, rank=r, scaling=2.0) for s, r in ((0.1, 4), (0.3, 16), (0.9, 4))]
    assert suggest_lr(model) == pytest.approx(sorted(each)[1], rel=1e-6)


def test_weights_of_low_precision_are_summed_in_float32():
    """The sum of squares of 2**21 ones has more digits than bfloat16."""
    model = nn.Sequential(layer(1.0, m=2048, n=1024, dtype=torch.bfloat16))
    assert suggest_lr(model) == pytest.approx(rlora.suggest_lr(1.0, rank=4, scaling=2.0), rel=1e-5)


def test_a_model_of_peft():
    peft = pytest.importorskip("peft")
    base = nn.Sequential(nn.Linear(8, 6), nn.Linear(6, 8))
    with torch.no_grad():
        for linear in base:
            linear.weight.fill_(-0.05)
    config = peft.LoraConfig(r=4, lora_alpha=16, target_modules=["0", "1"])
    found = suggest_lr(peft.get_peft_model(base, config))
    assert found == pytest.approx(rlora.suggest_lr(0.05, rank=4, scaling=4.0), rel=1e-6)


def test_a_weight_that_is_not_finite_is_named():
    with pytest.raises(rlora.NumericsError, match="base weight of 1 must be finite"):
        suggest_lr(nn.Sequential(layer(0.1), layer(float("nan"))))


def test_parameters_are_no_model():
    with pytest.raises(TypeError, match="got a generator; give the model itself"):
        suggest_lr(nn.Sequential(layer(0.1)).parameters())


def test_what_cannot_be_read_is_said():
    packed = layer(1.0)
    packed.weight = nn.Parameter(torch.zeros(24, 1, dtype=torch.uint8), requires_grad=False)
    with pytest.raises(PairingError, match=r"quantised or packed.*rlora\.suggest_lr\(size"):
        suggest_lr(nn.Sequential(packed))
    assert suggest_lr(nn.Sequential(packed, layer(0.1))) == suggest_lr(nn.Sequential(layer(0.1)))
    with pytest.raises(PairingError, match="is zero"):
        suggest_lr(nn.Sequential(layer(0.0)))
    mute = layer(0.1)
    del mute.scaling
    with pytest.raises(ValueError, match="pass scaling="):
        suggest_lr(nn.Sequential(mute))
    assert suggest_lr(nn.Sequential(mute), scaling=1.0) == pytest.approx(0.0125, rel=1e-6)
    with pytest.raises(PairingError, match="no adapted linear layer"):
        suggest_lr(nn.Sequential(nn.Linear(2, 2)))


def test_a_merged_adapter_is_refused():
    """Its weight is W0 no longer."""
    model = nn.Sequential(layer(0.1))
    model[0].merged = True
    with pytest.raises(PairingError, match="merged"):
        suggest_lr(model)

"""The s of ``W0 + s B A`` is each layer's own: what the model says reaches the method."""

import copy
from itertools import pairwise

import numpy as np
import pytest
import torch
from layouts import batch, randomize, squares
from models import METHODS
from torch import nn

import rlora
from rlora.torch import LoRAMuon, LoRAProSGD, ScaledSGD
from rlora.torch.init.sd_lora import SDLoRALinear

peft = pytest.importorskip("peft")

WITH_S = ("AdaPreLoRA", "AltLoRA", "AltLoRAPlus", "LoRAMuon", "LoRAProSGD", "OPLoRA", "RACLoRA")
"""Classes whose step depends on s; Adam's quotient hides it from most others but for its eps."""
SCALES = {
    False: {"0": 2.0, "2": 8.0, "4": 0.5, "6": 12.0},
    True: {"0": 4 / 2**0.5, "2": 16 / 2**0.5, "4": 0.5 * 2, "6": 24 / 2**0.5},
}
"""alpha / r, and with rsLoRA alpha / sqrt(r); the first two layers have one shape."""


def adapted(rs=False):
    torch.manual_seed(0)
    widths = (6, 6, 6, 10, 4)
    layers = [nn.Linear(n, m) for n, m in pairwise(widths)]
    base = nn.Sequential(*(x for layer in layers for x in (layer, nn.Tanh()))).double()
    config = peft.LoraConfig(
        r=2, lora_alpha=4, target_modules=["0", "2", "4", "6"], use_rslora=rs,
        rank_pattern={"4": 4}, alpha_pattern={"2": 16, "4": 2, "6": 24},
    )  # fmt: skip
    return randomize(peft.get_peft_model(base, config, autocast_adapter_dtype=False))


def pairs_of(model, which="data"):
    """The pairs by their layers, as NumPy arrays."""
    found = {}
    for key in SCALES[False]:
        layer = model.base_model.model[int(key)]
        A, B = (getattr(x["default"].weight, which) for x in (layer.lora_A, layer.lora_B))
        found[key] = rlora.Factors(A.numpy().copy(), B.numpy().copy())
    return found


def check(kind, model, scales, given, steps=4, **options):
    """Every layer moves as it does by itself with its own s, in float64."""
    optimizer = kind(given, lr=0.02, **options)
    method = kind.method(**options_of(kind))
    alone = pairs_of(model)
    states = {key: method.init(pair, scales[key]) for key, pair in alone.items()}
    loss = squares(batch(16, 6))
    for _ in range(steps):
        optimizer.zero_grad()
        loss(model).backward()
        grads = pairs_of(model, "grad")
        for key, pair in alone.items():
            moved = rlora.step(method, pair, grads[key], states[key], 0.02)
            alone[key], states[key] = moved
        optimizer.step()
        for key, pair in pairs_of(model).items():
            for got, wanted in zip(pair, alone[key], strict=True):
                np.testing.assert_allclose(got, wanted, 1e-7, 1e-10)
    return optimizer


def options_of(kind):
    options = dict(kind._options)
    if "betas" in options:
        options["b1"], options["b2"] = options.pop("betas")
    return options


@pytest.mark.parametrize("rs", [False, True], ids=["lora", "rslora"])
@pytest.mark.parametrize("name", METHODS)
def test_each_layer_has_its_own(name, rs):
    """Against the functional method, one layer at a time, with the s that PEFT documents."""
    model = adapted(rs)
    check(METHODS[name], model, SCALES[rs], model)


@pytest.mark.parametrize("name", WITH_S)
def test_it_matters(name):
    one, other = adapted(), adapted()
    for model, given in ((one, one), (other, list(other.named_parameters()))):
        optimizer = METHODS[name](given, lr=0.02)
        squares(batch(16, 6))(model).backward()
        before = pairs_of(model)
        optimizer.step()
        assert any((x != y).any() for x, y in zip(pairs_of(model)["6"], before["6"], strict=True))
    gaps = [
        np.abs(x - y).max() for x, y in zip(pairs_of(one)["6"], pairs_of(other)["6"], strict=True)
    ]
    assert max(gaps) > 1e-4


@pytest.mark.parametrize("name", WITH_S)
def test_an_explicit_one_wins(name):
    model = adapted()
    check(METHODS[name], model, dict.fromkeys(SCALES[False], 3.0), model, scaling=3.0)
    # Of a group too, and without a model it is 1.
    model = adapted()
    check(
        METHODS[name], model, dict.fromkeys(SCALES[False], 3.0), [{"params": model, "scaling": 3.0}]
    )
    model = adapted()
    check(METHODS[name], model, dict.fromkeys(SCALES[False], 1.0), list(model.named_parameters()))


def test_groups_that_come_later_and_pairs_by_hand():
    model = adapted()
    layers = [model.base_model.model[int(key)] for key in SCALES[False]]
    optimizer = LoRAMuon([{"params": layers[0]}], lr=0.02)
    for layer in layers[1:]:
        group = nn.ModuleDict({f"layer {id(layer)}": layer})
        optimizer.add_param_group({"params": group})
    assert [pair.scaling for pair in optimizer._current_pairs()] == [2.0, 8.0, 0.5, 12.0]
    by_hand = [(x.lora_A["default"].weight, x.lora_B["default"].weight) for x in layers]
    optimizer = LoRAMuon(model, lr=0.02, pairs=by_hand)
    again = copy.deepcopy(optimizer)
    for held in (optimizer, again):
        assert [pair.scaling for pair in held._current_pairs()] == [2.0, 8.0, 0.5, 12.0]


@pytest.mark.parametrize("name", ["LoRAMuon", "AltLoRA", "AdaPreLoRA"])
def test_a_loaded_state_does_not_bring_another(name, tmp_path):
    """The layer's own counts today, an explicit one comes with the file's other options."""
    kind, model = METHODS[name], adapted()
    optimizer = check(kind, model, SCALES[False], model, steps=2)
    torch.save(optimizer.state_dict(), tmp_path / "state.pt")
    again = copy.deepcopy(model)
    scaling = again.base_model.model[6].scaling
    scaling["default"] = 5.0
    trained = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    resumed, plain = kind(again, lr=0.02), kind(trained, lr=0.02)
    explicit = kind(again, lr=0.02, scaling=7.0)
    saved = torch.load(tmp_path / "state.pt", weights_only=True)
    for loaded in (resumed, plain, explicit):
        loaded.load_state_dict(saved)
    assert scales_in(resumed) == {2.0, 8.0, 0.5, 5.0}
    assert scales_in(plain) == {2.0, 8.0, 0.5, 12.0}  # nobody knows better than the file
    assert scales_in(explicit) == {2.0, 8.0, 0.5, 5.0}  # options are those of the file: None
    explicit = kind(model, lr=0.02, scaling=7.0)
    squares(batch(16, 6))(model).backward()
    explicit.step()
    resumed.load_state_dict(explicit.state_dict())
    assert resumed.param_groups[0]["scaling"] == 7.0
    assert scales_in(resumed) == {7.0}


@pytest.mark.parametrize("name", METHODS)
def test_a_scale_set_in_mid_run_counts_from_the_next_load_on(name):
    """As of an optimizer that is built then, for which the layer is asked too."""
    model = adapted()
    optimizer = check(METHODS[name], model, SCALES[False], model, steps=2)
    for key in SCALES[False]:
        model.base_model.model[int(key)].set_scale("default", 3.0)
    again = copy.deepcopy(model)
    optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    built = METHODS[name](again, lr=0.02)
    built.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for one, other in ((model, optimizer), (again, built)):
        other.zero_grad()
        squares(batch(16, 6))(one).backward()
        other.step()
    pairs = [pair.scaling for pair in optimizer._current_pairs()]
    assert pairs == [pair.scaling for pair in built._current_pairs()] == [6.0, 24.0, 1.5, 36.0]
    for p, q in zip(model.parameters(), again.parameters(), strict=True):
        assert torch.equal(p, q)


def scales_in(optimizer):
    keys = {key for held in optimizer.state.values() for key in held if "scaling" in key.split(".")}
    assert len(keys) == 1
    return {held[key].item() for held in optimizer.state.values() for key in keys & held.keys()}


def test_what_says_no_s_has_none():
    """The α of SD-LoRA is trained; a layer of scaling 0 is switched off."""
    model = nn.Sequential(SDLoRALinear(nn.Linear(6, 8), 2))
    assert [pair.scaling for pair in LoRAProSGD(model, lr=0.1)._current_pairs()] == [None]
    model = adapted()
    model.base_model.model[0].scaling["default"] = 0.0
    assert LoRAProSGD(model, lr=0.1)._current_pairs()[0].scaling is None
    assert ScaledSGD(model, lr=0.1)._current_pairs()[1].scaling == 8.0


@pytest.mark.parametrize("bad", [0.0, -1.0, float("nan"), "2"])
def test_refused(bad):
    with pytest.raises((ValueError, TypeError), match="scaling"):
        LoRAMuon(adapted(), lr=0.1, scaling=bad)

"""Report or error of an optimizer for its model: the parameters it trains, or why it cannot."""

import gc
import time

import pytest
import torch
from models import LoRALinear
from torch import nn

import rlora
import rlora.torch
from rlora.torch import LoRARite, ScaledAdamW

peft = pytest.importorskip("peft")


def adapted(trainable=True):
    base = nn.Sequential(nn.Linear(6, 10), nn.Tanh(), nn.Linear(10, 4))
    model = peft.get_peft_model(base, peft.LoraConfig(r=2, target_modules=["0", "2"]))
    return model if trainable else model.requires_grad_(False)


# --- errors that name the cause -------------------------------------------------------------------


def test_a_frozen_adapter(tmp_path):
    adapted().save_pretrained(tmp_path)
    base = nn.Sequential(nn.Linear(6, 10), nn.Tanh(), nn.Linear(10, 4))
    frozen = peft.PeftModel.from_pretrained(base, tmp_path)
    for given in (frozen, [{"params": frozen, "lr": 1e-2}]):
        with pytest.raises(rlora.PairingError, match=r"4 LoRA factors, .* frozen; .*is_trainable"):
            ScaledAdamW(given)
    base = nn.Sequential(nn.Linear(6, 10), nn.Tanh(), nn.Linear(10, 4))
    assert ScaledAdamW(peft.PeftModel.from_pretrained(base, tmp_path, is_trainable=True)).report


@pytest.mark.parametrize("kind", ["spectral_norm", "weight_norm", "orthogonal"])
def test_parametrized_factors_are_no_pair(kind):
    """A pair of what factors are made of would have other Grams than the layer's matrices."""
    model = adapted()
    for layer in (model.base_model.model[0].lora_A, model.base_model.model[0].lora_B):
        getattr(torch.nn.utils.parametrizations, kind)(layer["default"])
    report = ScaledAdamW(model, lr=1e-2).report
    assert [pair.layer for pair in report] == ["base_model.model.2"]
    assert all("makes a factor out of it" in why for why in report.refused.values())
    assert len(report.refused) == (4 if kind == "weight_norm" else 2)


def test_factors_within_a_parametrization_are_a_pair():
    """LoRA that is one itself, of the weight: ``W = W0 + B A`` without a layer of its own."""

    class LoRA(nn.Module):
        def __init__(self, m, n):
            super().__init__()
            self.lora_A = nn.Parameter(torch.randn(2, n))
            self.lora_B = nn.Parameter(torch.zeros(m, 2))

        def forward(self, W):
            return W + self.lora_B @ self.lora_A

    model = nn.Sequential(nn.Linear(6, 10))
    nn.utils.parametrize.register_parametrization(model[0], "weight", LoRA(10, 6))
    model[0].parametrizations.weight.original.requires_grad_(False)
    assert len(ScaledAdamW(model, lr=1e-2).report) == 1


def test_tied_factors_of_which_one_remains_do_not_stand_still():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Module(), nn.Module()
            for layer in (self.a, self.b):
                layer.lora_A = nn.Parameter(torch.randn(2, 6))
                layer.lora_B = nn.Parameter(torch.zeros(5, 2))

    model = Tied()
    for letter in "AB":
        setattr(model.b, f"lora_{letter}", nn.Parameter(getattr(model.a, f"lora_{letter}").data))
    optimizer = ScaledAdamW(model, lr=1e-2)
    for letter in "AB":
        setattr(model.b, f"lora_{letter}", getattr(model.a, f"lora_{letter}"))
    (model.a.lora_B @ model.a.lora_A - 1).square().sum().backward()
    optimizer.step()  # without a warning, which would be an error
    assert model.a.lora_B.any()


def test_a_single_factor_that_is_replaced_stands_still():
    model = adapted()
    optimizer = ScaledAdamW(model, lr=1e-2)
    model.base_model.model[2].lora_B["default"].weight = nn.Parameter(torch.zeros(4, 2))
    model(torch.randn(8, 6)).square().sum().backward()
    with pytest.warns(
        RuntimeWarning,
        match="1 of 2 pairs, .*have a factor that stands still: they are no longer those",
    ):
        optimizer.step()


@pytest.mark.parametrize("end", ["merge_and_unload", "unload"])
def test_a_model_without_its_adapter(end):
    model = getattr(adapted(), end)()
    for given in (model, [{"params": model}]):
        with pytest.raises(rlora.PairingError, match=r"none is a LoRA factor: .*merge_and_unload"):
            LoRARite(given)
    with pytest.raises(rlora.PairingError, match=r"empty parameter list: .*is_trainable"):
        LoRARite(p for p in model.parameters() if p.requires_grad)


@pytest.mark.parametrize("pairs", ["peft", ["peft"], ["lora_A", "lora_B"]], ids=str)
def test_a_string_is_no_pair(pairs):
    named = dict(adapted().named_parameters())
    for search in (
        lambda: ScaledAdamW(adapted(), pairs=pairs),
        lambda: rlora.torch.find_pairs(adapted(), pairs=pairs),
        lambda: rlora.find_pairs(named, pairs=pairs),
    ):
        with pytest.raises(rlora.PairingError, match=r"the string '(peft|lora_A)'"):
            search()


def test_an_unknown_adapter_names_those_there_are():
    model = adapted()
    model.add_adapter("second", peft.LoraConfig(r=3, target_modules=["2"]))
    model.base_model.set_adapter(["default", "second"])
    for search in (
        lambda: ScaledAdamW(model, adapter="nope"),
        lambda: LoRARite(model.named_parameters(), adapter="nope"),
        lambda: rlora.torch.find_pairs(model, adapter="nope"),
    ):
        with pytest.raises(rlora.PairingError, match=r"'nope'; there are 'default', 'second'"):
            search()
    nameless = {"q.lora_A.weight": torch.ones(2, 6), "q.lora_B.weight": torch.ones(6, 2)}
    with pytest.raises(rlora.PairingError, match="their names have no adapter"):
        rlora.find_pairs(nameless, adapter="nope")


# --- the report -----------------------------------------------------------------------------------


def test_frozen_weights_are_not_updated():
    """A frozen partner of a trainable factor still takes part; a frozen head does not."""
    model = adapted()
    layer = model.base_model.model[0]
    layer.lora_A["default"].weight.requires_grad_(False)
    layer.base_layer.bias.requires_grad_(True)
    for given in (model, list(model.named_parameters())):
        reports = [kind(given, lr=1e-3).report for kind in (ScaledAdamW, LoRARite)]
        for report in (*reports, rlora.torch.find_pairs(given)):
            assert report.plain == ("base_model.model.0.base_layer.bias",)
            assert len(report) == 2
            assert "1 unpaired parameter" in str(report)
    A, B = nn.Parameter(torch.ones(2, 6)), nn.Parameter(torch.ones(6, 2))
    frozen, free = nn.Parameter(torch.ones(3), requires_grad=False), nn.Parameter(torch.ones(3))
    by_hand = ScaledAdamW([A, B, frozen, free], lr=1e-3, pairs=[(A, B)])
    assert by_hand.report.plain == ("parameter 3",)
    assert str(by_hand.report).startswith("1 pair, 1 unpaired parameter, 0 refused")
    assert "rank 2: 1 time, pairs[0]" in str(by_hand.report)


def test_a_report_names_frozen_factors():
    model = adapted()
    for name, p in model.named_parameters():
        if "0.lora_A" in name:
            p.requires_grad_(False)
            frozen = name
    report = ScaledAdamW(model).report
    assert report.frozen == (frozen,)
    assert f"frozen, so not updated: {frozen}" in str(report)
    A, B = torch.ones(2, 3), torch.zeros(4, 2, requires_grad=True)
    assert ScaledAdamW([A, B], pairs=[(A, B)]).report.frozen == ("pairs[0][0]",)
    assert "frozen" not in str(ScaledAdamW(adapted()).report)


def test_a_tied_factor_that_trains_is_not_frozen():
    A, B = nn.Parameter(torch.ones(2, 3), requires_grad=False), nn.Parameter(torch.zeros(4, 2))
    twins = nn.Parameter(A.data), nn.Parameter(B.data)
    named = [
        (f"{layer}.lora_{letter}.weight", p)
        for layer, pair in (("q", (A, B)), ("k", twins))
        for letter, p in zip("AB", pair, strict=True)
    ]
    report = ScaledAdamW(named).report
    assert len(report.tied) == 2
    assert report.frozen == ()


def test_a_refused_pair_is_not_named_frozen():
    base = nn.Sequential(nn.Linear(6, 10), nn.Tanh(), nn.Linear(10, 4))
    config = peft.AdaLoraConfig(init_r=2, target_r=1, total_step=9, target_modules=["0", "2"])
    model = peft.get_peft_model(base, config)
    plain = nn.ParameterDict({"lora_A": torch.ones(2, 3), "lora_B": torch.zeros(4, 2)})
    model.base_model.add_module("extra", plain)
    for name, p in model.named_parameters():
        p.requires_grad_("lora_" in name and "0.lora_A" not in name)
    report = LoRARite(model, lr=1e-3).report
    assert len(report.refused) == 4
    assert report.frozen == ()


# --- the time that it takes -----------------------------------------------------------------------


def named(count):
    pairs = []
    for i in range(count):
        layer = f"base_model.model.model.layers.{i // 7}.self_attn.proj_{i % 7}"
        for letter, shape in (("A", (2, 4)), ("B", (4, 2))):
            p = nn.Parameter(torch.zeros(shape))
            pairs.append((f"{layer}.lora_{letter}.default.weight", p))
    return pairs


def processor_time(work):
    """The least of two, of this process alone: what else runs hardly counts."""
    times = []
    gc.disable()
    try:
        for _ in range(2):
            start = time.process_time()
            work()
            times.append(time.process_time() - start)
    finally:
        gc.enable()
    return min(times)


def searching(count):
    parameters = named(count)
    return lambda: rlora.find_pairs(parameters)


def building(count):
    parameters = named(count)
    return lambda: LoRARite(parameters)


def loading(count):
    parameters = named(count)
    optimizer = LoRARite(parameters, lr=1e-3)
    for _, p in parameters:
        p.grad = torch.ones_like(p)
    optimizer.step()
    state = optimizer.state_dict()
    return lambda: optimizer.load_state_dict(state)


@pytest.mark.parametrize(("work", "count"), [(searching, 500), (building, 500), (loading, 250)])
def test_the_time_grows_with_the_number_of_pairs(work, count):
    """16 times the pairs: about 16 times the time, and 256 times if it grew with the square."""
    small, large = (processor_time(work(n)) for n in (count, 16 * count))
    assert large < 40 * small


def test_a_layer_called_experts_is_a_pair_where_the_model_tells():
    """Names alone do not say whether it is a stack of them."""
    model = nn.ModuleDict({"experts": LoRALinear(6, 5, 2)})
    assert [pair.name for pair in rlora.torch.find_pairs(model)] == ["experts (default)"]
    assert "may be a stack of experts" in str(rlora.torch.find_pairs(model.named_parameters()))

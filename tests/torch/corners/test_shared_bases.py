"""Starts where a base weight is used in two places, and where a start cannot be right."""

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from rlora import Factors, PairingError, initializers
from rlora.torch import initialize, restore_offsets, suggest_lr
from rlora.torch.init.offsets import take_offset

OFFSETS = {"pissa": {}, "milora": {}, "olora": {}, "lora_ga": {}, "loi": {}}
GRADIENT = ("lora_ga", "loi")


class Adapted(nn.Module):
    """An adapter of its own around a base that others may call too."""

    def __init__(self, base, r=2):
        super().__init__()
        self.base = base.requires_grad_(False)
        m, n = base.weight.shape
        self.lora_A = nn.Parameter(torch.randn(r, n, dtype=base.weight.dtype) / 4)
        self.lora_B = nn.Parameter(torch.zeros(m, r, dtype=base.weight.dtype))
        self.scaling = 2.0

    def forward(self, x):
        return self.base(x) + self.scaling * (x @ self.lora_A.T @ self.lora_B.T)


class Aliased(nn.Module):
    """One linear layer under two names, of which PEFT wraps one."""

    def __init__(self):
        super().__init__()
        self.q = nn.Linear(16, 16)
        self.k = self.q

    def forward(self, x):
        return self.q(x) + torch.tanh(self.k(x))


def recursive():
    """Two depths with an adapter each over one base."""
    torch.manual_seed(0)
    shared = nn.Linear(16, 16, dtype=torch.float64)
    return nn.Sequential(Adapted(shared), nn.Tanh(), Adapted(shared))


def aliased(*, first="q"):
    torch.manual_seed(0)
    model = Aliased()
    if first == "k":
        model._modules = {"k": model.k, "q": model.q}
    return get_peft_model(model, LoraConfig(r=2, lora_alpha=4, target_modules=["q", "k"]))


def loss(model, x):
    return model(x).square().mean()


def batch(dtype=torch.float64):
    return torch.randn(64, 16, dtype=dtype, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("method", OFFSETS)
@pytest.mark.parametrize("first", ["own", "q", "k"])
def test_no_offset_is_taken_from_a_base_that_others_call(method, first):
    model = recursive() if first == "own" else aliased(first=first)
    x = batch(torch.float64 if first == "own" else torch.float32)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    given = ([x], loss) if method in GRADIENT else ()
    with pytest.raises(PairingError, match="too, which must not change"):
        initialize(model, *given, method=method)
    for name, p in model.named_parameters():
        assert torch.equal(p, before[name]), name


@pytest.mark.parametrize("method", ["lora_one", "eva"])
def test_each_adapter_of_a_shared_base_starts_from_what_it_sees(method):
    model, alone = recursive(), recursive()
    with torch.no_grad():  # the same function with a base for each
        base = nn.Linear(16, 16, dtype=torch.float64)
        base.load_state_dict(alone[0].base.state_dict())
        alone[2].base = base.requires_grad_(False)
    reports = [initialize(m, [batch()], loss, method=method) for m in (model, alone)]
    for one, other in zip((model[0], model[2]), (alone[0], alone[2]), strict=True):
        # float64: the same sums, through a decomposition
        torch.testing.assert_close(one.lora_A, other.lora_A, rtol=0, atol=1e-10)
        torch.testing.assert_close(one.lora_B, other.lora_B, rtol=0, atol=1e-10)
    norms = [[layer.gradient_norm for layer in report.layers] for report in reports]
    if method == "lora_one":
        assert norms[0] == pytest.approx(norms[1], rel=1e-12)
        assert norms[0][0] != pytest.approx(norms[0][1], rel=0.1)


def test_a_layer_that_stands_in_two_places_is_one_layer():
    model = recursive()
    model[2] = model[0]
    y = model(batch())
    report = initialize(model, method="pissa")
    assert [layer.name for layer in report.layers] == ["0"]
    torch.testing.assert_close(model(batch()), y)


@pytest.mark.parametrize("method", ["olora", "lora_ga", "gaussian"])
@pytest.mark.parametrize("scaling", [-1.0, 0.0, float("nan"), float("inf")])
def test_a_scaling_that_is_none_is_refused_before_anything_is_written(method, scaling):
    model = nn.Sequential(Adapted(nn.Linear(16, 16)), Adapted(nn.Linear(16, 16)))
    model[1].scaling = scaling
    before = [p.detach().clone() for p in model.parameters()]
    given = ([batch(torch.float32)], loss) if method == "lora_ga" else ()
    with pytest.raises(ValueError, match="finite and positive") as caught:
        initialize(model, *given, method=method)
    assert caught.value.__notes__ == ["in layer 1"]
    assert all(map(torch.equal, model.parameters(), before))


@pytest.mark.parametrize("given", ["2", True, -2.0])
def test_a_given_scaling_that_is_none(given):
    layer = Adapted(nn.Linear(16, 16))
    del layer.scaling
    with pytest.raises((TypeError, ValueError), match="scaling"):
        initialize(layer, method="olora", scaling=given)
    assert not layer.lora_B.any()


@pytest.mark.parametrize("kind", [torch.tensor, np.array])
def test_a_given_scaling_may_be_an_array_of_one_number(kind):
    layers = [Adapted(nn.Linear(16, 16)) for _ in range(2)]
    layers[1].load_state_dict(layers[0].state_dict())
    for layer, given in zip(layers, (2.0, kind(2.0)), strict=True):
        del layer.scaling
        initialize(layer, method="olora", scaling=given)
    assert torch.equal(layers[0].base.weight, layers[1].base.weight)


def test_expanded_base_weights_are_refused_before_anything_is_written():
    model = nn.Sequential(Adapted(nn.Linear(16, 16)), Adapted(nn.Linear(16, 16)))
    model[1].base.weight = nn.Parameter(torch.randn(1, 16).expand(16, 16), requires_grad=False)
    before = [p.detach().clone() for p in model.parameters()]
    with pytest.raises(PairingError, match="share memory"):
        initialize(model, method="pissa")
    assert all(map(torch.equal, model.parameters(), before))


@pytest.mark.parametrize(
    ("dtype", "inputs"),
    [
        (torch.float16, lambda x: 100 * x),  # whose norm is above the range
        (torch.bfloat16, lambda x: 1 + 0.05 * x),
    ],
)
def test_eva_of_inputs_in_half_precision(dtype, inputs):
    generator = torch.Generator().manual_seed(0)
    X = inputs(torch.randn(4096, 256, generator=generator)).to(dtype)
    layer = Adapted(nn.Linear(256, 8).to(dtype))
    initialize(layer, [X], lambda model, x: model(x).float().mean(), method="eva")
    A, _ = initializers.eva(X.float(), 2, out_features=8).params
    assert torch.equal(layer.lora_A, A.to(dtype))
    same = torch.ones_like(X) * X[:1]
    with pytest.raises(PairingError, match="all alike"):
        initialize(layer, [same], lambda model, x: model(x).float().mean(), method="eva")


@pytest.mark.parametrize("method", ["pissa", "milora"])
def test_a_base_weight_of_zero_is_no_start(method):
    model = nn.Sequential(Adapted(nn.Linear(16, 16)), Adapted(nn.Linear(16, 16)))
    nn.init.zeros_(model[1].base.weight)
    report = initialize(model, method=method)
    assert report.skipped == {"1": "its base weight is zero"}


def test_a_second_start_says_that_it_replaces_the_first():
    model = Adapted(nn.Linear(16, 16))
    initialize(model, method="pissa")
    with pytest.warns(RuntimeWarning, match="load the original base model first") as caught:
        initialize(model, method="gaussian")
    assert caught[0].filename == __file__


def test_a_weight_that_attention_reads_by_itself():
    model = nn.ModuleDict({"a": nn.MultiheadAttention(16, 2)})
    model = get_peft_model(model, LoraConfig(r=2, lora_alpha=4, target_modules=["a"]))
    with pytest.raises(PairingError, match="which does not call it"):
        initialize(model, method="pissa")


def test_factors_without_memory():
    config = LoraConfig(r=2, target_modules=["0"])
    model = get_peft_model(nn.Sequential(nn.Linear(16, 16)), config, low_cpu_mem_usage=True)
    with pytest.raises(PairingError, match="on the meta device"):
        initialize(model, method="gaussian")


@pytest.mark.parametrize("kind", [lambda x: x, lambda x: {"x": x}])
def test_one_batch_is_no_list_of_batches(kind):
    with pytest.raises(TypeError, match=r"pass \[batch\]"):
        initialize(Adapted(nn.Linear(16, 16)), kind(batch(torch.float32)), loss)


class Normed(Adapted):
    """A layer that normalises its input itself, so that its own input is not that of its base."""

    def forward(self, x):
        return super().forward(nn.functional.layer_norm(x, x.shape[-1:]))


class Packed(nn.Linear):
    """A linear layer that keeps its weight as quantised ones do: in no parameter of that name."""

    def __init__(self, like):
        super().__init__(16, 16, dtype=torch.float64)
        self.load_state_dict(like.state_dict())
        self.packed = self.weight.detach()
        del self.weight

    def forward(self, x):
        return nn.functional.linear(x, self.packed, self.bias)


def test_a_packed_base_that_two_adapters_call():
    model, alone = recursive(), recursive()
    packed, other = (Packed(alone[0].base) for _ in range(2))
    model[0].base = model[2].base = alone[0].base = packed
    alone[2].base = other
    norms = [
        [layer.gradient_norm for layer in initialize(m, [batch()], loss).layers]
        for m in (model, alone)
    ]
    assert norms[0] == pytest.approx(norms[1], rel=1e-12)


class NoAddress(nn.Parameter):
    """A weight of which no address can be asked, as of torchao's."""

    def data_ptr(self):
        return 0


@pytest.mark.parametrize("case", ["tied", "no address"])
def test_a_weight_that_others_hold_is_no_base_that_others_call(case):
    """The gradient is that at the base, whatever else the layer does."""
    torch.manual_seed(0)
    models = [nn.Sequential(Normed(nn.Linear(16, 16)), Normed(nn.Linear(16, 16))) for _ in range(2)]
    models[1].load_state_dict(models[0].state_dict())
    if case == "tied":
        models[0].other = nn.Linear(16, 16)
        models[0].other.weight = models[0][0].base.weight
    else:
        for layer in models[0]:
            layer.base.weight = NoAddress(layer.base.weight, requires_grad=False)
    x = batch(torch.float32)
    found = [
        initialize(model, [x], lambda model, x: model[1](model[0](x)).square().mean())
        for model in models
    ]
    norms = [[layer.gradient_norm for layer in report.layers] for report in found]
    assert norms[0] == pytest.approx(norms[1], rel=1e-5)  # float32, sums in one order


def test_an_expanded_weight_may_be_read():
    layer = Adapted(nn.Linear(16, 16))
    layer.base.weight = nn.Parameter(torch.randn(1, 16).expand(16, 16), requires_grad=False)
    assert suggest_lr(layer) > 0


def test_no_offset_is_taken_from_a_base_whose_rows_are_one_row():
    model = nn.Sequential(Adapted(nn.Linear(16, 16)))
    model[0].base.weight = nn.Parameter(torch.randn(1, 16).expand(16, 16), requires_grad=False)
    with pytest.raises(PairingError, match=r"weight of 0 has entries that share memory"):
        initialize(model, method="pissa")


def test_an_offset_that_is_small_beside_its_weight_is_not_taken_twice():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 16, dtype=torch.float64)).requires_grad_(False)
    pair = Factors(*(0.01 * torch.randn(shape).double() for shape in ((2, 16), (16, 2))))
    offset = take_offset(model[0].weight, pair, 1.0)
    with pytest.raises(PairingError, match="has been taken already"):
        restore_offsets(model, {"0": offset})

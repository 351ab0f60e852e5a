"""Parameter groups as people and trainers make them: without names, with equal names, with NumPy's numbers."""

import inspect
import io
from fractions import Fraction

import numpy as np
import pytest
import torch
from models import CLASSES, METHODS, loss_of, make_model, same, train, values
from torch import nn

import rlora
from rlora.torch import LoRARite, ScaledAdamW, ScaledSGD

make = pytest.mark.parametrize("make", CLASSES.values(), ids=CLASSES)


@make
def test_a_group_without_names_is_a_plain_group(make):
    """As Lightning adds one; the pairs go on as if it were not there."""
    model, twin = make_model(), make_model()
    optimizer, reference = make(model), make(twin)
    head = nn.Linear(3, 2)
    before = head.weight.detach().clone()
    optimizer.add_param_group({"params": list(head.parameters()), "lr": 1e-3})
    assert len(optimizer.report) == 2
    assert optimizer.report.plain == ("3.weight", "3.bias", "parameter 6", "parameter 7")
    head(torch.ones(3)).sum().backward()
    for m, o in ((model, optimizer), (twin, reference)):
        loss_of(m).backward()
        o.step()
    assert same(values(model), values(twin))
    assert not torch.equal(head.weight, before)
    other = make(make_model())
    other.add_param_group({"params": list(nn.Linear(3, 2).parameters())})
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    other.load_state_dict(torch.load(file, weights_only=True))
    assert other.param_groups[1]["lr"] == 1e-3
    optimizer.add_param_group({"params": [("x.bias", nn.Parameter(torch.ones(2)))]})
    assert optimizer.param_groups[2]["param_names"] == ["x.bias"]
    assert "param_names" not in optimizer.param_groups[1]


def test_lightnings_finetuning_callback():
    finetuning = pytest.importorskip("lightning").pytorch.callbacks.BaseFinetuning
    model, head = make_model(bias=False), nn.Linear(3, 2).requires_grad_(False)
    optimizer = ScaledAdamW(model, lr=1e-2)
    finetuning.unfreeze_and_add_param_group(head, optimizer, lr=1e-3)
    assert [group["lr"] for group in optimizer.param_groups] == [1e-2, 1e-3]
    assert len(optimizer.report) == 2


@make
@pytest.mark.parametrize("as_model", [True, False])
def test_groups_whose_parameters_bear_equal_names(make, as_model):
    """Two text encoders: each as it would be alone."""
    models, twins = [[make_model(seed=i) for i in range(2)] for _ in range(2)]

    def params(model):
        return model if as_model else [x for x in model.named_parameters() if x[1].requires_grad]

    optimizer = make([{"params": params(model)} for model in models])
    alone = [make(params(twin)) for twin in twins]
    names = [pair.name for pair in optimizer.report]
    assert names == [f"groups.{i}.{k} (default)" for i in range(2) for k in (0, 2)]
    assert len({name for pair in optimizer.report for name in (pair.a, pair.b)}) == 8
    assert optimizer.report.plain[::2] == ("groups.0.3.weight", "groups.1.3.weight")
    assert {key.split("/")[1] for key in optimizer.diagnostics() if "default" in key} == {*names}
    for _ in range(2):
        for i in range(2):
            for model in (models[i], twins[i]):
                model.zero_grad()
                loss_of(model, i).backward()
            alone[i].step()
        optimizer.step()
    for model, twin in zip(models, twins, strict=True):
        for name, p in values(twin).items():  # a batch of four may round otherwise than of two
            torch.testing.assert_close(values(model)[name], p, rtol=1e-5, atol=1e-6, msg=name)


def test_a_second_model_with_the_names_of_the_first_may_come_later():
    first, second = make_model(), make_model(seed=1)
    optimizer = ScaledAdamW(first)
    assert [pair.name for pair in optimizer.report] == ["0 (default)", "2 (default)"]
    optimizer.add_param_group({"params": second})
    assert len(optimizer.report) == 4
    assert len({pair.name for pair in optimizer.report}) == 4


def test_a_factor_alone_in_its_group_has_no_partner_in_a_pair_of_another():
    """Its own A is frozen, and left out with all that needs no gradient."""
    first, second = (layer_of(seed) for seed in (0, 1))
    groups = [list(first.items()), [("lora_B", second["lora_B"])]]
    for at_once in (True, False):
        optimizer = ScaledAdamW(
            [{"params": some} for some in groups[: 2 if at_once else 1]], lr=1e-2
        )
        if not at_once:
            optimizer.add_param_group({"params": groups[1]})
        (pair,) = optimizer._pairs
        assert pair.A is first["lora_A"]
        assert pair.B is first["lora_B"]
        (why,) = optimizer.report.refused.values()
        assert "its partner" in why


def layer_of(seed):
    g = torch.Generator().manual_seed(seed)
    shapes = {"lora_A": (3, 10), "lora_B": (12, 3)}
    return {key: torch.nn.Parameter(torch.randn(x, generator=g)) for key, x in shapes.items()}


def test_factors_in_groups_of_their_own_are_not_mixed_up():
    """A and B of two models in four groups: nothing says whose B is whose."""
    models = [make_model(seed=i, bias=False) for i in range(2)]
    split = [
        {"params": [(n, p) for n, p in model.named_parameters() if letter in n]}
        for model in models
        for letter in ("lora_A", "lora_B")
    ]
    assert len(ScaledAdamW(split[:2]).report) == 2  # of one model, as ever
    with pytest.raises(rlora.PairingError, match="two tensors have the name"):
        ScaledAdamW(split)
    optimizer = ScaledAdamW(split[:2])
    with pytest.raises(rlora.PairingError, match="two tensors have the name"):
        optimizer.add_param_group(split[2])
    assert len(optimizer.param_groups) == len(optimizer.report) == 2
    train(models[0], optimizer, 1)
    whole = {"params": [x for group in split[2:] for x in group["params"]]}
    optimizer = ScaledAdamW([*split[:2], whole])
    found = [(pair.a, pair.b) for pair in optimizer.report]
    assert sum(a.startswith("groups.2") and b.startswith("groups.2") for a, b in found) == 2
    assert sum(not a.startswith("groups") and not b.startswith("groups") for a, b in found) == 2


@pytest.mark.parametrize("number", [np.float32, np.float64, Fraction], ids=lambda x: x.__name__)
@pytest.mark.parametrize("kind", [ScaledAdamW, ScaledSGD, *METHODS.values()])
def test_any_real_number_is_a_number(kind, number, tmp_path):
    """At construction, per group and in a group that is added: Python's own from there on."""
    model, twin = make_model(), make_model()
    options = {"lr": 2.0**-7, "weight_decay": 2.0**-4, "betas": (0.5, 0.75), "damping": 2.0**-10}
    known = inspect.signature(kind).parameters if kind not in METHODS.values() else kind._options
    options = {k: v for k, v in options.items() if k == "lr" or k in known}
    given = {
        k: tuple(map(number, v)) if isinstance(v, tuple) else number(v) for k, v in options.items()
    }
    optimizer, reference = kind(model, **given), kind(twin, **options)
    assert optimizer.defaults == reference.defaults
    train(model, optimizer, 2)
    train(twin, reference, 2)
    assert same(values(model), values(twin))
    new = nn.Parameter(torch.ones(2))
    optimizer.add_param_group({"params": [new], "lr": number(0.5)})
    kinds = {type(v) for g in optimizer.param_groups for k, v in g.items() if k in options}
    assert kinds <= {float, int, tuple}
    torch.save(optimizer.state_dict(), tmp_path / "o.pt")
    torch.load(tmp_path / "o.pt", weights_only=True)
    groups = kind([{"params": pairs_in_names(twin), **given}]).param_groups
    assert groups[0]["lr"] == options["lr"]
    assert type(groups[0]["lr"]) is float


def pairs_in_names(model):
    return [(n, p) for n, p in model.named_parameters() if "lora" in n]


@pytest.mark.parametrize("value, error", [
    (np.float32("nan"), ValueError), (np.float64("inf"), ValueError), (Fraction(-1, 2), ValueError),
    (np.bool_(True), TypeError), (True, TypeError), (np.ones(1), TypeError),
])  # fmt: skip
@pytest.mark.parametrize("kind", [ScaledAdamW, LoRARite])
def test_what_is_no_good_number_is_refused(kind, value, error):
    with pytest.raises(error, match="weight_decay"):
        kind(make_model(), weight_decay=value)
    optimizer = kind(make_model())
    with pytest.raises(error, match="weight_decay"):
        optimizer.add_param_group({"params": [nn.Parameter(torch.ones(2))], "weight_decay": value})
    assert len(optimizer.param_groups) == 1


def test_a_layers_own_activation_stands_not_between_its_factors():
    class Layer(nn.Module):
        def __init__(self):
            super().__init__()
            self.lora_A = nn.Parameter(torch.randn(2, 8))
            self.lora_B = nn.Parameter(torch.zeros(6, 2))
            self.activation = nn.GELU()

    report = ScaledAdamW(Layer()).report
    assert len(report.pairs) == 1
    assert not report.refused


@pytest.mark.parametrize("names", [["x"], ["x", "y", "z"], []])
def test_a_group_has_a_name_for_each_parameter_or_none(names):
    A, B = nn.Parameter(torch.ones(2, 5)), nn.Parameter(torch.ones(3, 2))
    group = {"params": [A, B], "param_names": names}
    match = f"a group has 2 params, but {len(names)} param_names: give each"
    with pytest.raises(ValueError, match=match):
        ScaledAdamW([dict(group)], pairs=[(A, B)])
    optimizer = ScaledAdamW(make_model())
    with pytest.raises(ValueError, match=match):
        optimizer.add_param_group(dict(group))

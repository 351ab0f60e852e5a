"""Groups that libraries and people change: what is frozen stays a partner, what is new is paired."""

import copy
import pickle

import pytest
import torch
from models import CLASSES, LoRALinear, make_model, pairs_in, same, train, values

import rlora
import rlora.torch
from rlora.torch import LoRARite, ScaledAdamW

make = pytest.mark.parametrize(
    "make", [CLASSES[name] for name in ("adamw", "sgd", "LoRARite", "LoRAFA")]
)


def frozen(letter):
    model = make_model()
    for name, p in model.named_parameters():
        if f"lora_{letter}" in name:
            p.requires_grad_(False)
    return model


def keep_trainable(optimizer):
    for group in optimizer.param_groups:
        group["params"] = [p for p in group["params"] if p.requires_grad]


@make
@pytest.mark.parametrize("letter", "AB")
@pytest.mark.parametrize("late", [False, True])
def test_frozen_partners_outside_of_the_groups_count_as_inside(make, letter, late):
    model, twin = frozen(letter), frozen(letter)
    optimizer, untouched = make(model), make(twin)
    train(model, optimizer, late)
    train(twin, untouched, late)
    keep_trainable(optimizer)
    train(model, optimizer, 3, start=late)
    train(twin, untouched, 3, start=late)
    assert same(values(model), values(twin))
    assert str(optimizer.report) == str(untouched.report)
    names = [x["param_names"] for x in (optimizer.param_groups[0], untouched.param_groups[0])]
    assert names[0] == names[1]
    resumed, other = make(frozen(letter)), make(frozen(letter))
    resumed.load_state_dict(optimizer.state_dict())
    other.load_state_dict(untouched.state_dict())


@make
@pytest.mark.parametrize("side", [0, 1])
def test_a_trainable_factor_does_not_leave_alone(make, side):
    model = make_model()
    optimizer = make(model)
    train(model, optimizer, 1)
    before = values(model)
    gone = pairs_in(model)[0][side]
    group = optimizer.param_groups[0]
    group["params"] = [p for p in group["params"] if p is not gone]
    with pytest.raises(rlora.PairingError, match=r"one of the factors \(4, 6\) and \(10, 4\)"):
        train(model, optimizer, 1)
    assert same(before, values(model))


def test_a_frozen_factor_may_be_swapped_in_its_place():
    model, twin = frozen("A"), frozen("A")
    optimizer, other = ScaledAdamW(model, lr=1e-2), ScaledAdamW(twin, lr=1e-2)
    train(model, optimizer, 1)
    train(twin, other, 1)
    with torch.no_grad():
        for A, _ in pairs_in(twin):
            A.mul_(-2.0)
    swapped = {}
    for layer in (layer for layer in model if isinstance(layer, LoRALinear)):
        holder = layer.lora_A["default"]
        new = torch.nn.Parameter(-2.0 * holder.weight.detach(), requires_grad=False)
        swapped[id(holder.weight)] = holder.weight = new
    group = optimizer.param_groups[0]
    group["params"] = [swapped.get(id(p), p) for p in group["params"]]
    train(model, optimizer, 2, start=1)
    train(twin, other, 2, start=1)
    assert same(values(model), values(twin))


class Wrapper:
    """As Fabric's and Lightning's: a class of its own over a copy of the attributes."""

    def __new__(cls, optimizer):
        kind = type("Wrapped", (type(optimizer),), {})
        wrapper = kind.__new__(kind)
        wrapper.__dict__ = dict(optimizer.__dict__)
        return wrapper


@make
@pytest.mark.parametrize("named", [True, False])
def test_groups_that_a_wrapper_adds_are_paired(make, named):
    models = []
    for wrap in (lambda optimizer: optimizer, Wrapper):
        torch.manual_seed(0)
        model = make_model()
        optimizer = make(model)
        train(model, optimizer, 1)
        model.append(LoRALinear(8, 8, 3))
        added = [(n, p) for n, p in model.named_parameters() if n.startswith("4.lora")]
        group = {"params": added if named else [p for _, p in added]}
        wrap(optimizer).add_param_group(group)
        train(model, optimizer, 3, start=1)
        assert len(optimizer.report) == 3
        assert optimizer.param_groups[1]["param_names"] == [n for n, _ in added]
        models.append(values(model))
    assert same(*models)


def test_a_group_that_is_refused_is_refused_at_each_step():
    """Names that two adapters have, in a group appended by hand; without it the run goes on."""
    model = make_model(bias=False)
    optimizer = ScaledAdamW(model, lr=1e-2)
    train(model, optimizer, 1)
    before, report = values(model), str(optimizer.report)
    twice = list(LoRALinear(8, 8, 3).named_parameters(prefix="4")) * 2
    factors = [(n, torch.nn.Parameter(p.detach() + 0)) for n, p in twice if "lora" in n]
    options = {k: v for k, v in optimizer.param_groups[0].items() if k != "rounded"}
    names, tensors = map(list, zip(*factors, strict=True))
    optimizer.param_groups.append({**options, "params": tensors, "param_names": names})
    for _ in range(2):
        with pytest.raises(rlora.PairingError, match="two tensors have the name"):
            train(model, optimizer, 1)
    assert same(before, values(model))
    del optimizer.param_groups[1]
    train(model, optimizer, 1)
    assert str(optimizer.report) == report
    assert not same(before, values(model))


@make
@pytest.mark.parametrize("clone", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))])
def test_groups_of_a_copy_can_be_changed(make, clone):
    """A copy holds none of the models that were given."""
    original = make_model()
    model, copied = clone((original, make(original)))
    train(model, copied, 1)
    added = make_model()
    copied.add_param_group({"params": list(added.named_parameters())})
    assert len(copied.report) == 2 * len(pairs_in(model))
    copied.param_groups[1]["params"] = []
    train(model, copied, 1)
    assert len(copied.report) == len(pairs_in(model))


def test_a_wrapper_watches_the_optimizer_itself():
    model = make_model()
    optimizer = ScaledAdamW(model, lr=1e-2)
    wrapper = Wrapper(optimizer)
    wrapper.watch(model)
    train(model, optimizer, 1)
    assert "rlora/step/max" in optimizer.diagnostics()
    wrapper.unwatch()
    assert "rlora/step/max" not in optimizer.diagnostics()
    assert not copy.deepcopy(optimizer)._watching


def test_names_of_tensors_are_asked_of_the_model_that_was_given():
    """A callback that unfreezes layers adds tensors without names."""
    model = make_model()
    second = [(n, p) for n, p in model.named_parameters() if n[0] == "2"]
    optimizer = LoRARite([{"params": model[0]}], lr=1e-2)
    optimizer.add_param_group({"params": [p for n, p in second if "lora" in n]})
    assert len(optimizer.report) == 1  # of another model
    optimizer = LoRARite(model, lr=1e-2)
    model.append(LoRALinear(8, 8, 3))
    optimizer.add_param_group({"params": [p for p in model[4].parameters() if p.requires_grad]})
    assert len(optimizer.report) == 3


def test_groups_count_their_roundings_by_themselves():
    """A state of one group goes into two, and options are copied from another group."""
    model = make_model(dtype=torch.bfloat16)
    optimizer = ScaledAdamW(model, lr=1e-2)
    train(model, optimizer, 2)
    named = list(model.named_parameters())
    halves = [[x for x in named if x[1].requires_grad and x[0][0] in half] for half in ("0", "23")]
    resumed = ScaledAdamW([{"params": half} for half in halves], lr=1e-2)
    resumed.load_state_dict(optimizer.state_dict())
    train(model, resumed, 1)
    assert [int(group["rounded"]) for group in resumed.param_groups] == [3, 3]
    layer = LoRALinear(8, 8, 3, torch.bfloat16)
    options = {
        k: v for k, v in resumed.param_groups[0].items() if k not in ("params", "param_names")
    }
    resumed.add_param_group({**options, "params": list(layer.named_parameters(prefix="9"))})
    train(model, resumed, 1)
    assert [int(group["rounded"]) for group in resumed.param_groups] == [4, 4, 1]


def test_a_factor_is_not_its_own_partner():
    A = torch.nn.Parameter(torch.randn(3, 8))
    B = torch.nn.Parameter(A.data.mT)
    with pytest.raises(rlora.PairingError, match=r"the two of pairs\[0\] share their memory"):
        ScaledAdamW([A, B], pairs=[(A, B)])
    with pytest.raises(rlora.PairingError, match="the two share their memory"):
        ScaledAdamW([("q.lora_A.weight", A), ("q.lora_B.weight", B)])


@pytest.mark.parametrize(
    ("name", "letter", "options"),
    [("LoRAFA", "A", {}), ("RACLoRA", "A", {}), ("RACLoRA", "B", {"frozen": "B"})],
)
def test_a_zero_factor_that_never_moves_is_told(name, letter, options):
    """Some embeddings begin with A = 0, all else with B = 0."""
    model = make_model(bias=False)
    torch.nn.init.zeros_(pairs_in(model)[0]["AB".index(letter)])
    optimizer = getattr(rlora.torch, name)(model, lr=1e-2, **options)
    match = f"never moves {letter}, and {letter} is zero in 1 of 2 pairs.*start it at random"
    with pytest.warns(RuntimeWarning, match=match):
        train(model, optimizer, 1)
    train(model, optimizer, 1)  # once


def test_a_number_of_experts_of_ones_own_changes_no_layout():
    """Routers have one beside an ordinary adapter; shapes tell what a stack of experts is."""
    layer = torch.nn.Module()
    layer.num_experts = 4
    layer.lora_A = torch.nn.Parameter(torch.randn(4, 16))
    layer.lora_B = torch.nn.Parameter(torch.zeros(8, 4))
    (pair,) = ScaledAdamW(layer).report
    assert (pair.shape_a, pair.shape_b) == ((4, 16), (8, 4))
    layer.lora_A = torch.nn.Parameter(torch.randn(4, 3, 16))
    layer.lora_B = torch.nn.Parameter(torch.zeros(4, 8, 3))
    (pair,) = ScaledAdamW(layer).report
    assert (pair.shape_a, pair.shape_b) == ((4, 3, 16), (4, 8, 3))


def test_a_group_may_say_its_pairs_by_order():
    """As the constructor may: no names are there for trainers that hand over tensors."""
    first, second = ([p for pair in pairs_in(make_model(bias=False)) for p in pair] for _ in "ab")
    optimizer = ScaledAdamW(first, lr=1e-2, pairs="by_order")
    optimizer.add_param_group({"params": second, "pairs": "by_order"})
    assert len(optimizer.report) == 4
    assert not optimizer.report.plain
    assert len(ScaledAdamW([{"params": first, "pairs": "by_order"}], lr=1e-2).report) == 2
    third = make_model(bias=False, seed=1)
    named = ((n, p) for n, p in third.named_parameters() if p.requires_grad)
    optimizer = ScaledAdamW(make_model(bias=False), lr=1e-2)
    optimizer.add_param_group({"params": named, "pairs": "by_order"})
    assert len(optimizer.report) == 4  # by order, and not once more by name


@make
def test_a_group_by_hand_without_options_is_saved_and_not_stepped(make):
    model, p = make_model(), torch.nn.Parameter(torch.ones(3))
    optimizer = make(model)
    train(model, optimizer, 1)
    optimizer.param_groups.append({"params": [p], "lr": 1e-3})
    assert len(optimizer.state_dict()["param_groups"]) == 2
    before = values(model)
    with pytest.raises(ValueError, match=r"group has no .*stochastic_rounding.*add_param_group"):
        train(model, optimizer, 1)
    assert same(before, values(model))
    optimizer.param_groups.pop()
    optimizer.add_param_group({"params": [p], "lr": 1e-3})
    train(model, optimizer, 1)

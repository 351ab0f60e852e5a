"""A saved state finds its parameters: by name, by place, and by shape where that leaves no choice."""

import copy

import pytest
import torch
from models import CLASSES, loss_of, make_model, train
from torch import nn

import rlora
from rlora.torch import LoRARite, ScaledAdamW

make = pytest.mark.parametrize("make", CLASSES.values(), ids=CLASSES)


def named(model):
    return [(name, p) for name, p in model.named_parameters() if p.requires_grad]


def square_model(seed=0):
    """All pairs and the head are of one shape, so that only names tell them apart."""
    torch.manual_seed(seed)
    layers = nn.ModuleDict()
    for name in ("q", "k", "v"):
        layers[name] = nn.Module()
        layers[name].lora_A = nn.Parameter(torch.randn(5, 5))
        layers[name].lora_B = nn.Parameter(torch.randn(5, 5))
    layers["head"] = nn.Linear(5, 5)
    return layers


def run(model, optimizer, steps=3):
    for t in range(steps):
        for k, p in enumerate(model.parameters()):
            p.grad = torch.randn(p.shape, generator=torch.Generator().manual_seed(100 * t + k))
        optimizer.step()


def same_state(a, b):
    assert a.keys() == b.keys()
    for key in a:
        torch.testing.assert_close(torch.as_tensor(a[key]), torch.as_tensor(b[key]), rtol=0, atol=0)


def held_by(optimizer, model):
    """The state of an optimizer by the names of a model."""
    return {
        name: optimizer.state[p] for name, p in model.named_parameters() if optimizer.state.get(p)
    }


def compare(loaded, model, saved, origin):
    mine, theirs = held_by(loaded, model), held_by(saved, origin)
    assert mine.keys() == theirs.keys()
    for name in mine:
        same_state(mine[name], theirs[name])


@make
def test_a_state_saved_in_another_order_goes_by_name(make):
    """All shapes are equal: by place it would load without a word, into the wrong parameters."""
    origin, model = square_model(), square_model(seed=1)
    saved = make(named(origin))
    run(origin, saved)
    loaded = make(named(model)[::-1])
    loaded.load_state_dict(saved.state_dict())
    compare(loaded, model, saved, origin)
    assert loaded.param_groups[0]["param_names"] == [name for name, _ in named(model)[::-1]]
    back = make(named(square_model(seed=2)))
    back.load_state_dict(loaded.state_dict())
    for (_, p), (_, q) in zip(named(origin), back_named(back), strict=True):
        same_state(saved.state[p], back.state[q])


@pytest.mark.parametrize("kind", [float, torch.tensor])
def test_options_of_two_groups_agree_by_their_values(kind):
    """As a file has them, which makes of one number two; here the two groups are one."""
    origin, model = square_model(), square_model(seed=1)
    head, lora = ([x for x in named(origin) if ("head" in x[0]) == w] for w in (True, False))
    saved = ScaledAdamW([{"params": head}, {"params": lora}], lr=0.5)
    run(origin, saved)
    state = saved.state_dict()
    for group in state["param_groups"]:
        group["lr"] = kind(float("0.25"))
    loaded = ScaledAdamW(named(model), lr=0.5)
    loaded.load_state_dict(state)
    assert float(loaded.param_groups[0]["lr"]) == 0.25


def test_names_that_are_more_than_the_parameters_say_nothing():
    """A parameter was taken out of a saved group, and its name was left: then the place counts."""
    origin, model = square_model(), square_model(seed=1)
    saved = ScaledAdamW(named(origin), lr=1e-3)
    run(origin, saved)
    state = saved.state_dict()
    gone = state["param_groups"][0]["params"][:2]
    del state["param_groups"][0]["params"][:2]
    for i in gone:
        del state["state"][i]
    loaded = ScaledAdamW(named(model)[2:], lr=1e-3)
    loaded.load_state_dict(state)
    for (_, p), (_, q) in zip(named(origin)[2:], named(model)[2:], strict=True):
        same_state(saved.state[p], loaded.state[q])


def back_named(optimizer):
    group = optimizer.param_groups[0]
    return list(zip(group["param_names"], group["params"], strict=True))


def test_groups_that_were_made_otherwise_go_by_name():
    """Options are those of the saved group; where two are one now and disagree, its own stay."""
    origin, model = square_model(), square_model(seed=1)
    head, lora = ([x for x in named(origin) if ("head" in x[0]) == w] for w in (True, False))
    saved = ScaledAdamW(
        [{"params": head, "weight_decay": 0.5}, {"params": lora}], lr=1e-3, betas=(0.5, 0.6)
    )
    run(origin, saved)
    loaded = ScaledAdamW(model, lr=1e-2, weight_decay=0.25)
    loaded.load_state_dict(saved.state_dict())
    compare(loaded, model, saved, origin)
    (group,) = loaded.param_groups
    assert (group["lr"], group["betas"], group["weight_decay"]) == (1e-3, (0.5, 0.6), 0.25)
    back = square_model(seed=2)
    parts = [[x for x in named(back) if ("head" in x[0]) == w] for w in (False, True)]
    again = ScaledAdamW([{"params": part} for part in parts])
    again.load_state_dict(saved.state_dict())
    compare(again, back, saved, origin)
    assert [group["weight_decay"] for group in again.param_groups] == [1e-2, 0.5]


@pytest.mark.parametrize("with_names", [True, False])
def test_frozen_parameters_without_state_are_left_out(with_names):
    """As in ``AdamW(model.parameters())`` of a model whose base is frozen."""
    origin, model = make_model(), make_model(seed=1)
    saved = torch.optim.AdamW(origin.named_parameters() if with_names else origin.parameters())
    train(origin, saved, 3)
    loaded = ScaledAdamW(model)
    assert len(saved.param_groups[0]["params"]) > len(loaded.param_groups[0]["params"])
    loaded.load_state_dict(saved.state_dict())
    compare(loaded, model, saved, origin)
    assert loaded.param_groups[0]["betas"] == (0.9, 0.999)
    assert loaded.param_groups[0]["damping"] == 1e-2
    assert train(model, loaded, 1)


@pytest.mark.parametrize("with_names", [True, False])
def test_a_frozen_factor_may_be_missing_in_the_file(with_names):
    origin, model = make_model(), make_model(seed=1)
    for m in (origin, model):
        m[0].lora_A["default"].weight.requires_grad_(False)
    moving = named(origin)
    saved = torch.optim.AdamW(moving if with_names else [p for _, p in moving])
    train(origin, saved, 2)
    loaded = ScaledAdamW(model)
    assert len(loaded.param_groups[0]["params"]) == len(moving) + 1
    loaded.load_state_dict(saved.state_dict())
    compare(loaded, model, saved, origin)


def decayed(model):
    """Two groups without names, as transformers' Trainer makes them."""
    flat = [[p for _, p in named(model) if (p.ndim > 1) == w] for w in (True, False)]
    return [{"params": flat[0], "weight_decay": 0.01}, {"params": flat[1], "weight_decay": 0.0}]


@pytest.mark.parametrize("bias", [True, False])
def test_trainers_two_groups_without_names(bias):
    origin, model = make_model(bias=bias), make_model(seed=1, bias=bias)
    saved = torch.optim.AdamW(decayed(origin), lr=1e-3)
    train(origin, saved, 2)
    loaded = ScaledAdamW(model, weight_decay=0.25)
    loaded.load_state_dict(saved.state_dict())
    compare(loaded, model, saved, origin)
    assert loaded.param_groups[0]["lr"] == 1e-3
    assert loaded.param_groups[0]["weight_decay"] == (0.25 if bias else 0.01)


def unchanged_after(error, match, optimizer, saved):
    before = copy.deepcopy(optimizer.state_dict())
    with pytest.raises(error, match=match):
        optimizer.load_state_dict(saved)
    assert str(before) == str(optimizer.state_dict())


def test_what_shapes_cannot_tell_is_refused():
    origin, model = square_model(), square_model(seed=1)
    half = [p for _, p in named(origin)]
    saved = torch.optim.AdamW([{"params": half[:3]}, {"params": half[3:]}])
    run(origin, saved)
    loaded = ScaledAdamW(model)
    run(model, loaded)
    unchanged_after(rlora.ShapeError, r"\(5, 5\) is in several groups", loaded, saved.state_dict())
    fewer = torch.optim.AdamW([{"params": half[:5]}])
    run(origin, fewer)
    match = r"\[5\] parameters, these have \[8\].*5 saved and 7 here of shape \(5, 5\)"
    unchanged_after(rlora.ShapeError, match, loaded, fewer.state_dict())
    other = LoRARite(named(origin))  # its state has other shapes than its parameters
    run(origin, other)
    nameless = other.state_dict()
    del nameless["param_groups"][0]["param_names"]
    nameless["param_groups"][0]["params"].append(99)
    mine = LoRARite(model)
    unchanged_after(rlora.ShapeError, "no names say which", mine, nameless)


def test_names_that_are_missing_are_said():
    origin, model = square_model(), square_model(seed=1)
    saved = ScaledAdamW(origin)
    run(origin, saved)
    without = ScaledAdamW([x for x in named(model) if "head" not in x[0]])
    match = r"0 of this optimizer are not in them, 2 with state are only there \('head.weight'"
    unchanged_after(ValueError, match, without, saved.state_dict())
    run(model, without)
    match = r"2 of this optimizer are not in them \('head.weight', 'head.bias'\), 0 with"
    unchanged_after(ValueError, match, saved, without.state_dict())


def test_names_that_are_new_throughout_go_by_place():
    """A wrapper puts something before every name; a layer may have been renamed, or be another."""
    origin, model = square_model(), square_model(seed=1)
    saved = ScaledAdamW([(f"module.{name}", p) for name, p in named(origin)])
    run(origin, saved)
    loaded = ScaledAdamW(model)
    loaded.load_state_dict(saved.state_dict())
    compare(loaded, model, saved, origin)
    assert loaded.param_groups[0]["param_names"][0] == "q.lora_A"
    part = ScaledAdamW([(name.replace("q.", "query."), p) for name, p in named(origin)])
    run(origin, part)
    first = r"2 parameters have other names .*'q.lora_A' here and 'query.lora_A' there"
    with pytest.warns(RuntimeWarning, match=first):
        loaded.load_state_dict(part.state_dict())
    compare(loaded, model, part, origin)


@pytest.mark.parametrize(
    "wrapper", ["_orig_mod", "_checkpoint_wrapped_module", "_fsdp_wrapped_module"]
)
def test_wrappers_of_single_layers_are_no_part_of_names(wrapper):
    """As of a layer that is compiled: its factors keep their state, in any order, and no warning."""
    origin, model = square_model(), square_model(seed=1)
    saved = ScaledAdamW(origin)
    run(origin, saved)
    inside = [(name.replace("q.", f"q.{wrapper}."), p) for name, p in named(model)]
    assert sum(wrapper in name for name, _ in inside) == 2
    for order in (inside, inside[::-1]):
        loaded = ScaledAdamW(order)
        loaded.load_state_dict(saved.state_dict())
        compare(loaded, model, saved, origin)


@pytest.mark.parametrize("split", [False, True])
def test_a_model_beside_one_that_is_compiled(split):
    """Both have layers of one name: that of the wrapper tells them apart, in any order."""

    def groups_of(models):
        one, other = map(named, models)
        halves = [(f"_orig_mod.{name}", p) for name, p in other], one
        order = halves if models is origins else halves[::-1]
        return [{"params": half} for half in order] if split else [*order[0], *order[1]]

    origins, models = ([square_model(seed=i) for i in (k, k + 1)] for k in (0, 2))
    saved = ScaledAdamW(groups_of(origins))
    for model in origins:
        run(model, saved)
    loaded = ScaledAdamW(groups_of(models))
    loaded.load_state_dict(saved.state_dict())
    for model, origin in zip(models, origins, strict=True):
        compare(loaded, model, saved, origin)


def test_equal_names_in_two_groups():
    """Told apart by the group, in another order within it."""
    origins, models = ([square_model(seed=i) for i in (k, k + 1)] for k in (0, 2))
    saved = ScaledAdamW([{"params": named(m)} for m in origins])
    for m in origins:
        run(m, saved)
    loaded = ScaledAdamW([{"params": named(m)[::-1]} for m in models])
    loaded.load_state_dict(saved.state_dict())
    for model, origin in zip(models, origins, strict=True):
        compare(loaded, model, saved, origin)


def test_before_the_first_step_there_is_nothing_to_tell_by():
    loaded = ScaledAdamW(make_model())
    saved = torch.optim.AdamW(make_model().parameters()).state_dict()
    with pytest.raises(rlora.ShapeError, match="groups have"):
        loaded.load_state_dict(saved)


def test_options_that_come_along():
    """All of the saved group; damping and placement only from a file that has them."""
    origin, model = make_model(), make_model(seed=1)
    plain = torch.optim.AdamW([p for _, p in named(origin)], lr=3e-3, weight_decay=0.125, eps=1e-6)
    loss_of(origin).backward()
    plain.step()
    loaded = ScaledAdamW(model, lr=1e-2, betas=(0.5, 0.6), damping=0.5, damping_mode="absolute")
    loaded.load_state_dict(plain.state_dict())
    (group,) = loaded.param_groups
    for key, value in plain.param_groups[0].items():
        assert key == "params" or group[key] == value
    assert group["betas"] == (0.9, 0.999)
    assert (group["damping"], group["damping_mode"]) == (0.5, "absolute")
    again = ScaledAdamW(make_model())
    again.load_state_dict(loaded.state_dict())
    assert again.param_groups[0]["damping"] == 0.5


def test_names_follow_parameters_that_leave_a_group():
    """As those of a deleted adapter do: what is saved then has the names of the rest."""
    origin, model = square_model(), square_model(seed=1)
    saved = ScaledAdamW(origin)
    run(origin, saved)
    for p in saved.param_groups[0]["params"][:2]:
        del saved.state[p]
    del saved.param_groups[0]["params"][:2]
    saved.load_state_dict(saved.state_dict())  # before a step, too
    run(origin, saved)
    names = saved.state_dict()["param_groups"][0]["param_names"]
    assert names == [name for name, _ in named(origin)[2:]]
    loaded = ScaledAdamW(named(model)[:1:-1])
    loaded.load_state_dict(saved.state_dict())
    compare(loaded, model, saved, origin)


@make
@pytest.mark.parametrize("then", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("at_first", [torch.float32, torch.bfloat16])
def test_a_run_goes_on_in_another_dtype(make, at_first, then):
    """Also of what is in no pair, whose state torch gives the parameter's dtype."""
    model, again = make_model(dtype=at_first), make_model(dtype=then)
    optimizer, resumed = make(model), make(again)
    train(model, optimizer, 2)
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    train(again, resumed, 1)
    assert all(p.isfinite().all() for p in again.parameters())
    paired = {id(p) for pair in resumed._pairs for p in pair.moved}
    for p, held in resumed.state.items():
        wide = torch.promote_types(then, torch.float32) if id(p) in paired else then
        assert all(x.dtype == wide for x in held.values() if x.shape == p.shape)

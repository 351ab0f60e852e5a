"""Options that decide what state there is, changed in the middle of a run."""

import copy

import pytest
import torch
from models import make_model, same, train, values

import rlora.torch

FLIPS = [
    ("LoRAMuon", "b1", 0.9, 0.0),
    ("FactorMuon", "b1", 0.9, 0.0),
    ("AdaPreLoRA", "betas", (0.9, 0.99), (0.0, 0.99)),
    ("LoRAProSGD", "momentum", 0.9, 0.0),
    ("RefLoRA", "momentum", 0.9, 0.0),
    ("OPLoRA", "momentum", 0.9, 0.0),
    ("RACLoRA", "adam", True, False),
    ("ScaledSGD", "momentum", 0.9, 0.0),
]


@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize("name, option, first, then", FLIPS, ids=[x[0] for x in FLIPS])
def test_the_run_goes_on_and_its_state_loads_again(name, option, first, then, turned):
    """No file holds what the options of its day do not keep, and any options load it."""
    make, model = getattr(rlora.torch, name), make_model()
    first, then = (then, first) if turned else (first, then)
    optimizer = make(model, lr=1e-3, **{option: first})
    train(model, optimizer, 2)
    optimizer.param_groups[0][option] = then
    train(model, optimizer, 2)
    saved = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
    runs = [(model, optimizer)]
    for value in (first, then):
        again = make_model(seed=1)
        runs.append((again, make(again, lr=1e-3, **{option: value})))
        again.load_state_dict(saved[0])
        runs[-1][1].load_state_dict(copy.deepcopy(saved[1]))
    for value in (then, first):  # and back: what was switched off begins anew in all of them
        for one, stepped in runs:
            stepped.param_groups[0][option] = value
            train(one, stepped, 1)
            assert same(values(model), values(one))


@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize("name, option, first, then", FLIPS, ids=[x[0] for x in FLIPS])
def test_a_save_between_a_change_and_the_next_step(name, option, first, then, turned):
    """Schedulers change options after the step, and checkpoints are written after both."""
    make, model = getattr(rlora.torch, name), make_model()
    first, then = (then, first) if turned else (first, then)
    optimizer = make(model, lr=1e-3, **{option: first})
    train(model, optimizer, 2)
    optimizer.param_groups[0][option] = then
    again = make_model(seed=1)
    again.load_state_dict(model.state_dict())
    resumed = make(again, lr=1e-3)
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    train(model, optimizer, 1)
    train(again, resumed, 1)
    assert same(values(model), values(again))


def test_a_step_that_needs_another_state_moves_all_groups():
    """The chain of AdaPreLoRA has one state fewer without momentum."""
    model = make_model()
    named = list(model.named_parameters())
    groups = [{"params": [x for x in named if x[0].startswith(k)]} for k in ("0", "2", "3")]
    optimizer = rlora.torch.AdaPreLoRA(groups, lr=1e-3)
    train(model, optimizer, 1)
    before = values(model)
    optimizer.param_groups[1]["betas"] = (0.0, 0.99)
    train(model, optimizer, 1)
    for name, x in values(model).items():
        assert "base" in name or not torch.equal(x, before[name]), name

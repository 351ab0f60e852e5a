"""Weights that somebody writes between two steps: what counts is these and the state, nothing else."""

import copy

import pytest
import torch
from models import CLASSES, make_model, pairs_in, same, train, values

from rlora.torch import LoRAFA

WAYS = {
    "data.copy_": lambda p, new: p.data.copy_(new),
    "data =": lambda p, new: setattr(p, "data", new.clone()),
    "copy_": lambda p, new: p.detach().copy_(new),
}


@pytest.mark.parametrize("make", CLASSES.values(), ids=CLASSES)
@pytest.mark.parametrize("write", WAYS.values(), ids=WAYS)
def test_the_next_step_is_that_of_a_fresh_optimizer_with_the_same_state(make, write):
    model, other = make_model(), make_model(seed=7)
    optimizer = make(model)
    train(model, optimizer, 3)
    for p, new in zip(model.parameters(), other.parameters(), strict=True):
        write(p, new.detach())
    twin = copy.deepcopy(model)
    fresh = make(twin)
    fresh.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for t in (3, 4):
        train(model, optimizer, 1, start=t)
        train(twin, fresh, 1, start=t)
        assert same(values(model), values(twin))


def test_lora_fa_makes_its_inverse_anew_on_request():
    """It is made once, from an A that must not change: whoever changes A takes it out."""
    model, other = make_model(dtype=torch.float64), make_model(seed=7, dtype=torch.float64)
    optimizer = LoRAFA(model, lr=1e-2)
    train(model, optimizer, 2)
    model.load_state_dict(other.state_dict())
    for A, B in pairs_in(model):
        for p in (A, B):
            optimizer.state[p].pop("inverse", None)
    train(model, optimizer, 1)
    for A, _ in pairs_in(model):
        damping = 1e-6 * (A @ A.mT).trace() / len(A) * torch.eye(len(A), dtype=A.dtype)
        expected = torch.linalg.inv(A @ A.mT + damping)
        # float64, a Gram of condition 100 or so
        torch.testing.assert_close(optimizer.state[A]["inverse"], expected, rtol=1e-9, atol=1e-9)

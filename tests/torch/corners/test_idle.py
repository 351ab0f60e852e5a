"""Pairs that have no gradient although the training loop means them to have one."""

import warnings

import pytest
import torch
from models import CLASSES, batch, loss_of, make_model, pairs_in, train

from rlora.torch import ScaledAdamW

make = pytest.mark.parametrize(
    "make", [CLASSES[name] for name in ("adamw", "sgd", "nadam", "LoRARite")]
)
SAID = "pairs, the first .* stand still: they had no gradient in two steps; was backward"


@make
def test_an_optimizer_of_another_model_says_so_once(make):
    model, other = make_model(), make_model()
    optimizer = make(other)
    loss_of(model).backward()
    optimizer.step()
    with pytest.warns(RuntimeWarning, match=f"2 of 2 {SAID}"):
        optimizer.step()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        optimizer.step()
        train(other, optimizer, 1)


@make
def test_gradients_that_end_in_mid_run(make):
    """The adapter was changed for another one, whose parameters nobody added."""
    model = make_model()
    optimizer = make(model)
    train(model, optimizer, 2)
    model.requires_grad_(False)
    optimizer.zero_grad()
    optimizer.step()
    with pytest.warns(RuntimeWarning, match=f"2 of 2 {SAID}"):
        optimizer.step()


def test_steps_without_gradients_for_a_reason():
    """One alone, twice; and a head that is trained before the adapter."""
    model = make_model()
    optimizer = ScaledAdamW(model, lr=1e-3)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(2):
            optimizer.zero_grad()
            optimizer.step()
            train(model, optimizer, 1)
        for p in (p for pair in pairs_in(model) for p in pair):
            p.requires_grad_(False)
        for _ in range(3):
            optimizer.zero_grad()
            x, y = batch()
            (model(x) - y).square().mean().backward()
            assert isinstance(model[3].weight.grad, torch.Tensor)
            optimizer.step()

"""Gradients that come and go: module dropout, LayerDrop, experts that nobody asks, factors freed later."""

import copy

import pytest
import torch
import torch.distributed.checkpoint as dcp
from models import CLASSES, loss_of, make_model, pairs_in, same, train, values
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

KNOWN = {name: kind for name, kind in CLASSES.items() if name != "nadam"}
"""Classes whose state before the first step is known: that of any other parent torch misses too."""

make = pytest.mark.parametrize("make", CLASSES.values(), ids=CLASSES)


def model_in(dtype=torch.float64, zero_B=False):
    return make_model(dtype=dtype, bias=False, zero_B=zero_B)


def alone(make, pair):
    """A copy of a pair in an optimizer of its own."""
    copies = tuple(p.detach().clone().requires_grad_() for p in pair)
    return copies, make(list(copies), pairs=[copies])


def take(optimizer, pair, grads):
    for p, grad in zip(pair, grads, strict=True):
        p.grad = None if grad is None else grad.clone()
    optimizer.step()


DROPPED = [("AB", ""), ("", ""), ("B", ""), ("", "AB"), ("A", "B"), ("", "")]
"""For each step the factors without a gradient, of the first pair and of the second."""


@make
@pytest.mark.parametrize("zero_B", [False, True])
@pytest.mark.filterwarnings("ignore:.*lora_sb:RuntimeWarning")  # B is 0
def test_a_pair_moves_as_if_it_were_alone(make, zero_B):
    """kohya's module_dropout: a pair without gradients sits out, and its steps are not counted."""
    model = model_in(zero_B=zero_B)
    optimizer = make(model)
    twins = [alone(make, pair) for pair in pairs_in(model)]
    for t, dropped in enumerate(DROPPED):
        model.zero_grad()
        loss_of(model, t).backward()
        for pair, (copies, other), without in zip(pairs_in(model), twins, dropped, strict=True):
            for letter in without:
                pair["AB".index(letter)].grad = None
            take(other, copies, [p.grad for p in pair])
        optimizer.step()
        for pair, (copies, _) in zip(pairs_in(model), twins, strict=True):
            for p, q in zip(pair, copies, strict=True):
                # float64: one layer on a stack or two, whose kernels may round otherwise
                torch.testing.assert_close(p, q, rtol=1e-9, atol=1e-11)


@make
def test_layers_that_are_dropped_at_random(make):
    """LayerDrop: other layers at each step, all of them at some."""
    model = model_in()
    optimizer = make(model)
    twins = [alone(make, pair) for pair in pairs_in(model)]
    draw = torch.Generator().manual_seed(0)
    for t in range(8):
        kept = torch.rand(2, generator=draw) < 0.5
        model.zero_grad()
        loss_of(model, t).backward()
        for pair, twin, keep in zip(pairs_in(model), twins, kept.tolist(), strict=True):
            for p in pair:
                p.grad = p.grad if keep else None
            take(twin[1], twin[0], [p.grad for p in pair])
        optimizer.step()
    for pair, (copies, _) in zip(pairs_in(model), twins, strict=True):
        for p, q in zip(pair, copies, strict=True):
            torch.testing.assert_close(p, q, rtol=1e-9, atol=1e-11)  # as above


# --- saved meanwhile ------------------------------------------------------------------------------


def run(model, optimizer, steps, idle=()):
    """Steps in which the pairs of `idle` get no gradient."""
    for t in steps:
        optimizer.zero_grad()
        loss_of(model, t).backward()
        for k in idle:
            for p in pairs_in(model)[k]:
                p.grad = None
        optimizer.step()


@pytest.mark.parametrize("make", KNOWN.values(), ids=KNOWN)
@pytest.mark.filterwarnings("ignore:torch.distributed is disabled:UserWarning")
def test_an_expert_that_was_never_active_is_saved_loaded_and_then_active(make, tmp_path):
    """By torch.distributed.checkpoint, through files."""
    model = model_in(torch.bfloat16)
    optimizer = make(model)
    run(model, optimizer, range(3), idle=[1])
    weights, state = get_state_dict(model, optimizer)
    for held in state["state"].values():  # moments, not numbers such as the s of a layer
        assert {x.dtype for x in held.values() if x.ndim > 1} <= {torch.float32}
    dcp.save({"model": weights, "optim": state}, checkpoint_id=tmp_path, no_dist=True)
    again = model_in(torch.bfloat16)
    resumed = make(again)
    weights, state = get_state_dict(again, resumed)
    read = {"model": weights, "optim": state}
    dcp.load(read, checkpoint_id=tmp_path, no_dist=True)
    set_state_dict(again, resumed, model_state_dict=read["model"], optim_state_dict=read["optim"])
    assert same(values(model), values(again))
    run(model, optimizer, range(3, 6))
    run(again, resumed, range(3, 6))
    assert same(values(model), values(again))


@make
@pytest.mark.parametrize("steps", [0, 3])
def test_saved_between_backward_and_zero_grad(make, steps):
    """Gradients are there: a save leaves them and the state alone, and holds all of it."""
    model = model_in(torch.bfloat16)
    optimizer = make(model)
    run(model, optimizer, range(steps))
    model.zero_grad()
    loss_of(model, steps).backward()
    grads = [p.grad.clone() for pair in pairs_in(model) for p in pair]
    weights, state = copy.deepcopy(get_state_dict(model, optimizer))
    for p, grad in zip((p for pair in pairs_in(model) for p in pair), grads, strict=True):
        assert torch.equal(p.grad, grad)
    again = model_in(torch.bfloat16)
    resumed = make(again)
    loss_of(again, 0).backward()  # of whatever came before
    set_state_dict(again, resumed, model_state_dict=weights, optim_state_dict=state)
    assert same(values(model), values(again))
    optimizer.step()
    run(again, resumed, [steps])
    assert same(values(model), values(again))
    assert train(again, resumed, 2) == train(model, optimizer, 2)


@make
@pytest.mark.parametrize("letter", ["A", "B"])
@pytest.mark.filterwarnings("ignore:.*lora_sb:RuntimeWarning")  # it never moves B
def test_a_factor_frozen_at_the_save_and_freed_after(make, letter):
    """In the loaded run and in the one that went on, at once."""
    model, again = model_in(torch.bfloat16), model_in(torch.bfloat16)
    for m in (model, again):
        for pair in pairs_in(m):
            pair["AB".index(letter)].requires_grad_(False)
    optimizer = make(model)
    train(model, optimizer, 2)
    resumed = make(again)
    again.load_state_dict(model.state_dict())
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for m in (model, again):
        for pair in pairs_in(m):
            pair["AB".index(letter)].requires_grad_(True)
    assert train(model, optimizer, 3, start=2) == train(again, resumed, 3, start=2)
    assert same(values(model), values(again))

"""Optimizers that keep their state in 8 bits, with the preconditioner in front of them."""

import copy
import importlib

import pytest
import torch
from models import LoRALinear, same, values
from torch import nn

import rlora
from rlora.torch import precondition

WIDTH, RANK = 512, 16  # factors of 8192 numbers: both libraries quantise from 4096 on


def bitsandbytes():
    module = pytest.importorskip("bitsandbytes", minversion="0.50")  # it runs on a CPU from then on
    return module.optim.AdamW8bit


def torchao():
    return pytest.importorskip("torchao.optim").AdamW8bit


LIBRARIES = pytest.mark.parametrize("library", [bitsandbytes, torchao], ids=lambda f: f.__name__)
# torchao compiles its step at the first call, and torch 2.13 has news for it.
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*_stable_hash_for_caching:UserWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning:torch"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning:torchao"),
]


def make_model(seed=0, rank=RANK):
    torch.manual_seed(seed)
    return nn.Sequential(LoRALinear(WIDTH, WIDTH, rank), nn.Tanh(), LoRALinear(WIDTH, WIDTH, rank))


def train(model, optimizer, steps):
    """On one batch, whose loss therefore falls; the losses."""
    torch.manual_seed(9)
    x, y = torch.randn(16, WIDTH), torch.randn(16, WIDTH)
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = (model(x) - y).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def eight_bit(state):
    """The tensors of a state that hold a number in a byte, whatever the library calls them."""
    found = []
    for value in state.values():
        inner = getattr(value, "codes", value)
        if isinstance(inner, torch.Tensor) and inner.dtype == torch.uint8:
            found.append(inner)
    return found


@LIBRARIES
@pytest.mark.works("8-bit optimizers", "bitsandbytes and torchao below `precondition`")
def test_the_loss_falls_and_the_state_is_in_bytes(library):
    model = make_model()
    optimizer = precondition(library())(model, lr=1e-3)
    assert len(optimizer.report) == 2
    losses = train(model, optimizer, 20)
    assert losses[-1] < 0.8 * losses[0]
    for layer in (model[0], model[2]):
        for p in (layer.lora_A["default"].weight, layer.lora_B["default"].weight):
            moments = eight_bit(optimizer.state[p])
            assert len(moments) == 2
            assert all(m.numel() == p.numel() for m in moments)


@LIBRARIES
def test_it_follows_the_same_optimizer_in_full_precision(library):
    """Ten steps beside ScaledAdamW: 8 bits of state leave a few percent of a step's error."""
    model, twin = make_model(), make_model()
    start = values(model)
    train(model, precondition(library())(model, lr=1e-3, weight_decay=0.01), 10)
    same = {"betas": (0.9, 0.999), "placement": "before", "damping": 1e-4}
    wide = rlora.torch.ScaledAdamW(twin, lr=1e-3, **same)
    train(twin, wide, 10)
    for name, p in values(model).items():
        if "lora" in name:
            moved = values(twin)[name] - start[name]
            assert (p - start[name] - moved).norm() < 0.1 * moved.norm(), name


@LIBRARIES
def test_it_is_not_the_plain_optimizer(library):
    model, twin = make_model(), make_model()
    train(model, precondition(library())(model, lr=1e-3), 3)
    train(twin, library()([p for p in twin.parameters() if p.requires_grad], lr=1e-3), 3)
    assert not same(values(model), values(twin))


@LIBRARIES
def test_resume_is_bit_exact(library, tmp_path):
    """Through torch.load(weights_only=True); damping comes from the file, as the other options do."""
    model = make_model()
    optimizer = precondition(library())(model, lr=1e-3, damping=1e-3)
    train(model, optimizer, 5)
    torch.save({"m": model.state_dict(), "o": optimizer.state_dict()}, tmp_path / "c.pt")
    expected = train(model, optimizer, 5)
    saved = torch.load(tmp_path / "c.pt", weights_only=True)
    again = make_model(seed=1)
    resumed = precondition(library())(again, lr=1e-3)
    again.load_state_dict(saved["m"])
    resumed.load_state_dict(saved["o"])
    assert resumed.param_groups[0]["damping"] == 1e-3
    assert train(again, resumed, 5) == expected
    assert same(values(again), values(model))


@LIBRARIES
def test_the_plain_optimizers_state_loads(library):
    """It goes on preconditioning with what the constructor was given."""
    model = make_model()
    plain = library()([p for p in model.parameters() if p.requires_grad], lr=3e-3)
    train(model, plain, 3)
    optimizer = precondition(library())(model, lr=1e-3, damping=0.5)
    optimizer.load_state_dict(plain.state_dict())
    group = optimizer.param_groups[0]
    assert (float(group["lr"]), group["damping"]) == (pytest.approx(3e-3), 0.5)
    losses = train(model, optimizer, 5)
    assert losses[-1] < losses[0]


@LIBRARIES
def test_a_state_of_another_rank_is_refused_whole(library):
    """bitsandbytes itself would load it without a look."""
    old = make_model(rank=RANK // 2)
    saved = precondition(library())(old, lr=1e-3)
    train(old, saved, 1)
    model = make_model()
    optimizer = precondition(library())(model, lr=1e-3)
    train(model, optimizer, 1)
    before = [[m.clone() for m in eight_bit(s)] for s in optimizer.state.values()]
    with pytest.raises(rlora.ShapeError, match="was the rank changed"):
        optimizer.load_state_dict(saved.state_dict())
    after = [eight_bit(s) for s in optimizer.state.values()]
    assert all(
        torch.equal(x, y)
        for b, a in zip(before, after, strict=True)
        for x, y in zip(b, a, strict=True)
    )


@LIBRARIES
def test_gradients_are_untouched(library):
    model = make_model()
    optimizer = precondition(library())(model, lr=1e-3)
    model(torch.ones(2, WIDTH)).square().mean().backward()
    grads = {p: p.grad.clone() for p in model.parameters() if p.grad is not None}
    optimizer.step()
    assert all(torch.equal(p.grad, g) for p, g in grads.items())


@pytest.mark.parametrize("name", ["AdEMAMix", "AdEMAMix8bit"])
def test_a_state_of_two_averages_in_one_array_is_loaded(name):
    bitsandbytes()
    kind = precondition(getattr(importlib.import_module("bitsandbytes.optim"), name))
    model = make_model()
    optimizer = kind(model, lr=1e-3)
    train(model, optimizer, 2)
    again = copy.deepcopy(model)
    resumed = kind(again, lr=1e-3)
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert train(model, optimizer, 2) == train(again, resumed, 2)
    other = precondition(bitsandbytes())(again, lr=1e-3)
    train(again, other, 1)
    for one, its in ((other, resumed), (resumed, other)):
        with pytest.raises(rlora.ShapeError, match="state of another optimizer"):
            one.load_state_dict(its.state_dict())

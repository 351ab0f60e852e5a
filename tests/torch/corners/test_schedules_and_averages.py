"""Wrappers over and under an optimizer: averages of weights, schedules that look at the loss.

OneCycleLR and CyclicLR with a momentum that cycles are in tests/torch/test_state.py.
"""

import copy

import pytest
import torch
from models import CLASSES, loss_of, make_model, same, train, values
from torch.optim.lr_scheduler import ReduceLROnPlateau
from torch.optim.swa_utils import SWALR, AveragedModel, get_ema_multi_avg_fn, update_bn

from rlora.torch import precondition

make = pytest.mark.parametrize("make", CLASSES.values(), ids=CLASSES)


@make
def test_reduce_on_plateau_is_a_rate_set_by_hand(make):
    model, twin = make_model(), make_model()
    optimizer, by_hand = make(model), make(twin)
    schedule = ReduceLROnPlateau(optimizer, factor=0.25, patience=1)
    for t, loss in enumerate([1.0, 1.0, 1.0, 0.5, 2.0]):
        train(model, optimizer, 1, start=t)
        train(twin, by_hand, 1, start=t)
        schedule.step(loss)
        if t == 2:  # twice no better
            by_hand.param_groups[0]["lr"] *= 0.25
        assert optimizer.param_groups[0]["lr"] == by_hand.param_groups[0]["lr"]
    assert same(values(model), values(twin))


@make
def test_averages_of_weights_have_the_weights_of_every_step(make):
    """EMA and SWA beside a run that does not notice them, the latter with its schedule."""
    model, twin = make_model(), make_model()
    optimizer, alone = make(model), make(twin)
    ema = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.75))
    swa = AveragedModel(model)
    schedules = [SWALR(o, swa_lr=1e-3, anneal_epochs=2) for o in (optimizer, alone)]
    seen = []
    for t in range(4):
        train(model, optimizer, 1, start=t)
        train(twin, alone, 1, start=t)
        ema.update_parameters(model)
        swa.update_parameters(model)
        seen.append(values(model))
        for schedule in schedules:
            schedule.step()
    assert optimizer.param_groups[0]["lr"] == pytest.approx(1e-3)
    assert same(values(model), values(twin))
    weights = [0.75**3, 0.25 * 0.75**2, 0.25 * 0.75, 0.25]  # of the first, which starts the mean
    for name, first in seen[0].items():
        mean = sum(step[name] for step in seen) / 4
        moving = sum(w * step[name] for w, step in zip(weights, seen, strict=True))
        torch.testing.assert_close(swa.module.get_parameter(name).detach(), mean)
        torch.testing.assert_close(ema.module.get_parameter(name).detach(), moving)
        frozen = ".base." in name
        assert torch.equal(first, seen[-1][name]) == frozen or "lora_" in name
    update_bn([torch.randn(3, 6)], swa)  # looks for statistics; there are none
    assert swa.module[0].base.weight.grad is None


@make
def test_schedule_free_over_an_optimizer(make):
    """Gradients at y, the step from z, and x as the mean of z.

    Of pairs alone: torch's AdamW takes the wrapper's entry for its own state, and fails on plain
    parameters with it and without rlora.
    """
    wrapper = pytest.importorskip("schedulefree").ScheduleFreeWrapper
    if make is CLASSES["nadam"]:
        pytest.skip("NAdam finds the wrapper's entry in its state, as AdamW does")
    model = make_model(dtype=torch.float64, bias=False)
    y, z = copy.deepcopy(model), copy.deepcopy(model)
    optimizer, below = wrapper(make(model), momentum=0.9), make(z)
    x = values(model)
    optimizer.train()
    for t in range(4):
        train(model, optimizer, 1, start=t)
        y.zero_grad()
        loss_of(y, t % 3).backward()
        for p, q in zip(z.parameters(), y.parameters(), strict=True):
            p.grad = q.grad
        below.step()
        with torch.no_grad():
            for (name, q), p in zip(y.named_parameters(), z.parameters(), strict=True):
                x[name] = x[name].lerp(p, 1 / (t + 1))
                q.copy_(x[name].lerp(p, 0.1))
    for name, p in model.named_parameters():
        # float64; x comes back from y by a division by 0.9 at every step
        torch.testing.assert_close(p, y.get_parameter(name), rtol=1e-8, atol=1e-10)
    again = wrapper(make(model), momentum=0.9)
    again.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert all("z" in again.state[p] for p in optimizer.state)
    optimizer.eval()
    for name, p in model.named_parameters():
        torch.testing.assert_close(p.detach(), x[name], rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_schedule_free_under_the_preconditioner(dtype):
    """tests/torch/test_state.py has the numbers of one of our own; this is the package's."""
    below = pytest.importorskip("schedulefree").AdamWScheduleFree
    model = make_model(dtype=dtype)
    optimizer = precondition(below)(model, lr=2e-2)
    assert len(optimizer.report) == 2
    optimizer.train()
    losses = train(model, optimizer, 30)
    again, at_y = make_model(seed=1, dtype=dtype), copy.deepcopy(model.state_dict())
    again.load_state_dict(at_y)
    resumed = precondition(below)(again, lr=2e-2)
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    optimizer.eval()
    assert float(loss_of(model, 2).detach()) < losses[2]
    optimizer.train()
    model.load_state_dict(at_y)  # as y was before it was rounded on the way to x and back
    assert train(model, optimizer, 3) == train(again, resumed, 3)

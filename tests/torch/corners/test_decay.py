"""Weight decay alone, by group, in bfloat16; and a pair of zeros, which nothing moves."""

import math

import pytest
import torch
from models import CLASSES, METHODS, loss_of, make_model, pairs_in, same, train, values

import rlora.torch
from rlora.torch import LoRAPlus, ScaledAdamW, ScaledProdigy, ScaledSGD, findings

DECAYING = {
    kind.__name__: kind
    for kind in (ScaledAdamW, ScaledSGD, *METHODS.values())
    if kind not in METHODS.values() or "weight_decay" in kind._options
}


def without_gradients(model, optimizer, steps):
    for _ in range(steps):
        for pair in pairs_in(model):
            for p in pair:
                p.grad = torch.zeros_like(p)
        optimizer.step()


def test_decay_by_group_under_lora_plus():
    """Each pair at the decay of its group, A and B at the rates of the ratio."""
    model = make_model(dtype=torch.float64, bias=False)
    start = [[p.detach().clone() for p in pair] for pair in pairs_in(model)]
    groups = [
        {"params": list(pair), "pairs": [pair], "weight_decay": decay}
        for pair, decay in zip(pairs_in(model), (0.5, 0.0), strict=True)
    ]
    optimizer = LoRAPlus(groups, lr=1e-2, ratio=8.0)
    without_gradients(model, optimizer, 3)
    for pair, (A, B), decay in zip(pairs_in(model), start, (0.5, 0.0), strict=True):
        kept = [(1 - rate * decay) ** 3 for rate in (1e-2, 8e-2)]
        torch.testing.assert_close(pair[0].detach(), kept[0] * A, rtol=1e-12, atol=0)
        torch.testing.assert_close(pair[1].detach(), kept[1] * B, rtol=1e-12, atol=0)


@pytest.mark.parametrize("kind", DECAYING.values(), ids=DECAYING)
def test_decay_alone_shrinks_the_product_and_turns_nothing(kind):
    model = make_model(dtype=torch.float64, bias=False)
    own = {"d0": 1.0} if kind is ScaledProdigy else {}  # its decay goes with the rate it has found
    optimizer = kind(model, lr=1e-2, weight_decay=0.5, **own)
    start = [(B @ A).detach() for A, B in pairs_in(model)]
    without_gradients(model, optimizer, 3)
    for (A, B), old in zip(pairs_in(model), start, strict=True):
        new = (B @ A).detach()
        kept = float(new.norm() / old.norm())
        # Once or twice a step, for LoRA+ and StableLoRA at larger rates for B.
        assert 0.5 < kept < 0.986
        torch.testing.assert_close(new, kept * old, rtol=0, atol=1e-12)


ELEMENTWISE = ("ScaledAdamW", "ScaledSGD", "LoRARite", "LoRAPlus", "LoRAProAdamW", "LoRAFA")
"""Methods whose decay is a number times each factor, so that rounding is all that differs."""


@pytest.mark.parametrize("name", ELEMENTWISE)
def test_decay_at_a_rate_of_1e_5_in_bfloat16(name):
    """Far below the last bit: lost when rounded to nearest, true in the mean when at random."""
    kept = {}
    for dtype, rounded in ((torch.float32, False), (torch.bfloat16, False), (torch.bfloat16, True)):
        generator = torch.Generator().manual_seed(0)
        A, B = (
            torch.randn(shape, generator=generator).bfloat16().to(dtype).requires_grad_()
            for shape in ((4, 1024), (1024, 4))
        )
        before = B.detach().clone()
        optimizer = DECAYING[name](
            [A, B], lr=1e-5, weight_decay=1.0, pairs=[(A, B)], stochastic_rounding=rounded
        )
        A.grad, B.grad = torch.zeros_like(A), torch.zeros_like(B)
        for _ in range(100):
            optimizer.step()
        kept[dtype, rounded] = math.log(B.detach().double().norm() / before.double().norm())
        assert torch.equal(B, before) == ((dtype, rounded) == (torch.bfloat16, False))
    # About 1,000 of 4,096 entries have gone down by one: a standard error of 3 %.
    expected = kept[torch.float32, False]
    assert kept[torch.bfloat16, True] == pytest.approx(expected, rel=0.2)


@pytest.mark.parametrize("make", CLASSES.values(), ids=CLASSES)
@pytest.mark.filterwarnings("ignore:.*they stand still:RuntimeWarning")  # what never moves is 0
def test_a_pair_of_zeros_stands_still_and_findings_say_why(make):
    """The gradient of either factor is the other one times something."""
    model = make_model(bias=False)
    dead, alive = pairs_in(model)
    with torch.no_grad():
        for p in dead:
            p.zero_()
    optimizer = make(model)
    optimizer.watch()
    before = values(model)
    train(model, optimizer, 3)
    assert not any(p.any() for p in dead)
    assert not same(before, values(model))
    assert all(p.isfinite().all() for p in alive)
    words = [x for x in findings(optimizer.diagnostics()) if "both factors" in x]
    assert words == [
        "both factors are zero, and so are their gradients: no method leaves that, start A at "
        "random (1 of 2 pairs, first 0 (default))"
    ]
    fresh = make_model(bias=False, zero_B=True)
    loss_of(fresh).backward()
    numbers = rlora.torch.ScaledAdamW(fresh).diagnostics()
    assert not any("both factors" in x for x in findings(numbers))

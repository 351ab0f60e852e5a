"""Covariant damping, which holds A back until B has grown, and a B that never does."""

import pytest
import torch

import rlora.torch

OPTIONS = [
    ("ScaledSGD", {}),
    ("ScaledSGD", {"momentum": 0.9}),
    *(("ScaledAdamW", {"placement": x}) for x in ("before", "after", "both")),
    ("ScaledAdamW", {"amsgrad": True, "fused": False}),
]
EVERY = pytest.mark.parametrize("name, options", OPTIONS, ids=str)


def pairs_of(count, seed=0):
    draw = torch.Generator().manual_seed(seed)
    made = [torch.randn(s, generator=draw, dtype=torch.float64) for s in [(3, 12), (9, 3)] * count]
    params = [torch.nn.Parameter(x) for x in made]
    return list(zip(params[::2], params[1::2], strict=True))


def moved(name, options, damping, frozen, steps=4):
    """Factors A after some steps; the pairs in `frozen` have a B that is."""
    pairs = pairs_of(len(frozen))
    for (_, B), stays in zip(pairs, frozen, strict=True):
        B.requires_grad_(not stays)
    params = [p for pair in pairs for p in pair]
    optimizer = getattr(rlora.torch, name)(
        params, lr=0.01, damping=damping, damping_mode="covariant", pairs=pairs, **options
    )
    for k in range(steps):
        for i, p in enumerate(params):
            if p.requires_grad:
                draw = torch.Generator().manual_seed(100 * k + i)
                p.grad = torch.randn(p.shape, generator=draw, dtype=torch.float64)
        optimizer.step()
    return [A.detach() for A, _ in pairs]


@EVERY
def test_where_B_is_frozen_A_moves_as_without_damping(name, options):
    free, held = moved(name, options, 0.0, [True]), moved(name, options, 1e4, [False])
    alone = moved(name, options, 1e4, [True])
    torch.testing.assert_close(alone, free, rtol=1e-12, atol=1e-14)
    both = moved(name, options, 1e4, [True, False])  # of one rank
    torch.testing.assert_close(both[0], free[0], rtol=1e-12, atol=1e-14)
    assert (held[0] - free[0]).abs().max() > 1e-6


@pytest.mark.parametrize("name, options", OPTIONS[1:], ids=str)
def test_a_B_that_pauses_is_none_that_is_fixed(name, options):
    """In training by turns A is held back while B is small.

    SGD without momentum keeps no state, and cannot tell.
    """

    def paused(damping, frozen):
        ((A, B),) = pairs_of(1)
        optimizer = getattr(rlora.torch, name)(
            [A, B], lr=0.01, damping=damping, damping_mode="covariant", pairs=[(A, B)], **options
        )
        A.grad, B.grad = torch.cos(torch.arange(36.0).view_as(A)).double(), torch.ones_like(B)
        optimizer.step()
        B.grad = None
        B.requires_grad_(not frozen)
        optimizer.step()
        return A.detach()

    held = paused(1e4, frozen=False)  # as the kept numbers of test_steps.py have it
    assert torch.equal(paused(1e4, frozen=True), held)
    assert (paused(0.0, frozen=True) - held).abs().max() > 1e-6


def test_diagnostics_show_the_damping_that_there_is():
    pairs = pairs_of(2)
    for _, B in pairs:
        B.requires_grad_(False)
    optimizer = rlora.torch.ScaledAdamW(
        [p for pair in pairs for p in pair], lr=0.01, damping=1e4, pairs=pairs
    )
    for A, _ in pairs:
        A.grad = torch.ones_like(A)
    optimizer.step()
    assert optimizer.diagnostics()["rlora/damped_B/count"] == 0

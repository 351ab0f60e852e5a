"""No factor grows where the product needs less than it could hold (decision 10)."""

import numpy as np
import pytest

import rlora
from rlora.backends import get
from rlora.core.metric import split_power
from rlora.core.rank_group import RankGroup
from rlora.testing import assert_close, make_problem, run
from rlora.testing.growth import GrowthCase, _nearest, adamw, growth, growths

FINITE = {
    "default": {},
    "relative": {"damping": 1e-4, "damping_mode": "relative"},
    "absolute": {"damping": 1e-4, "damping_mode": "absolute"},
}
SHAPES = [(1, 256, 8), (3, 20, 8), (20, 3, 8), (24, 16, 8), (8, 8, 8), (2, 2, 16)]
"""Ranks above, equal to and below a side; the rank of the target is 1."""


@pytest.mark.parametrize("damping", [1e-2, 1e-4])
@pytest.mark.parametrize("shape", [(2, 768, 8), (3, 20, 8), (20, 3, 8)], ids=str)
def test_the_loss_falls_with_a_rank_above_a_side(shape, damping):
    """Without the filter it rose to 1e15 here, in float64 with a damping of 1e-4."""
    problem = make_problem(*shape, zero_B=True)
    method = rlora.scaled_adamw(damping=damping)
    params, _ = run(method, problem, steps=100, lr=1e-3)
    assert problem.loss(params) < problem.loss(problem.params)
    assert max(np.abs(x).max() for x in params) < 10


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_factors_stay_as_large_as_those_of_adamw(dtype, shape):
    check_growth(rlora.scaled_adamw(), shape, dtype=dtype)


@pytest.mark.parametrize("shape", [(1, 256, 8), (20, 3, 8), (8, 8, 8)], ids=str)
def test_factors_in_bfloat16_too(shape):
    check_growth(rlora.scaled_adamw(), shape, dtype="bfloat16", backend=get("torch"))


def check_growth(method, shape, **settings):
    """Check the promise: at most 40 times AdamW's largest entry, and 1.25 times its loss."""
    ours, theirs = (growth(x, *shape, lr=4e-3, steps=1000, **settings) for x in (method, adamw()))
    assert ours.largest <= 40 * theirs.largest
    assert ours.last <= 1.25 * theirs.last
    assert ours.last <= ours.first


@pytest.mark.parametrize("noise", [0.0, 0.5])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("shape", [(2, 64, 8), (24, 16, 4)], ids=str)
@pytest.mark.parametrize("options", FINITE.values(), ids=FINITE)
def test_high_rates_stay_finite(options, shape, dtype, noise):
    method = rlora.scaled_adamw(**options)
    result = growth(method, *shape, noise=noise, lr=1e-2, steps=300, dtype=dtype)
    assert np.isfinite(result.largest)
    assert result.last <= result.first


@pytest.mark.parametrize("shape", [(24, 16, 8), (2, 64, 8)], ids=str)
def test_a_trained_adapter_can_be_rounded_to_bfloat16(shape):
    """Rounding adds less than a hundredth to the loss, noise included, as it does for AdamW."""
    backend = get("torch")
    problem = make_problem(*shape, zero_B=True).on(backend, "float32")
    params, _ = run(rlora.scaled_adamw(), problem, steps=800, lr=1e-2)
    rounded = rlora.Factors(*(x.bfloat16().float() for x in params))
    start = float(problem.loss(problem.params))
    assert float(problem.loss(params)) < 0.1 * start
    assert float(problem.loss(rounded) - problem.loss(params)) < 1e-3 * start


@pytest.mark.parametrize("name", ["lora_rite", "lora_muon", "alt_lora", "alt_lora_plus", "op_lora"])
@pytest.mark.parametrize("dtype, inner", [(4, None), (4, "float64"), (8, None)], ids=str)
@pytest.mark.parametrize("lr", [1e-1, 4e-3])
def test_a_target_of_half_the_rank(lr, dtype, inner, name):
    """Directions that only rounding has filled stay out, in algebra wider than the factors too.

    Normalised, they took the loss to 1e46 times its start in float64.
    """
    method = getattr(rlora, name)(compute_dtype=inner)
    for seed in range(4):
        rng = np.random.default_rng(seed)
        target = (rng.normal(size=(30, 2)) @ rng.normal(size=(2, 20))).astype(f"f{dtype}")
        A = (rng.normal(size=(4, 20)) / 4).astype(f"f{dtype}")
        pair, losses = rlora.Factors(A, np.zeros((30, 4), f"f{dtype}")), []
        state = method.init(pair)
        for _ in range(60):
            error = pair.B @ pair.A - target
            losses.append(float(np.sum(error**2)))
            grads = rlora.Factors(pair.B.T @ error, error @ pair.A.T)
            pair, state = rlora.step(method, pair, grads, state, lr)
        assert max(losses) < 1.01 * losses[0]


@pytest.mark.parametrize("name", rlora.methods.__all__)
def test_cases_in_one_stack_are_those_alone(name):
    """Stacked layers do not see each other; other orders of summation, over five steps."""
    method, shape = getattr(rlora.methods, name), (5, 9, 3)
    cases = [GrowthCase(1, 0.0, 1e-3), GrowthCase(3, 0.5, 1e-2), GrowthCase(2, 0.1, 0.0)]
    found = growths(method(), *shape, cases, 5, dtype="float64")
    for case in cases:
        alone = growths(method(), *shape, [case], 5, dtype="float64")[case]
        assert_close(np.array(found[case][:3]), np.array(alone[:3]), rtol=1e-8)


def test_what_rounding_does_to_the_product():
    """As torch rounds, and of a rank-one product about a third of 2^-16 of its square."""
    import torch

    A, B = np.random.default_rng(0).normal(size=(2, 1, 400))
    wide = torch.tensor(A)
    assert_close(_nearest(A), wide.bfloat16().double().numpy())
    square = np.sum((_nearest(B).T @ _nearest(A) - B.T @ A) ** 2) / np.sum((B.T @ A) ** 2)
    assert 0.2 < square * 2**16 < 0.45


@pytest.mark.parametrize("mode", ["relative", "absolute", "covariant"])
@pytest.mark.parametrize("placement", ["after", "both"])
def test_the_filter_in_eigenvalues(placement, mode):
    """A diagonal pair keeps everything diagonal: ``h^-½ (s / h)⁴`` for the Gram s, damped h."""
    a, b, delta = np.array([2.0, 1.0, 0.5]), np.array([1.0, 0.03, 0.0]), 1e-2
    small = 1e-6  # what is added to every Gram behind Adam, relative to its mean
    m, n = 48, 3
    pair = rlora.Factors(np.diag(a), np.vstack([np.diag(b), np.zeros((m - 3, 3))]))
    group = RankGroup(get("numpy"), [pair])
    S = group.partner_gram([pair])
    _, second = split_power(group, S, [(m, n)], placement, delta, mode)
    for own, partner, c, Q in ((a, b, 2.0, second[0]), (b, a, 0.5, second[1])):
        s = partner**2
        shift = {"relative": delta * s.mean(), "absolute": delta, "covariant": 0.0}[mode]
        if mode == "covariant" and own is a:
            shift = delta / (a**2 + small * (a**2).mean())
        h = s + shift
        h = h + small * h.mean() if mode == "covariant" else h
        power = -0.5 if placement == "both" else -1.0
        assert_close(np.diag(Q), c * h**power * (s / h) ** 4, rtol=1e-12)
        assert_close(Q - np.diag(np.diag(Q)), 0 * Q, atol=1e-12)

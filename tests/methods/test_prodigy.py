"""Scaled Prodigy: the learning rate that it finds, and what that does not depend on."""

import inspect

import numpy as np
import pytest
import torch

import rlora
import rlora.torch
from rlora import Factors
from rlora.testing import assert_close, make_problem
from rlora.testing.growth import adamw, growth

STEPS = 150
RATES = 2.0 ** -np.arange(12)


def losses_after(method, problem, rates):
    """At each of the rates, in one stack of layers, after a linear decay."""
    params = Factors(*(np.stack([x] * len(rates)) for x in problem.params))
    state = method.init(params)
    for done in range(STEPS):
        error = params.B @ params.A - problem.target
        grads = Factors(params.B.mT @ error, error @ params.A.mT)
        lr = (1 - done / STEPS) * np.asarray(rates)[:, None, None]
        params, state = rlora.step(method, params, grads, state, lr)
    return np.sum((params.B @ params.A - problem.target) ** 2, axis=(-2, -1))


@pytest.mark.parametrize("d0", [1e-6, 1e-4, 1e-3])
def test_it_learns_as_well_as_at_a_tuned_rate(d0):
    """At the best of twelve rates, a factor of two apart, scaled AdamW gets hardly further."""
    problem = make_problem(zero_B=True)
    tuned = losses_after(rlora.scaled_adamw(weight_decay=0.0), problem, RATES)
    found = losses_after(rlora.scaled_prodigy(weight_decay=0.0, d0=d0), problem, [1.0])
    # A hundredth of what there is to learn: what lies between two rates of the sweep.
    assert found.item() - tuned.min() <= 0.01 * np.sum(problem.target**2)


@pytest.mark.parametrize("seed", range(4))
def test_the_rate_is_no_more_than_the_distance_to_the_solution(seed):
    """With A frozen the loss is convex and P constant: there the bound is a theorem."""
    problem = make_problem(zero_B=True, seed=seed)
    method = rlora.scaled_prodigy(weight_decay=0.0, d0=1e-5)
    params, state = problem.params, method.init(problem.params)
    H = params.A @ params.A.T
    P = np.linalg.cholesky(np.linalg.inv(H)[::-1, ::-1]).T[::-1, ::-1]
    best = problem.target @ np.linalg.pinv(params.A) / problem.scaling
    distance = np.abs((params.B - best) @ np.linalg.inv(P)).max()
    sizes = [float(state[0].distance.size)]
    for _ in range(120):
        grads = problem.grads(params)._replace(A=None)
        params, state = rlora.step(method, params, grads, state, 1.0)
        sizes.append(float(state[0].distance.size))
    assert sizes == sorted(sizes)
    assert 1e-3 * distance < sizes[-1] <= distance


def test_a_rate_that_is_far_too_low_grows_tenfold_in_ten_steps():
    problem = make_problem(zero_B=True)
    method = rlora.scaled_prodigy(d0=1e-8)
    params, state = problem.params, method.init(problem.params)
    sizes = [1e-8]
    for _ in range(40):
        params, state = rlora.step(method, params, problem.grads(params), state, 1.0)
        sizes.append(float(state[0].distance.size))
    ratios = [later / now for now, later in zip(sizes, sizes[10:], strict=False) if later < 1e-3]
    assert len(ratios) > 20
    assert 5 < min(ratios) < max(ratios) < 100  # 8 to 41 were measured


@pytest.mark.parametrize("shape", [(8, 8, 8), (20, 3, 8), (2, 2, 16)])
def test_noise_does_not_raise_the_rate_for_ever(shape):
    """At a constant rate; without the two standard deviations d of these runs away, to NaN."""
    m, n, r = shape
    found, usual = (
        growth(method, m, n, r, lr=lr, dtype="float64")
        for method, lr in ((rlora.scaled_prodigy(), 1.0), (adamw(), 4e-3))
    )
    assert found.last < 1.5 * usual.last  # its steps are larger: 1.0 to 1.14 were measured


@pytest.mark.parametrize("unit", [1e-8, 1e8])
def test_the_unit_of_the_loss_changes_nothing(unit):
    problem, method = make_problem(seed=2), rlora.scaled_prodigy(eps=0.0)
    ends = []
    for c in (1.0, unit):
        params, state = problem.params, method.init(problem.params)
        for _ in range(30):
            grads = Factors(*(c * g for g in problem.grads(params)))
            params, state = rlora.step(method, params, grads, state, 1.0)
        ends.append(params)
    for one, other in zip(*ends, strict=True):
        assert_close(one, other, rtol=1e-9)


def test_a_pair_finds_its_rate_alone():
    """Beside another pair, and in a stack of layers, the rate is what it is by itself."""
    problems = [make_problem(seed=seed, zero_B=True) for seed in range(2)]
    target = np.stack([problem.target * c for problem, c in zip(problems, (1, 100), strict=True)])
    method, sizes = rlora.scaled_prodigy(), []
    stacked = Factors(*(np.stack(x) for x in zip(*(p.params for p in problems), strict=True)))
    for chosen in (slice(0, 2), slice(0, 1), slice(1, 2)):
        params = Factors(stacked.A[chosen], stacked.B[chosen])
        state = method.init(params)
        for _ in range(60):
            error = params.B @ params.A - target[chosen]
            grads = Factors(params.B.mT @ error, error @ params.A.mT)
            params, state = rlora.step(method, params, grads, state, 1.0)
        sizes.append(state[0].distance.size)
    assert_close(sizes[0], np.concatenate(sizes[1:]), rtol=1e-10)
    assert sizes[0][1] > 10 * sizes[0][0]


def test_the_start_is_not_written_over_by_a_donated_step():
    problem, method = make_problem(), rlora.scaled_prodigy()
    start = Factors(*(x.copy() for x in problem.params))
    params, state = problem.params, method.init(problem.params)
    for _ in range(2):
        grads = problem.grads(params)
        params, state = rlora.step(method, params, grads, state, 1.0, donate=True)
    for kept, x in zip(state[0].distance.start, start, strict=True):
        assert_close(kept, x)


def test_the_rate_is_one_unless_given():
    A, B = torch.ones(2, 5, requires_grad=True), torch.zeros(3, 2, requires_grad=True)
    group, *_ = rlora.torch.ScaledProdigy([A, B], pairs=[(A, B)]).param_groups
    assert group["lr"] == 1.0
    assert inspect.signature(rlora.torch.ScaledProdigy).parameters["lr"].default == 1.0
    assert inspect.signature(rlora.torch.LoRARite).parameters["lr"].default == 1e-3


@pytest.mark.parametrize("d0", [0.0, -1.0, float("inf"), "1"])
def test_d0_is_positive(d0):
    with pytest.raises((ValueError, TypeError), match="d0"):
        rlora.scaled_prodigy(d0=d0)

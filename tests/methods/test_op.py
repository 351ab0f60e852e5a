"""OPLoRA: its two half-steps against dense least squares, and what its momentum can hold."""

import numpy as np
import pytest

import rlora
from rlora import Factors
from rlora.testing import assert_close, make_problem

EXACT = 1e-11  # conditions of about 5, squared in a Gram
LR = 0.2


def gradients(pair, G):
    return Factors(pair.B.T @ G, G @ pair.A.T)


def stepped(pair, G, **options):
    method = rlora.op_lora(**{"momentum": 0.0, "damping": 0.0} | options)
    return rlora.step(method, pair, gradients(pair, G), method.init(pair), LR)[0]


def seen(pair, G):
    """The part of G in the tangent space."""
    P_A, P_B = np.linalg.pinv(pair.A) @ pair.A, pair.B @ np.linalg.pinv(pair.B)
    return P_B @ G + G @ P_A - P_B @ G @ P_A


@pytest.fixture
def drawn():
    pair = make_problem(seed=7).params
    return pair, np.random.default_rng(8).normal(size=(len(pair.B), pair.A.shape[1]))


@pytest.mark.parametrize("damping", [0.0, 1e-2, 10.0])
def test_no_half_step_raises_the_distance_to_the_target(drawn, damping):
    """Each half-step minimises what the other one left; damping only shortens that of A."""
    pair, G = drawn
    target = pair.B @ pair.A - LR * seen(pair, G)
    A, B = stepped(pair, G, damping=damping)
    start, half, end = (np.linalg.norm(y @ x - target) for x, y in (pair, (A, pair.B), (A, B)))
    assert end < half < start
    best = np.linalg.svd(target, compute_uv=False)[len(A) :]
    assert end >= np.linalg.norm(best)  # the truncated SVD


def test_two_half_steps_come_closer_than_a_straight_line(drawn):
    pair, G = drawn
    target = pair.B @ pair.A - LR * seen(pair, G)
    pro = rlora.lora_pro_sgd(gauge="zero", damping=0.0)
    line, _ = rlora.step(pro, pair, gradients(pair, G), pro.init(pair), LR)
    ours, theirs = (np.linalg.norm(p.B @ p.A - target) for p in (stepped(pair, G), line))
    assert ours < theirs


def test_a_target_of_rank_r_is_reached_at_once(drawn):
    """Rows of the gradient in the row space of A: the straight line misses it by lr²."""
    pair, G = drawn
    G = G @ np.linalg.pinv(pair.A) @ pair.A
    A, B = stepped(pair, G)
    assert_close(B @ A, pair.B @ pair.A - LR * G, rtol=EXACT)


def test_momentum_is_a_heavy_ball_where_rank_r_can_hold_it(drawn):
    pair, G = drawn
    method, beta = rlora.op_lora(momentum=0.8, damping=0.0), 0.8
    state, M, inside = method.init(pair, 2.0), 0.0, np.linalg.pinv(pair.A) @ pair.A
    for k in range(4):
        G_k = np.roll(G, k, axis=1) @ inside
        M = beta * M + G_k / 2.0**2
        _, state = method.update(gradients(pair, G_k), state, pair)
    assert_close(state[0].mu.B @ state[0].mu.A, M, rtol=EXACT)


def test_momentum_becomes_the_truncated_svd_of_a_gradient_that_repeats(drawn):
    """One round a step is subspace iteration, here for the tangent part, of rank 2r."""
    pair, G = drawn
    method = rlora.op_lora(momentum=0.5, damping=0.0)
    state = method.init(pair)
    for _ in range(300):
        _, state = method.update(gradients(pair, G), state, pair)
    U, sigma, Vt = np.linalg.svd(2 * seen(pair, G))
    r = len(pair.A)
    best = (U[:, :r] * sigma[:r]) @ Vt[:r]
    assert_close(state[0].mu.B @ state[0].mu.A, best, rtol=EXACT)


@pytest.mark.parametrize("s", [0.5, 8.0])
def test_the_weight_does_not_depend_on_s(s):
    """The same weight held by another s, five steps with momentum."""
    problem, weights = make_problem(seed=9), []
    for scaling in (1.0, s):
        method = rlora.op_lora(damping=0.0)
        pair = problem.params._replace(B=problem.params.B / scaling)
        state = method.init(pair, scaling)
        for _ in range(5):
            G = scaling * pair.B @ pair.A - problem.target
            g = Factors(*(scaling * x for x in gradients(pair, G)))
            pair, state = rlora.step(method, pair, g, state, LR)
        weights.append(scaling * pair.B @ pair.A)
    assert_close(weights[1], weights[0], rtol=EXACT)


def test_with_a_frozen_partner_the_step_is_a_line(drawn):
    pair, G = drawn
    method = rlora.op_lora(momentum=0.0, damping=0.0)
    for letter, move in (("A", np.linalg.pinv(pair.B) @ G), ("B", G @ np.linalg.pinv(pair.A))):
        other = "B" if letter == "A" else "A"
        g = gradients(pair, G)._replace(**{other: None})
        new, _ = rlora.step(method, pair, g, method.init(pair), LR)
        assert_close(getattr(new, letter), getattr(pair, letter) - LR * move, rtol=EXACT)
        assert getattr(new, other) is getattr(pair, other)


def test_from_zero_B_the_first_step_is_the_proximal_one(drawn):
    """A stays; B is the least squares fit of the gradient by the rows of A."""
    pair, G = drawn
    A, B = stepped(pair._replace(B=0 * pair.B), G)
    assert_close(A, pair.A)
    assert_close(B, -LR * G @ np.linalg.pinv(pair.A), rtol=EXACT)


@pytest.mark.parametrize(("held", "rtol"), [("A", 2e-6), ("B", 1e-4)])
def test_float32_keeps_its_digits_with_a_frozen_factor(held, rtol):
    """Rows of the momentum that became dependent would cost two more.

    Rounding is multiplied by condition numbers of M_B, squared in a Gram: measured 2e-7 and 2e-5,
    and 6e-5 and 1e-3 where the rows are not kept orthonormal.
    """
    method = rlora.op_lora()
    for seed in range(12):
        rng = np.random.default_rng(seed)
        start, *grads = (
            Factors(rng.normal(size=(3, 20)), rng.normal(size=(6, 3)))._asdict() for _ in range(6)
        )
        ends = []
        for dtype in ("float32", "float64"):
            pair = Factors(**{k: x.astype(dtype) for k, x in start.items()})
            state = method.init(pair)
            for g in grads:
                g = Factors(**{k: None if k == held else x.astype(dtype) for k, x in g.items()})
                pair, state = rlora.step(method, pair, g, state, 1e-2)
            ends.append(pair)
        for narrow, wide in zip(*ends, strict=True):
            assert_close(narrow, wide, rtol=rtol)


@pytest.mark.parametrize(("dtype", "rtol"), [("float64", 1e-9), ("float32", 2e-3)])
def test_a_momentum_of_a_lower_rank(dtype, rtol):
    """Gradients of rank 2 at rank 3, against the equations with pseudo-inverses in float64.

    What rounding leaves of the null space was multiplied by its inverse: moves 4 to 20 % off.
    Measured 3e-13 and 2e-4: float32 at condition numbers squared, as above.
    """
    for seed in range(6):
        rng = np.random.default_rng(seed)
        A, B = rng.normal(size=(3, 9)), rng.normal(size=(12, 3))
        M_A, M_B, pinv = A, 0 * B, np.linalg.pinv
        pair, method = Factors(A.astype(dtype), B.astype(dtype)), rlora.op_lora(momentum=0.9)
        start, state = B @ A, method.init(pair)
        for _ in range(6):
            G = rng.normal(size=(12, 2)) @ rng.normal(size=(2, 9))
            pair, state = rlora.step(method, pair, gradients(pair, G.astype(dtype)), state, 0.05)
            S_A = A @ A.T
            H = np.linalg.inv(B.T @ B + 1e-2 * np.linalg.inv(S_A))

            def tangent(D, A=A, B=B, S_A=S_A, H=H):
                D_B = np.linalg.solve(S_A, A @ D.T).T
                return H @ B.T @ D, D_B - B @ H @ B.T @ D_B

            (D_A, D_B), (E_A, E_B) = tangent(G), tangent(G + 0.9 * M_B @ M_A)
            T = 0.9 * M_B @ M_A + B @ D_A + D_B @ A
            M_A = M_A + pinv(M_B, rcond=1e-9) @ (T - M_B @ M_A)
            M_A = np.linalg.qr(M_A.T)[0].T
            M_B = T @ M_A.T
            moved = A - 0.05 * E_A
            A, B = moved, B - 0.05 * E_B @ A @ pinv(moved)
            assert_close(pair.B @ pair.A - start, B @ A - start, rtol=rtol)

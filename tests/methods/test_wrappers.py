"""Balanced LoRA and Stable-LoRA around other methods."""

import numpy as np
import oracles_dense as dense
import pytest

import rlora
from rlora import Factors
from rlora.backends import get
from rlora.core.moments import scale_by_adam
from rlora.testing import assert_close, make_problem, run

INNER = ["scaled_sgd", "scaled_adamw", "lora_rite", "alt_lora", "lora_muon", "loft", "graft_adamw"]


@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_balanced_equals_the_oracle(decay):
    """Each Gram has 1e-6 of its mean more here, which through conditions of a hundred and twenty steps
    of Adam makes 1e-3 of a factor, and of the product far less."""
    problem = make_problem(scaling=2.0, seed=3)
    method, params = rlora.balanced_lora(weight_decay=decay), problem.params
    state = method.init(params, 2.0)
    for A, B in dense.run(dense.Balanced(lr=0.02, weight_decay=decay), problem):
        params, state = rlora.step(method, params, problem.grads(params), state, 0.02)
        assert_close(params.A, A, rtol=1e-3, what="A")
        assert_close(params.B, B, rtol=1e-3, what="B")


@pytest.mark.parametrize("name", INNER)
def test_balancing_changes_the_split_alone(name, backend):
    """One step from the same pair; the two Grams are equal but for what is added to them."""
    method = getattr(rlora, name)()
    problem = make_problem(seed=5)
    uneven = Factors(30.0 * problem.params.A, problem.params.B / 30.0)
    problem = problem._replace(params=uneven).on(backend)
    plain, _ = run(method, problem, steps=1, lr=1e-3)
    even, _ = run(rlora.balanced_lora(method), problem, steps=1, lr=1e-3)
    A, B, plain_A, plain_B = (backend.to_numpy(x) for x in (*even, *plain))
    assert_close(B @ A, plain_B @ plain_A, rtol=1e-12)
    assert_close(B.T @ B, A @ A.T, rtol=1e-4)


@pytest.mark.parametrize("name", ["scaled_sgd", "lora_rite", "lora_muon"])
def test_what_no_split_can_change_is_not_changed_by_balancing(name):
    """Covariant methods, with moments that are carried along or none; r does not turn."""
    method = {
        "scaled_sgd": rlora.scaled_sgd(damping=0.0),
        "lora_rite": rlora.lora_rite(),
        "lora_muon": rlora.lora_muon(b1=0.0),
    }[name]
    problem = make_problem(seed=6)
    ends = [run(m, problem, steps=10, lr=0.02)[0] for m in (method, rlora.balanced_lora(method))]
    assert_close(*(x.B @ x.A for x in ends), rtol=1e-8)


def test_lost_directions_stay_what_they_are():
    """A zero B is left with its A; a B that lost a column has no infinite partner."""
    problem = make_problem(seed=4)
    method = rlora.balanced_lora()
    zeros = Factors(*(np.zeros_like(x) for x in problem.params))
    A, B = problem.params
    one_less = B * np.array([1.0, 0.0, *[1.0] * (B.shape[1] - 2)])
    for pair, exact in ((Factors(A, 0 * B), True), (Factors(A, one_less), False)):
        new, _ = rlora.step(method, pair, zeros, method.init(pair), 0.1)
        assert_close(new.B @ new.A, pair.B @ pair.A, rtol=1e-10, atol=1e-300)
        assert np.isfinite(new.A).all()
        if exact:
            assert_close(new.A, pair.A)


@pytest.mark.parametrize("zero", ["A", "B"])
@pytest.mark.parametrize("method", [rlora.balanced_lora(), rlora.lora_rite(balance=True)])
def test_the_partner_of_a_zero_factor_stays_where_sizes_are_not_known_either(
    backend, monkeypatch, method, zero
):
    """As in JAX and on a CUDA device, which are not asked whether numbers are of ordinary size."""
    monkeypatch.setattr(type(backend), "within", lambda *_: False)
    problem = make_problem(seed=4).on(backend, "float32")
    pair = problem.params._replace(**{zero: 0 * getattr(problem.params, zero)})
    still = Factors(*(0 * x for x in pair))
    new, _ = rlora.step(method, pair, still, method.init(pair), 0.1)
    for x, y in zip(new, pair, strict=True):
        assert_close(x, y)


@pytest.mark.parametrize("wrapper", [rlora.balanced_lora, rlora.stable_lora])
def test_wrappers_ask_for_methods_that_move_both_factors_at_once(wrapper):
    with pytest.raises(ValueError, match="jacobi"):
        wrapper(rlora.scaled_sgd(order="gauss_seidel"))


@pytest.mark.parametrize(
    "method",
    [rlora.balanced_lora(), rlora.stable_lora(shrink=0.3), rlora.lora_rite(balance=True)],
    ids=["balanced", "stable", "rite"],
)
def test_sixteen_bits_are_rounded_once(method):
    """The step of the same numbers in float32, and then the nearest of bfloat16, bit for bit."""
    torch = pytest.importorskip("torch")
    problem = make_problem(32, 24, 4, seed=1).on(get("torch"), "float32")
    narrow, grads = (
        Factors(*(x.bfloat16() for x in pair))
        for pair in (problem.params, problem.grads(problem.params))
    )
    wide, G = (Factors(*(x.float() for x in pair)) for pair in (narrow, grads))
    moved, _ = rlora.step(method, narrow, grads, method.init(narrow), 0.1)
    exact, _ = rlora.step(method, wide, G, method.init(wide), 0.1)
    for x, y in zip(moved, exact, strict=True):
        assert x.dtype == torch.bfloat16
        assert torch.equal(x, y.bfloat16())


def test_a_frozen_factor_is_not_balanced():
    problem = make_problem(seed=7)
    for frozen in "AB":
        grads = problem.grads(problem.params)._replace(**{frozen: None})
        for wrapper in (rlora.balanced_lora, rlora.stable_lora):
            method = wrapper()
            new, _ = rlora.step(method, problem.params, grads, method.init(problem.params), 0.1)
            plain = rlora.lora_plus(ratio=1.0)
            old, _ = rlora.step(plain, problem.params, grads, plain.init(problem.params), 0.1)
            for x, y in zip(new, old, strict=True):
                assert_close(x, y)


@pytest.mark.parametrize("name", INNER)
def test_a_shrinks_before_the_step_of_any_method(name):
    """As the authors' code: the gradients are those of the A before."""
    problem = make_problem(seed=8)
    pair = Factors(problem.params.A, problem.params.B / 1e3)
    grads = problem.grads(pair)
    method = getattr(rlora, name)()
    direction, _ = method.update(grads, method.init(pair), pair)
    new, _ = rlora.step(rlora.stable_lora(method, shrink=0.25), pair, grads, method.init(pair), 0.1)
    expected = method.apply(Factors(0.75 * pair.A, pair.B), direction, 0.1)
    for x, y in zip(new, expected, strict=True):
        assert_close(x, y)


def test_a_stops_to_shrink_where_b_has_caught_up():
    """``|A| / n`` against ``|B| / m``: on either side of the bound, in one step."""
    A, B = np.ones((2, 10)), np.ones((5, 2))
    moved = {}
    for size in (0.9, 1.1):  # |A|/n = sqrt(20)/10, |B|/m = size sqrt(10)/5 / sqrt(2)
        pair = Factors(A, size * B / 2**0.5)
        zero = Factors(0 * A, 0 * B)
        method = rlora.stable_lora(shrink=0.5)
        moved[size], _ = rlora.step(method, pair, zero, method.init(pair), 0.1)
    assert_close(moved[0.9].A, 0.5 * A)
    assert_close(moved[1.1].A, A)


def test_huge_factors_are_compared_by_their_sizes():
    for a, b, shrinks in ((1e30, 1e25, True), (1e25, 1e30, False)):
        pair = Factors(*(get("numpy").asarray(x) for x in (np.full((2, 5), a), np.full((5, 2), b))))
        method = rlora.stable_lora(shrink=0.5)
        zero = Factors(*(0 * x for x in pair))
        new, _ = rlora.step(method, pair, zero, method.init(pair), 0.1)
        assert_close(new.A, (0.5 if shrinks else 1.0) * pair.A)


def test_sizes_of_a_graft_are_no_roots_of_what_rounding_leaves():
    """r above both sides: the square of a direction's size may come out below zero."""
    rng = np.random.default_rng(0)
    shapes = (8, 3), (2, 8)
    pair, grads = (
        Factors(*(rng.normal(size=s).astype(np.float32) for s in shapes)) for _ in range(2)
    )
    method = rlora.graft_adamw()
    with np.errstate(invalid="raise"):
        direction, _ = method.update(grads, method.init(pair), pair)
    assert all(np.isfinite(x).all() for x in direction)


def test_a_small_shrink_is_lost_in_sixteen_bits():
    """Half the spacing of bfloat16 is from 2^-9 to 2^-8 of a number; the docstring says so."""
    torch = pytest.importorskip("torch")
    pair = make_problem(32, 24, 4, zero_B=True).on(get("torch"), "float32").params
    A, B = (x.bfloat16() for x in pair)
    still = Factors(torch.zeros_like(A), torch.zeros_like(B))
    for shrink, moved in ((1.9e-3, False), (4e-3, True)):
        method = rlora.stable_lora(shrink=shrink)
        new, _ = rlora.step(method, Factors(A, B), still, method.init(Factors(A, B)), 1e-2)
        assert torch.equal(new.A, A) == (not moved)


def test_a_graft_of_tiny_gradients_has_adams_size():
    """Adam's direction is far below 1 where eps is above the gradients."""
    rng = np.random.default_rng(0)
    pair, tiny = (
        Factors(*((size * rng.standard_normal(s)).astype("float32") for s in ((3, 7), (9, 3))))
        for size in (1.0, 1e-22)
    )
    method, adam = rlora.graft_adamw(), scale_by_adam()
    (grafted, _), _ = method.update(tiny, method.init(pair), pair)
    (plain, _), _ = adam.update(tiny, adam.init(pair), pair)
    moves = [np.linalg.norm(pair.B @ d) for d in (grafted, plain)]
    assert moves[0] == pytest.approx(moves[1], rel=1e-6, abs=0)  # some roundings of float32

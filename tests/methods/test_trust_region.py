"""Trust region: against products that are formed, and in other coordinates."""

import numpy as np
import pytest

import rlora
from rlora import Factors
from rlora.methods.trust_region import fraction
from rlora.testing import make_problem

M, N, R = 6, 5, 3


@pytest.fixture
def draw():
    rng = np.random.default_rng(0)
    return lambda: Factors(*(rng.normal(size=(2, *shape)) for shape in ((R, N), (M, R))))


def rms(x):
    return np.sqrt((x**2).mean((-2, -1), keepdims=True))


def stepped(method, pair, grads, lr):
    return rlora.step(method, pair, grads, method.init(pair), lr)[0]


def test_the_fraction_is_the_largest_for_which_the_products_stay_within_the_bound(draw):
    """Roots of t f + t² q = bound by halving, f and q of products of shape (m, n); float64, some
    hundred roundings."""
    (A, B), (a, b) = pair, step = draw(), draw()
    f, q = rms(B @ a + b @ A), rms(b @ a)
    for bound in (1e-3, 0.1, 1.0):
        low, high = np.zeros_like(f), np.ones_like(f)
        for _ in range(60):
            middle = (low + high) / 2
            fits = middle * f + middle**2 * q <= bound
            low, high = np.where(fits, middle, low), np.where(fits, high, middle)
        t = fraction(pair, step, bound)
        np.testing.assert_allclose(t, low, rtol=1e-12)
        assert (t < 1).all()
        assert (rms((B - t * b) @ (A - t * a) - B @ A) <= bound * (1 + 1e-12)).all()


def test_steps_within_the_bound_and_steps_of_nothing_are_taken_whole(draw):
    pair, step = draw(), draw()
    assert (fraction(pair, step, 1e3) == 1).all()
    zero = Factors(*(0 * x for x in pair))
    for some, moved in ((pair, zero), (zero, step), (zero, zero)):
        bound = 1e3 if moved is step else 1e-3
        assert (fraction(some, moved, bound) == 1).all()


def test_a_frozen_factor_counts_as_a_step_of_zero(draw):
    pair, step = draw(), draw()
    for side in "AB":
        zero = step._replace(**{side: 0 * getattr(step, side)})
        none = step._replace(**{side: None})
        np.testing.assert_array_equal(fraction(pair, none, 0.01), fraction(pair, zero, 0.01))
        grads = draw()._replace(**{side: None})
        found = stepped(rlora.trust_region(bound=1e-3), pair, grads, 0.1)
        assert getattr(found, side) is getattr(pair, side)
        np.testing.assert_allclose(rms(found.B @ found.A - pair.B @ pair.A), 1e-3, rtol=1e-9)


SIZES = [1e-30, 1e-9, 1.0, 1e9, 1e30]


@pytest.mark.parametrize("of_A", SIZES)
@pytest.mark.parametrize("of_b", [1e-20, 1.0, 1e20])
def test_nothing_overflows_and_nothing_is_lost_beside_what_is_larger(draw, of_A, of_b):
    """Float32 against float64, to some roundings of the Grams of 6 terms; 1e-38 counts as 0."""
    for of_B in SIZES:
        pair, step = draw(), draw()
        pair, step = Factors(pair.A * of_A, pair.B * of_B), step._replace(B=step.B * of_b)
        low = [Factors(*(x.astype("float32") for x in some)) for some in (pair, step)]
        for bound in (1e-6, 1.0, 1e6):
            t = fraction(*low, bound)
            assert t.dtype == np.float32
            np.testing.assert_allclose(t, fraction(pair, step, bound), rtol=1e-5, atol=1e-37)


@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_huge_factors_stay_finite(draw, decay):
    for size in (1e21, 1e30):
        pair = Factors(*((size * x).astype("float32") for x in draw()))
        grads = Factors(*(x.astype("float32") for x in draw()))
        for method in (
            rlora.trust_region(weight_decay=decay),
            rlora.trust_region(rlora.scaled_adamw(weight_decay=decay)),
        ):
            with np.errstate(over="ignore"):  # in the Grams of scaled AdamW, which leaves them out
                found = stepped(method, pair, grads, 0.1)
            assert all(np.isfinite(x).all() for x in found)


@pytest.mark.parametrize("name", ["scaled_sgd", "scaled_adamw", "lora_rite", "loft", "graft_adamw"])
def test_no_method_moves_the_product_further(name, backend):
    """Twenty steps at a rate of 1, each by the bound or less; the difference of two products of
    order 1 has lost three digits of float64, and more where they have grown."""
    method = rlora.trust_region(getattr(rlora, name)(), bound=1e-3)
    problem = make_problem(seed=5).on(backend)
    pair, state = problem.params, method.init(problem.params)
    for _ in range(20):
        old = [backend.to_numpy(x) for x in pair]
        pair, state = rlora.step(method, pair, problem.grads(pair), state, 1.0)
        A, B = (backend.to_numpy(x) for x in pair)
        assert rms(B @ A - old[1] @ old[0]) <= 1e-3 * (1 + 1e-9)


def test_a_method_that_moves_one_factor_after_the_other_is_refused():
    """Each half would have the whole bound."""
    with pytest.raises(ValueError, match="order='jacobi'"):
        rlora.trust_region(rlora.scaled_sgd(order="gauss_seidel"))


@pytest.mark.parametrize("wrapper", ["trust_region", "lora_plus", "stable_lora", "balanced_lora"])
@pytest.mark.parametrize("inner", ["adamw", rlora.scaled_adamw])
def test_an_inner_method_that_is_none_is_refused(wrapper, inner):
    with pytest.raises(TypeError, match=r"as rlora.scaled_adamw\(\) gives"):
        getattr(rlora, wrapper)(inner)


def test_rounding_of_a_step_without_a_second_order_leaves_a_number():
    """D_B D_A is 0, and the sum of products of its rounded Grams is below that for some draws."""
    rng = np.random.default_rng(0)
    for _ in range(50):
        row, column, w = (rng.normal(size=k).astype("float32") for k in (N, M, 2))
        step = Factors(
            np.stack([w[0] * row, -w[1] * row]), np.stack([w[1] * column, w[0] * column], 1)
        )
        assert np.isfinite(fraction(Factors(*(0 * x for x in step)), step, 1e-3)).all()


def test_each_layer_of_a_stack_has_a_fraction_and_a_rate_of_its_own(draw):
    pair, grads, lr = draw(), draw(), np.asarray([1e-6, 10.0])[:, None, None]
    inner = rlora.lora_plus(ratio=1.0)
    whole = stepped(inner, pair, grads, lr)
    found = stepped(rlora.trust_region(inner, bound=0.01), pair, grads, lr)
    for mine, theirs in zip(found, whole, strict=True):
        np.testing.assert_array_equal(mine[0], theirs[0])
        assert (mine[1] != theirs[1]).any()
    assert rms(found.B @ found.A - pair.B @ pair.A)[1] <= 0.01 * (1 + 1e-12)


def test_a_cut_step_is_the_same_in_other_coordinates(draw):
    """LoRA-RITE, whose products no split changes, with steps that are cut to a hundredth; rounding
    goes with the square of the condition of the turn, some tens."""
    pair, grads, bound = draw(), draw(), 0.01
    turn = np.random.default_rng(1).normal(size=(R, R))
    back = np.linalg.inv(turn)
    other = Factors(turn @ pair.A, pair.B @ back)
    moved = Factors(back.T @ grads.A, grads.B @ turn.T)
    method = rlora.trust_region(rlora.lora_rite(), bound=bound)
    one, two = stepped(method, pair, grads, 1.0), stepped(method, other, moved, 1.0)
    np.testing.assert_allclose(two.B @ two.A, one.B @ one.A, rtol=1e-9)
    assert (rms(one.B @ one.A - pair.B @ pair.A) > bound / 2).all()


def test_a_rate_far_too_high_is_no_cliff(draw):
    """At a rate of 10 scaled AdamW jumps about; within bounds it stays below 0.05."""
    start = draw()
    target = start.B @ start.A
    start = draw()

    def worst_of_later_steps(method):
        pair, state, losses = start, method.init(start), []
        for _ in range(60):
            error = pair.B @ pair.A - target
            losses.append(np.mean(error**2))
            grads = Factors(pair.B.mT @ error, error @ pair.A.mT)
            pair, state = rlora.step(method, pair, grads, state, 10.0)
        return max(losses[30:])

    inner = rlora.scaled_adamw(weight_decay=0.0)
    free = worst_of_later_steps(inner)
    cut = worst_of_later_steps(rlora.trust_region(inner, bound=0.1))
    assert cut < 0.1 < 10 < free  # 0.045 and 117

"""The trust region of the study: against products that are formed, and in other coordinates."""

import pytest
import torch

import rlora
from rlora import Factors
from rlora.cli.study.experiments import fraction, trust_region

M, N, R = 6, 5, 3


@pytest.fixture
def draw():
    generator = torch.Generator().manual_seed(0)

    def pair():
        return Factors(
            *(
                torch.randn(2, *shape, generator=generator, dtype=torch.float64)
                for shape in ((R, N), (M, R))
            )
        )

    return pair


def rms(x):
    return (x**2).mean((-2, -1), keepdim=True).sqrt()


def test_the_fraction_is_the_largest_for_which_the_products_stay_within_the_bound(draw):
    """Roots of t f + t² q = ρ by halving, f and q of products of shape (m, n)."""
    (A, B), (a, b) = pair, step = draw(), draw()
    f, q = rms(B @ a + b @ A), rms(b @ a)
    for bound in (1e-3, 0.1, 1.0):
        low, high = torch.zeros_like(f), torch.ones_like(f)
        for _ in range(60):
            middle = (low + high) / 2
            fits = middle * f + middle**2 * q <= bound
            low, high = torch.where(fits, middle, low), torch.where(fits, high, middle)
        t = fraction(pair, step, bound)
        torch.testing.assert_close(t, low)
        assert (t < 1).all()
        assert (rms((B - t * b) @ (A - t * a) - B @ A) <= bound).all()


def test_steps_within_the_bound_and_steps_of_nothing_are_taken_whole(draw):
    pair, step = draw(), draw()
    assert (fraction(pair, step, 1e3) == 1).all()
    nothing = Factors(*(0 * x for x in step))
    assert (fraction(pair, nothing, 1e-3) == 1).all()


def test_rounding_of_a_step_without_a_second_order_leaves_a_number():
    """D_B D_A is 0, and the sum of products of its rounded Grams is below that for some draws."""
    for seed in range(50):
        generator = torch.Generator().manual_seed(seed)
        row, column, w = (torch.randn(k, generator=generator) for k in (N, M, 2))
        step = Factors(
            torch.stack([w[0] * row, -w[1] * row]), torch.stack([w[1] * column, w[0] * column], 1)
        )
        assert fraction(Factors(*(0 * x for x in step)), step, 1e-3).isfinite().all()


def test_each_layer_of_a_stack_has_a_fraction_and_a_rate_of_its_own(draw):
    pair, grads, lr = draw(), draw(), torch.tensor([1e-6, 10.0], dtype=torch.float64)[:, None, None]
    plain, cut = rlora.lora_plus(ratio=1.0), trust_region(rlora.lora_plus(ratio=1.0), 0.01)
    whole, _ = rlora.step(plain, pair, grads, plain.init(pair), lr)
    found, _ = rlora.step(cut, pair, grads, cut.init(pair), lr)
    for mine, theirs in zip(found, whole, strict=True):
        torch.testing.assert_close(mine[0], theirs[0], rtol=0, atol=0)
        assert (mine[1] != theirs[1]).any()
    assert rms(found.B @ found.A - pair.B @ pair.A)[1] <= 0.01


def test_a_cut_step_is_the_same_in_other_coordinates(draw):
    """LoRA-RITE, whose products no split changes, with steps that are cut to a hundredth."""
    pair, grads, bound = draw(), draw(), 0.01
    turn = torch.randn(R, R, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    back = torch.linalg.inv(turn)
    other = Factors(turn @ pair.A, pair.B @ back)
    moved = Factors(back.T @ grads.A, grads.B @ turn.T)
    method = trust_region(rlora.lora_rite(), bound)
    one, _ = rlora.step(method, pair, grads, method.init(pair), 1.0)
    two, _ = rlora.step(method, other, moved, method.init(other), 1.0)
    torch.testing.assert_close(two.B @ two.A, one.B @ one.A)
    assert (rms(one.B @ one.A - pair.B @ pair.A) > bound / 2).all()


def test_bounds_by_name_are_those_of_each_layer(draw):
    """One layer free, the other held to its own bound: as if each were alone."""
    pairs, grads = ({name: draw() for name in ("free", "held")} for _ in range(2))
    bounds, inner = {"held": 0.01, "free": 1e6}, rlora.lora_plus(ratio=1.0)
    method = trust_region(inner, bounds)
    found, _ = rlora.step(method, pairs, grads, method.init(pairs), 1.0)
    for name, pair in pairs.items():
        alone = trust_region(inner, bounds[name])
        expected, _ = rlora.step(alone, pair, grads[name], alone.init(pair), 1.0)
        for mine, theirs in zip(found[name], expected, strict=True):
            torch.testing.assert_close(mine, theirs, rtol=0, atol=0)
    moved = {name: rms(found[name].B @ found[name].A - x.B @ x.A) for name, x in pairs.items()}
    assert (moved["held"] <= 0.01).all()
    assert (moved["free"] > 0.1).all()

"""Experiments of the study: a growing memory, and a larger step for a small B."""

import pytest
import torch

import rlora
from rlora import Factors
from rlora.cli.study.experiments import MOST, favour_b, scale_by_growing_adam
from rlora.cli.study.stacked_methods import SHARE, clipped


@pytest.fixture
def draw():
    generator = torch.Generator().manual_seed(0)

    def pair(scale=1.0):
        shapes = ((2, 3, 5), (2, 4, 3))  # two layers
        return Factors(*(scale * torch.randn(x, generator=generator).double() for x in shapes))

    return pair


def test_the_second_moment_is_the_weighted_mean_of_all_squares(draw):
    """By the weights of the recursion, written out: those of V sum to one from the first step."""
    b1, steps, params = 0.7, 6, draw()
    gradients = [draw() for _ in range(steps)]
    method = scale_by_growing_adam(b1)
    state = method.init(params)
    for t, G in enumerate(gradients, 1):
        direction, state = method.update(G, state, params)
        beta = [1 - k**-0.8 for k in range(1, t + 1)]
        weights = [(1 - beta[k]) * torch.tensor(beta[k + 1 :]).prod() for k in range(t)]
        assert float(sum(weights)) == pytest.approx(1.0, rel=1e-6)
        for side in (0, 1):
            seen = [x[side] for x in gradients[:t]]
            V = sum(w.double() * x**2 for w, x in zip(weights, seen, strict=True))
            M = sum((1 - b1) * b1 ** (t - 1 - k) * x for k, x in enumerate(seen))
            expected = M / (1 - b1**t) / (V.sqrt() + 1e-8)
            # Weights are rounded to float32 above.
            torch.testing.assert_close(direction[side], expected, rtol=1e-5, atol=1e-7)


def test_b_is_favoured_by_the_ratio_of_sizes_between_one_and_the_most(draw):
    inner = rlora.lora_plus(ratio=1.0)
    method, grads = favour_b(inner), draw()
    for scale, expected in ((0.0, MOST), (1e-3, MOST), (0.25, None), (50.0, 1.0)):
        A, B = draw()
        params = Factors(A, scale * B)
        plain, _ = inner.update(grads, inner.init(params), params)
        found, _ = method.update(grads, method.init(params), params)
        assert torch.equal(found.A, plain.A)
        for k in range(2):
            ratio = expected or float(
                A[k].square().mean().sqrt() / params.B[k].square().mean().sqrt()
            )
            assert 1 <= ratio <= MOST
            # Sizes are measured in float32.
            torch.testing.assert_close(found.B[k], ratio * plain.B[k], rtol=1e-6, atol=0)


def test_each_layer_is_clipped_by_its_own_size(draw):
    """One layer free, the other held to a share of its W0: as if each were alone."""
    pairs, grads = ({name: draw() for name in ("free", "held")} for _ in range(2))
    sizes = {"held": 1.0, "free": 1e8}  # of W0
    inner = rlora.lora_plus(ratio=1.0)
    method = clipped(lambda _: inner)(sizes)
    found, _ = rlora.step(method, pairs, grads, method.init(pairs), 1.0)
    for name, pair in pairs.items():
        alone = rlora.trust_region(inner, bound=SHARE * sizes[name])
        expected, _ = rlora.step(alone, pair, grads[name], alone.init(pair), 1.0)
        for mine, theirs in zip(found[name], expected, strict=True):
            torch.testing.assert_close(mine, theirs, rtol=0, atol=0)
    moved = {
        name: (found[name].B @ found[name].A - x.B @ x.A).square().mean((-2, -1)).sqrt()
        for name, x in pairs.items()
    }
    assert (moved["held"] <= SHARE * (1 + 1e-12)).all()  # float64 rounding
    assert (moved["free"] > 10 * SHARE).all()

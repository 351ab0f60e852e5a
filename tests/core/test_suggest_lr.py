"""The first learning rate: numbers by hand, what a step of it moves, and refusals."""

import numpy as np
import pytest

import rlora
from rlora import Factors


def test_numbers_by_hand():
    assert rlora.suggest_lr(0.02, rank=16, scaling=2.0) == pytest.approx(0.02 / (4 * 2 * 4))
    assert rlora.suggest_lr(1, rank=1) == 0.25


@pytest.mark.parametrize(
    ("m", "n", "rank", "scaling"), [(48, 64, 2, 1.0), (256, 64, 8, 0.5), (96, 384, 32, 4.0)]
)
def test_a_step_moves_the_weight_by_the_same_share_whatever_the_shape(m, n, rank, scaling):
    """Frobenius norm of s times the change of B A, over twice sigma (m n)^1/4.

    Each factor moves r directions by (m n)^1/4 if the entries of Adam's direction are +-1, as they
    are in a first step: an eighth for each, and sqrt(2) times that for both, which hardly overlap.
    Damping and the overlap take up to 5 % of that, and the product of both moves adds less.
    """
    rng, size = np.random.default_rng(0), 0.1
    pair = Factors(rng.normal(size=(rank, n)) / n**0.5, rng.normal(size=(m, rank)) / m**0.5)
    grads = Factors(rng.normal(size=(rank, n)), rng.normal(size=(m, rank)))
    lr = rlora.suggest_lr(size, rank=rank, scaling=scaling)
    method = rlora.scaled_adamw(weight_decay=0.0)
    moved, _ = rlora.step(method, pair, grads, method.init(pair, scaling), lr)
    change = scaling * np.linalg.norm(moved.B @ moved.A - pair.B @ pair.A)
    share = change / (2 * size * (m * n) ** 0.25)
    assert share == pytest.approx(2**0.5 / 8, rel=0.05)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"size": 0.0, "rank": 4}, ValueError, "size must be positive"),
        ({"size": float("nan"), "rank": 4}, ValueError, "size"),
        ({"size": "0.02", "rank": 4}, TypeError, "size"),
        ({"size": 0.02, "rank": 0}, ValueError, "rank"),
        ({"size": 0.02, "rank": 4.0}, TypeError, "rank"),
        ({"size": 0.02, "rank": 4, "scaling": 0.0}, ValueError, "scaling"),
    ],
)
def test_wrong_numbers_are_refused(arguments, error, message):
    with pytest.raises(error, match=message):
        rlora.suggest_lr(arguments.pop("size"), **arguments)

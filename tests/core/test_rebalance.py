"""Rebalanced factors: the same product, equal Grams, and less lost in rounding."""

import numpy as np
import pytest

import rlora
from rlora import Factors, rebalance
from rlora.core.rebalance import cosines
from rlora.testing import assert_close

SHAPES = [(5, 7, 3), (2, 9, 4), (9, 2, 4), (2, 2, 16), (6, 6, 1), (16, 24, 8)]
"""m, n and r: ranks below, equal to and above a side."""


def draw(m, n, r, rank=None, seed=0):
    """A pair whose product has the given rank, its directions of very different sizes."""
    rng = np.random.default_rng(seed)
    sizes = 10.0 ** rng.uniform(-2, 2, size=r)
    mix = rng.normal(size=(rank or r, r))
    B = rng.normal(size=(m, rank or r)) @ mix * sizes
    return Factors(rng.normal(size=(r, n)) / sizes[:, None], B)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype, rtol", [("float64", 1e-12), ("float32", 1e-4)])
def test_the_product_stays_and_the_grams_are_equal(backend, shape, dtype, rtol):
    """In float32 the sizes of 1e-2 to 1e2 leave three digits less than it has."""
    pair = draw(*shape)
    new = rebalance(Factors(*(backend.asarray(x, dtype) for x in pair)))
    A, B = (backend.to_numpy(x).astype("float64") for x in new)
    size = np.linalg.norm(pair.B @ pair.A)
    assert_close((B @ A) / size, (pair.B @ pair.A) / size, rtol=0, atol=rtol)
    assert_close(A @ A.T / size, B.T @ B / size, rtol=0, atol=10 * rtol)


@pytest.mark.parametrize("rank", [1, 2, 4, 8])
def test_no_direction_is_much_larger_than_the_mean(rank):
    """Entries of C are cosines times ``(2 / r)^½``: squared, between 0 and about twice their mean."""
    for r in (2, 3, 8, 64, 128):
        assert 1 <= abs(cosines(r)).max() * r**0.5 < 1.5
    A, B = rebalance(draw(64, 48, 8, rank=rank))
    for sizes in (np.sum(A**2, 1), np.sum(B**2, 0)):
        assert sizes.max() <= 2.2 * sizes.mean()


@pytest.mark.parametrize("rank", [1, 2, 4])
@pytest.mark.parametrize("r", [8, 16])
def test_rounding_follows_its_formula_and_loses_less(rank, r):
    """Independent errors: ``4^-p / 3`` times the sum, p = 8; twelve draws of thousands of entries."""
    ratios, gains = [], []
    for seed in range(12):
        U, s, Vt = np.linalg.svd(draw(64, 48, rank, seed=seed).B @ draw(64, 48, rank, seed=seed).A)
        root = np.pad(s[:rank] ** 0.5, (0, r - rank))
        split = Factors(root[:, None] * Vt[:r], U[:, :r] * root)  # singular vectors, shared equally
        even = rebalance(split)
        lost = [np.sum((_nearest(B) @ _nearest(A) - B @ A) ** 2) for A, B in (split, even)]
        terms = np.sum(np.sum(even.B**2, 0) * np.sum(even.A**2, 1))
        ratios.append(lost[1] / (terms * 2.0**-16 / 3))
        gains.append(lost[0] / lost[1])
    assert 0.7 < np.median(ratios) < 1.4
    assert np.median(gains) > r / rank / 2  # at most (sum of s)^2 / sum of s^2 <= rank is lost


def _nearest(x):
    digits, exponent = np.frexp(x)
    return np.ldexp(np.round(digits * 256) / 256, exponent)


def test_zero_and_values_that_are_not_finite_stay():
    pair = draw(5, 7, 3)
    bad = pair.A.copy()
    bad[1, 2] = np.nan
    for kept in (Factors(pair.A, 0 * pair.B), Factors(bad, pair.B), Factors(0 * pair.A, pair.B)):
        for new, old in zip(rebalance(kept), kept, strict=True):
            np.testing.assert_array_equal(new, old)
    stack = Factors(
        np.stack([pair.A, bad]), np.stack([pair.B, pair.B])
    )  # one does not touch others
    assert_close(rebalance(stack).A[0], rebalance(pair).A, rtol=1e-12)


@pytest.mark.parametrize("sizes", [(1e-18, 1e18), (1e18, 1e-18), (1e24, 1e24), (1e-24, 1e-24)])
def test_huge_and_tiny_factors(sizes):
    """Squares of these entries, and some of the products, leave the range of float32."""
    pair = Factors(
        *(np.asarray(x * s, np.float32) for x, s in zip(draw(5, 7, 3), sizes, strict=True))
    )
    new = rebalance(pair)
    expected, found = (x.B.astype("float64") @ x.A.astype("float64") for x in (pair, new))
    assert_close(found / sizes[0] / sizes[1], expected / sizes[0] / sizes[1], rtol=0, atol=1e-3)


def test_collections_and_refusals():
    pair = draw(5, 7, 3)
    tree = rebalance({"q": pair, "list": [pair, pair]})
    np.testing.assert_array_equal(tree["list"][1].A, tree["q"].A)
    with pytest.raises(rlora.ShapeError):
        rebalance(Factors(pair.A, pair.B.T))
    with pytest.raises(rlora.NamespaceError):
        rebalance(Factors(pair.A.astype(int), pair.B.astype(int)))

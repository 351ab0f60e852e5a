import numpy as np
import pytest

from rlora.cli.bench.stats import (
    median_interval,
    median_ratio,
    outliers,
    quotient_interval,
    relative_spread,
)


def test_ratio_is_of_equal_rounds_and_survives_a_machine_that_slows_down():
    plain = [1.0, 2.0, 4.0, 8.0, 16.0]
    assert median_ratio([3 * t for t in plain], plain) == 3.0
    assert median_ratio([3.0, 6.0], [1.0]) == 3.0  # an interrupted round
    assert median_ratio([3.0], []) is None


def test_spread_is_the_interquartile_range():
    assert relative_spread([1.0, 2.0, 3.0, 4.0, 5.0]) == pytest.approx(2 / 3)
    assert relative_spread([1.0, 1.0]) is None


def test_outliers_are_far_from_the_quartiles():
    assert outliers([1.0, 1.1, 1.2, 1.1, 1.0, 9.0]) == 1
    assert outliers([1.0, 1.0, 1.0]) == 0


def test_order_statistics_of_the_tables():
    """Ranks of the 95 % sign-test interval, as textbooks print them: 6 -> 1, 15 -> 4, 25 -> 8."""
    assert median_interval([1.0] * 5) is None
    for n, rank in ((6, 1), (9, 2), (15, 4), (25, 8), (100, 40)):
        assert median_interval(list(range(n, 0, -1))) == (rank, n + 1 - rank)
    assert median_interval([1.0] * 7, 0.99) is None
    for n, rank in ((8, 1), (15, 3), (25, 6), (100, 37)):
        assert median_interval(list(range(n)), 0.99) == (rank - 1, n - rank)


def test_the_interval_covers_as_often_as_it_says():
    rng = np.random.default_rng(0)
    draws = rng.lognormal(size=(2000, 21))
    low, high = np.array([median_interval(list(x)) for x in draws]).T
    assert 0.95 <= np.mean((low <= 1) & (high >= 1)) <= 0.985


def test_the_bootstrap_finds_a_quotient():
    rng = np.random.default_rng(1)
    old, new = (scale * rng.lognormal(sigma=0.1, size=60) for scale in (1.0, 1.5))
    low, high = quotient_interval(new, old)
    assert 1.3 < low < 1.5 < high < 1.7
    assert (low, high) == quotient_interval(new, old)
    assert quotient_interval([3.0] * 5, [2.0] * 5) == (1.5, 1.5)

"""Statistics of samples: medians, intervals without a bell curve, outliers."""

import math
import statistics
from collections.abc import Sequence
from typing import Final

import numpy as np

from rlora.cli.chart import Interval

FEWEST: Final = 3
"""Samples below which a spread says nothing."""

CONFIDENCE: Final = 0.95

RESAMPLES: Final = 2000
"""Resamples of a bootstrap; its error is then below the width of the intervals it draws."""


def relative_spread(samples: Sequence[float]) -> float | None:
    """Interquartile range over median; None for too few samples."""
    if len(samples) < FEWEST:
        return None
    low, middle, high = np.quantile(samples, (0.25, 0.5, 0.75))
    return float((high - low) / middle)


def outliers(samples: Sequence[float]) -> int:
    """Count what lies more than 1.5 interquartile ranges outside the quartiles (Tukey)."""
    low, high = np.quantile(samples, (0.25, 0.75))
    reach = 1.5 * (high - low)
    return int(np.sum((np.asarray(samples) < low - reach) | (np.asarray(samples) > high + reach)))


def round_ratios(samples: Sequence[float], baseline: Sequence[float]) -> list[float]:
    """Time against the baseline's in the same round.

    What slows a whole round down cancels out of it, unlike out of a ratio of two medians. A
    case that stopped early, or an interrupted round, lacks the later ones.
    """
    return [mine / theirs for mine, theirs in zip(samples, baseline, strict=False)]


def median_ratio(samples: Sequence[float], baseline: Sequence[float]) -> float | None:
    """Median of the ratios of the rounds; None without a round."""
    ratios = round_ratios(samples, baseline)
    return statistics.median(ratios) if ratios else None


def median_interval(samples: Sequence[float], confidence: float = CONFIDENCE) -> Interval | None:
    """Order statistics that enclose the median; None for too few: of 95 % below six samples.

    The number of samples below the median is binomial, whatever the distribution of times is.
    """
    n, cut, tail = len(samples), 0, 0.0
    while True:
        tail += math.comb(n, cut) / 2**n
        if 2 * tail > 1 - confidence:
            break
        cut += 1
    ordered = sorted(samples)
    return (ordered[cut - 1], ordered[n - cut]) if cut else None


def quotient_interval(new: Sequence[float], old: Sequence[float]) -> Interval:
    """Bootstrap interval (95 %) of median(new) / median(old)."""
    rng = np.random.default_rng(0)
    tops, bottoms = (
        np.median(rng.choice(np.asarray(x), (RESAMPLES, len(x))), axis=1) for x in (new, old)
    )
    low, high = np.quantile(tops / bottoms, ((1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2))
    return float(low), float(high)

"""Numbers that bring matrices to sizes whose squares and products stay in range.

A matrix of ordinary size is left as it is: its number is exactly 1.
"""

import math
from collections.abc import Sequence
from typing import Any

from rlora.core.backend import Backend
from rlora.core.dispatch import get_backend
from rlora.core.factors import Array, Factors, in_pairs


def ordinary(xp: Any, dtype: Any) -> tuple[float, float]:
    """The ends of the ordinary sizes, 2^-36 and 2^36 in float32.

    Squares of what lies between are far inside the range, which ends at 2^-126 and 2^128.
    """
    high = 2.0 ** (math.frexp(float(xp.finfo(dtype).max))[1] * 36 // 128)
    return 1 / high, high


def into_range(backend: Backend, X: Sequence[Array]) -> tuple[list[Array], list[Array] | None]:
    """Matrices with their largest entry of ordinary size, and the numbers that did it.

    Parameters
    ----------
    X : sequence of arrays
        Matrices (..., r, n) of one dtype; what is larger is divided down to the largest ordinary
        size, what is smaller multiplied up to the smallest.

    Returns
    -------
    X : list of arrays
        Entries that are not finite stay so.
    numbers : list of arrays of shape (..., 1, 1), or None
        None where all are known to be 1.
    """
    numbers = range_numbers(backend, X)
    if numbers is None:
        return list(X), None
    pieces = backend.unstack(numbers, X)
    return [c * x for c, x in zip(pieces, X, strict=True)], pieces


def range_numbers(backend: Backend, X: Sequence[Array]) -> Array | None:
    """The numbers of `into_range`, (K, 1, 1): exactly 1 for an ordinary size, beside any other."""
    xp = backend.xp
    low, high = ordinary(xp, X[0].dtype)
    if backend.within(X, low, high):
        return None
    peak = backend.peaks(X)
    info = xp.finfo(peak.dtype)
    tiny, most = float(info.smallest_normal), float(info.max)  # instead of zero and infinity
    return xp.clip(peak, min=low, max=high) / xp.clip(peak, min=tiny, max=most)


def moderate(
    backend: Backend, pairs: Sequence[Factors]
) -> tuple[list[Factors], list[Factors] | None]:
    """The pairs, huge factors divided down to the largest ordinary size, and the divisors.

    Each has its own, (..., 1, 1), at least 1; None where all are known to be 1.
    """
    flat, xp = [x for pair in pairs for x in pair], backend.xp
    low, high = ordinary(xp, flat[0].dtype)
    if backend.within(flat, 0.0, high):
        return list(pairs), None
    peak = backend.peaks(flat)
    most = float(xp.finfo(peak.dtype).max)  # instead of infinity
    numbers = backend.unstack(xp.clip(low * peak, min=1.0, max=low * most), flat)
    return in_pairs([x / c for c, x in zip(numbers, flat, strict=True)]), in_pairs(numbers)


def swapped(numbers: Sequence[Factors], X: Sequence[Factors]) -> list[Factors]:
    """Gradients or directions, each divided by the number of the partner."""
    return [Factors(x.A / c.B, x.B / c.A) for c, x in zip(numbers, X, strict=True)]


def euclidean_norm(xp: Any, leaves: list[Array]) -> Array:
    """Norm of all arrays together; squares overflow before entries do: the largest goes first."""
    peak = xp.max(xp.stack([xp.max(xp.abs(x)) for x in leaves]))
    peak = xp.where(peak > 0, peak, xp.ones_like(peak))
    return peak * xp.sqrt(xp.sum(xp.stack([xp.sum((x / peak) ** 2) for x in leaves])))


def shrink_to(xp: Any, bound: float, norm: Array) -> Array:
    """The number that brings a norm down to a bound: at most 1, and NaN stays visible."""
    over = norm > bound
    return xp.where(over, bound / xp.where(over, norm, xp.ones_like(norm)), 0 * norm + 1)


def times(factor: Array, g: Array) -> Array:
    """A gradient times one number for a whole model, whose dtype has no say in the result's."""
    return g * get_backend(g).cast(factor, g.dtype)

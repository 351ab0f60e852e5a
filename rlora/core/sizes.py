"""Powers of two that bring matrices to sizes whose squares and products stay in range.

A product with a power of two is exact, and with ordinary sizes it is 1 that they are.
"""

import math
from collections.abc import Sequence
from typing import Any

from rlora.core.backend import Backend
from rlora.core.factors import Array, Factors


def large(xp: Any, dtype: Any) -> int:
    """The exponent of the largest ordinary size, 36 in float32: its square is far inside the range.

    ``2^-large`` is the smallest.
    """
    return int(math.log2(float(xp.finfo(dtype).max))) * 36 // 128


def powers_of_two(
    backend: Backend, X: Sequence[Array], *, huge_only: bool = False
) -> list[Array] | None:
    """What brings the largest entry of each matrix to [1, 2), where it is of no ordinary size.

    Parameters
    ----------
    X : sequence of arrays
        Matrices (..., r, n) of one dtype.
    huge_only : bool
        Leave tiny ones as they are, and bring huge ones down to ``2^large``, no further.

    Returns
    -------
    list of arrays of shape (..., 1, 1), or None
        1 for a matrix of ordinary size and for one that is zero or not finite, so that NaN stays
        visible; None where all are known to be 1.
    """
    xp, info = backend.xp, backend.xp.finfo(X[0].dtype)
    least, limit = float(info.smallest_normal), large(xp, X[0].dtype)
    low, high = 0.0 if huge_only else 2.0**-limit, 2.0 ** (limit + 1)
    if backend.within(X, low, high):
        return None
    peaks = [xp.reshape(xp.max(xp.abs(x), axis=(-2, -1)), (-1, 1, 1)) for x in X]
    peak = xp.concat(peaks)  # (K, 1, 1)
    odd = xp.isfinite(peak) & (peak >= least) & ((peak < low) | (peak >= high))
    exponent = xp.floor(xp.log2(xp.where(odd, peak, xp.ones_like(peak))))
    if huge_only:
        exponent = xp.clip(exponent - limit, min=0.0)
    # The inverse of the largest power of two is below the normal numbers.
    exponent = xp.clip(exponent, max=-math.log2(least))
    return list(backend.unstack(2.0**-exponent, X))


def times(powers: Sequence[Array] | None, X: Sequence[Array]) -> list[Array]:
    """Each matrix times its power; None is 1."""
    return list(X) if powers is None else [c * x for c, x in zip(powers, X, strict=True)]


def moderate(
    backend: Backend, pairs: Sequence[Factors]
) -> tuple[list[Factors], list[Factors] | None]:
    """The pairs, huge factors brought down, and the powers that did it; None where all were 1."""
    flat = [x for pair in pairs for x in pair]
    powers = powers_of_two(backend, flat, huge_only=True)
    if powers is None:
        return list(pairs), None
    return in_pairs(times(powers, flat)), in_pairs(powers)


def in_pairs(flat: Sequence[Array]) -> list[Factors]:
    """A, B, A, B, ... as pairs."""
    return [Factors(*flat[i : i + 2]) for i in range(0, len(flat), 2)]


def swapped(powers: Sequence[Factors], X: Sequence[Factors]) -> list[Factors]:
    """Gradients or directions, each times the power of the partner."""
    return [Factors(c.B * x.A, c.A * x.B) for c, x in zip(powers, X, strict=True)]


def euclidean_norm(xp: Any, leaves: list[Array]) -> Array:
    """Norm of all arrays together; squares overflow before entries do: the largest goes first."""
    peak = _fold(xp.maximum, [xp.max(xp.abs(x)) for x in leaves])
    peak = xp.where(peak > 0, peak, xp.ones_like(peak))
    return peak * xp.sqrt(_fold(lambda x, y: x + y, [xp.sum((x / peak) ** 2) for x in leaves]))


def shrink_to(xp: Any, bound: float, norm: Array) -> Array:
    """What brings a norm down to a bound: at most 1, and NaN stays visible."""
    over = norm > bound
    return xp.where(over, bound / xp.where(over, norm, xp.ones_like(norm)), 0 * norm + 1)


def _fold(f: Any, xs: list[Array]) -> Array:
    total = xs[0]
    for x in xs[1:]:
        total = f(total, x)
    return total

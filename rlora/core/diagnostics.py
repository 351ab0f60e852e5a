"""The effect of a step on a pair, in a few numbers, from r x r matrices alone.

A figure of the Gram ``A Aᵀ`` carries A's letter although it preconditions B, and the other way
round: the question it answers is what is wrong with A.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

from rlora.core.algebra import ROUNDING, eye_like
from rlora.core.backend import Backend
from rlora.core.factors import Array, Factors
from rlora.core.rank_group import RankGroup, Stack


class Damping(NamedTuple):
    """The shift that a step adds to Grams before it inverts them, and its dtype.

    Parameters
    ----------
    relative, absolute, covariant : array of shape (2K,)
        The damping in the place of its mode; the other two are 0.
    least : array of shape (2K,)
        The least relative damping of the placement.
    eps, smallest, largest : array of shape (2K,)
        The distance from 1 to the next number of that dtype, and its range.
    """

    relative: Array
    absolute: Array
    covariant: Array
    least: Array
    eps: Array
    smallest: Array
    largest: Array


class GramFigures(NamedTuple):
    """Figures of Gram matrices, each of shape (2K,).

    Parameters
    ----------
    cond : array
        The condition number of the Gram; inf where an eigenvalue is lost in rounding, NaN for 0.
    damped_cond : array
        The same of what is inverted; NaN where nothing is.
    anisotropy : array
        How far the inverse P is from a multiple of the identity, ``|P - tr(P)/r I| / |P|`` in the
        Frobenius norm: 0 for a multiple of the identity, and never 1.
    skipped : array
        1 where the Gram is too small or too large for the step's dtype: the partner is not updated.
    nan : array
        1 where the Gram has a NaN.
    damped : array
        1 where damping has more than doubled the smallest eigenvalue.
    """

    cond: Array
    damped_cond: Array
    anisotropy: Array
    skipped: Array
    nan: Array
    damped: Array


def gram_figures(backend: Backend, S: Stack, damping: Damping) -> GramFigures:
    """Figures of the Grams of K pairs, and of what a step of theirs inverts.

    Parameters
    ----------
    backend : Backend
        The backend of the arrays.
    S : array of shape (2K, r, r)
        ``A Aᵀ`` of every pair, then ``Bᵀ B``; in float64 condition numbers are right up to 1e12.
    damping : Damping
        The damping of each, from the group of the partner, which it preconditions.
    """
    xp, half = backend.xp, S.shape[0] // 2
    nothing, nan = xp.zeros_like(damping.eps), xp.isnan(xp.linalg.trace(S))
    shift, live = _shift(backend, S, damping._replace(relative=nothing, absolute=nothing))
    inverse = backend.damped_power(S + _small(shift) * eye_like(xp, S), -1.0)
    inverse = xp.where(_small(live | nan), inverse, xp.zeros_like(S))
    inverse = xp.concat([inverse[half:, ...], inverse[:half, ...]])  # of the partner
    covariant = _small(damping.covariant)
    H = xp.where(covariant > 0, S + covariant * inverse, S)
    shift, live = _shift(backend, H, damping)
    w, _ = backend.eigh(xp.concat([S, H]))  # (4K, r), ascending
    # Eigenvalues that rounding has made negative are set to zero.
    w, h = w[: 2 * half, :], xp.clip(w[2 * half :, :], min=0.0) + xp.expand_dims(shift, axis=-1)
    h = xp.where(live[:, None], h, xp.ones_like(h))
    unknown = xp.full_like(shift, float("nan"))
    return GramFigures(
        _condition(backend, w),
        xp.where(live, h[:, -1] / h[:, 0], unknown),
        xp.where(live, _anisotropy(backend, h), unknown),
        xp.astype(~live & ~nan, S.dtype),
        xp.astype(nan, S.dtype),
        xp.astype(live & (h[:, 0] > 2 * w[:, 0]), S.dtype),
    )


def step_norms(group: RankGroup, old: Sequence[Factors]) -> Array:
    """Norms of the changes since `old`, and of the old values, as (6, K).

    ``|B A - B0 A0|, |A - A0|, |B - B0|`` and ``|B0 A0|, |A0|, |B0|`` in the Frobenius norm. The
    change of the product is ``dB A + B0 dA``: its norm needs nothing larger than r x r, and a small
    change is not the difference of two large numbers.
    """
    backend, dtype = group.backend, group.dtype
    new, old = ([_cast(backend, pair, dtype) for pair in pairs] for pairs in (group.params, old))
    move = [Factors(x.A - x0.A, x.B - x0.B) for x, x0 in zip(new, old, strict=True)]
    D_A, D_B = group.halves(group.gram(move))
    S_A, S_B = group.halves(group.gram(old))
    cross = group.cross(
        [Factors(x.A, D.B) for x, D in zip(new, move, strict=True)],
        [Factors(D.A, x0.B) for x0, D in zip(old, move, strict=True)],
    )
    C_A, C_B = group.halves(cross)  # A dAᵀ and dBᵀ B0
    new_A = backend.gram_rows([x.A for x in new], dtype)
    change = _root(backend, D_B * new_A + 2 * C_A * C_B + S_B * D_A)
    sizes = [backend.xp.sqrt(backend.xp.linalg.trace(S)) for S in (D_A, D_B, S_A, S_B)]
    return backend.xp.stack([change, *sizes[:2], _root(backend, S_A * S_B), *sizes[2:]])


def _cast(backend: Backend, pair: Factors, dtype: Any) -> Factors:
    return Factors(backend.cast(pair.A, dtype), backend.cast(pair.B, dtype))


def _root(backend: Backend, S: Array) -> Array:
    """The root of the sum of the entries of (K, r, r), which rounding may have left below 0."""
    return backend.xp.sqrt(backend.xp.clip(backend.xp.sum(S, axis=(-2, -1)), min=0.0))


def _shift(backend: Backend, S: Stack, damping: Damping) -> tuple[Array, Array]:
    """The shift of `Backend.damped_power` in the step's dtype, and whether it inverts at all."""
    xp, r = backend.xp, S.shape[-1]
    rounding = ROUNDING * r * damping.eps
    mean = xp.linalg.trace(S) / r
    floor = xp.maximum(rounding, damping.least)
    shift = xp.maximum(damping.relative * mean + damping.absolute, floor * mean)
    scale = mean + shift
    return shift, (scale > damping.smallest / rounding) & (scale < damping.largest)


def _small(x: Array) -> Array:
    """(2K,) as (2K, 1, 1)."""
    return x[:, None, None]


def _condition(backend: Backend, w: Array) -> Array:
    """Condition numbers, from ascending eigenvalues (2K, r)."""
    xp, (low, top) = backend.xp, (w[:, 0], w[:, -1])
    lost = low <= ROUNDING * w.shape[-1] * float(xp.finfo(w.dtype).eps) * top
    ratio = xp.where(lost, xp.full_like(top, float("inf")), top / xp.where(lost, 1 + 0 * low, low))
    return xp.where(top > 0, ratio, xp.full_like(top, float("nan")))


def _anisotropy(backend: Backend, h: Array) -> Array:
    """Anisotropy of the inverses of definite matrices, from ascending eigenvalues (2K, r)."""
    xp = backend.xp
    p = h[:, :1] / h
    spread = p - xp.mean(p, axis=-1, keepdims=True)
    return xp.sqrt(xp.sum(spread * spread, axis=-1) / xp.sum(p * p, axis=-1))

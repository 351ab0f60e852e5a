"""Algebra on Grams: changes of coordinates, tangent directions, means, equations.

``S_A = A Aᵀ`` and ``S_B = Bᵀ B``.
"""

import math
from collections.abc import Sequence

from rlora.core.algebra import ROUNDING, traces
from rlora.core.backend import Backend
from rlora.core.factors import Array, Factors
from rlora.core.rank_group import RankGroup, Stack
from rlora.core.transform import State


def to_new_coordinates(group: RankGroup, S: Stack, overlap: Sequence[Factors]) -> Stack:
    """``S⁻¹ overlap``, which takes moments from coordinates of old factors to those of new ones.

    0 in directions of S that are lost in rounding: damped, their inverse would multiply what the
    rounding of parameters has put there since the overlap was recorded.

    Parameters
    ----------
    group : RankGroup
        The pairs.
    S : Stack
        The Grams of the partners.
    overlap : sequence of Factors
        See `record_overlap`.
    """
    matmul, W = group.backend.matmul, group.backend.pseudo_half(S, group.lost)
    return matmul(W.mT, matmul(W, group.stack(overlap)))


def record_overlap(group: RankGroup, old: Sequence[Factors], state: State) -> State:
    """A transport that stores, for each factor, its partner's new rows times its old ones.

    With it the next step finds the old coordinates again: S⁻¹ overlap takes them to the new ones. A
    factor that has not been updated is still in older ones, from which its overlap leads to `old`.
    """
    overlap = group.partner_cross(group.params, old)
    if not group.all_move:
        to_old = to_new_coordinates(group, group.partner_gram(old), state.overlap)
        further = group.backend.matmul(overlap, to_old)
        updated = group.constant([(float(a), float(b)) for a, b in group.moving])
        overlap = group.xp.where(updated == 1, overlap, further)
    return state._replace(overlap=group.unstack(overlap))


def no_overlap(group: RankGroup, T: Stack) -> list[Factors]:
    """NaN in place of overlaps: who moves parameters without a `transport` shall see it at once.

    Views of one number: a transport puts arrays of their own there, nothing else writes to them.
    """
    nan = group.backend.constants([math.nan], T.dtype, T)
    return group.unstack(group.xp.broadcast_to(nan, T.shape))


def tangent(
    group: RankGroup,
    P: Stack,
    G: Sequence[Factors],
    X: Array | None = None,
    *,
    cross: Stack | None = None,
    scale: Stack | float = 1.0,
    both: Array | float | None = None,
) -> list[Factors]:
    """The pair of directions whose effect on the product comes nearest to a full gradient G.

    ``D_A = S_B⁻¹ G_A + X A`` and ``D_B = (I - B S_B⁻¹ Bᵀ) G_B S_A⁻¹ - B X``, so that
    ``B D_A + D_B A`` is the projection of G on the tangent space of the rank-r matrices whatever
    the gauge X. Where the partner is frozen, the nearest direction of one factor alone.

    Parameters
    ----------
    group : RankGroup
        The pairs.
    P : Stack
        Inverse metrics: S_B⁻¹ for A and S_A⁻¹ for B.
    G : sequence of Factors
        ``Bᵀ G`` and ``G Aᵀ``.
    X : array of shape (K, r, r), optional
        The gauge; 0 by default.
    cross : Stack, optional
        ``A G_Aᵀ`` and ``Bᵀ G_B``, where they are known.
    scale : Stack or float
        Numbers that multiply the directions.
    both : array or float, optional
        1 for pairs of which both factors move, else 0; `RankGroup.both_move` by default.
    """
    matmul = group.backend.matmul
    P_A, P_B = group.halves(P)
    _, C = group.halves(group.cross(group.params, G) if cross is None else cross)  # Bᵀ G_B
    both = group.both_move() if both is None else both
    Y = matmul(matmul(P_A, C), P_B)  # (K, r, r), what both factors would do twice
    X = group.xp.zeros_like(Y) if X is None else X
    shares = scale * group.xp.concat([both * X, -both * (X + Y).mT])
    return group.apply(scale * P, G, accumulate=group.apply(shares, group.params))


def add(X: Sequence[Factors], Y: Sequence[Factors]) -> list[Factors]:
    """The sums, pair by pair."""
    return [Factors(x.A + y.A, x.B + y.B) for x, y in zip(X, Y, strict=True)]


def scale(c: Array | float, X: Sequence[Factors]) -> list[Factors]:
    """``c X``, pair by pair, with one number for all."""
    return [Factors(c * x.A, c * x.B) for x in X]


def one_more(counts: Sequence[Factors]) -> list[Factors]:
    """Step counts after a step, pair by pair."""
    return [Factors(t.A + 1, t.B + 1) for t in counts]


def symmetric(S: Array) -> Array:
    """The symmetric part, which rounding has left."""
    return 0.5 * (S + S.mT)


def congruence(backend: Backend, W: Array, S: Array) -> Array:
    """``W S Wᵀ``, as symmetric as rounding leaves it."""
    return backend.matmul(backend.matmul(W, S), W.mT)


def geometric_mean(backend: Backend, M: Array, S: Array) -> Array:
    """``M⁻¹ # S`` of positive definite matrices, ``Wᵀ (L S Lᵀ)^½ W`` for ``Wᵀ W = M⁻¹``, L = W M.

    So for every such W: that of a Cholesky factorisation leaves one square root to be taken.
    """
    xp = backend.xp
    m, s = traces(xp, M), traces(xp, S)
    m, s = (xp.where(x > 0, x, xp.ones_like(x)) for x in (m, s))
    M, S = M / m, S / s  # what is below has their product
    W = backend.damped_half(M)
    root = backend.damped_power(congruence(backend, backend.matmul(W, M), S), 0.5)
    return congruence(backend, W.mT, root) * (s**0.5 / m**0.5)


def sylvester_spd(backend: Backend, P: Array, Q: Array, C: Array) -> Array:
    """The X of ``P X + X Q = C`` for positive semidefinite P and Q, in their eigenbases."""
    xp, matmul = backend.xp, backend.matmul
    (p, U), (q, V) = backend.eigh(P), backend.eigh(Q)
    sums = xp.expand_dims(p, axis=-1) + xp.expand_dims(q, axis=-2)  # (K, r, r)
    live = ~(
        sums <= ROUNDING * float(xp.finfo(C.dtype).eps) * xp.max(sums, axis=(-2, -1), keepdims=True)
    )
    rotated = matmul(matmul(U.mT, C), V)
    rotated = xp.where(live, rotated / xp.where(live, sums, xp.ones_like(sums)), 0 * sums)
    return matmul(matmul(U, rotated), V.mT)

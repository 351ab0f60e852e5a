"""The r x r algebra: damped Gram matrices, their powers, and what is made of them.

``S_A = A Aᵀ`` and ``S_B = Bᵀ B``. The metric of A is made of S_B and the other way round.
"""

import math
from collections.abc import Sequence
from functools import partial
from math import prod
from typing import Any, Literal

from rlora.core.algebra import ROUNDING, traces
from rlora.core.backend import Backend
from rlora.core.checks import ComputeDtype, check_choice, check_nonnegative, is_zero
from rlora.core.factors import Array, Factors, indices_by_rank
from rlora.core.rank_group import RankGroup, Stack
from rlora.core.transform import State

DampingMode = Literal["relative", "absolute", "covariant"]
Side = Literal["A", "B"]


def check_damping(damping: Any, damping_mode: Any, compute_dtype: Any = None) -> None:
    """ValueError or TypeError unless they make sense."""
    check_nonnegative("damping", damping)
    check_choice("damping_mode", damping_mode, DampingMode)
    check_choice("compute_dtype", compute_dtype, ComputeDtype)


def frozen_powers(
    backend: Backend,
    params: Sequence[Factors],
    frozen: Side,
    *,
    damping: float,
    damping_mode: DampingMode,
    exponent: float = -1.0,
    compute_dtype: str | None = None,
) -> list[Array]:
    """``S^exponent`` of the factor that stays in every pair; S⁻¹ preconditions its partner.

    As `preconditioners`, with one Gram where that has two. The Gram of a frozen factor is no worse
    than its start: covariant damping leaves it as it is, whichever factor it is.
    """
    gram, side = (backend.gram_rows, -1) if frozen == "A" else (backend.gram_columns, -2)
    factors = [getattr(pair, frozen) for pair in params]
    powers = list(factors)
    for members in indices_by_rank(params):
        alike = [factors[i] for i in members]
        S = gram(alike, backend.compute_dtype(alike[0].dtype, compute_dtype))
        shift = 0.0 if damping_mode == "covariant" else damping
        empty = [S.shape[-1] - F.shape[side] for F in alike for _ in range(prod(F.shape[:-2]))]
        lost = backend.constants(empty, S.dtype, S) if max(empty) > 0 else None
        P = backend.damped_power(S, exponent, shift, relative=damping_mode == "relative", lost=lost)
        P = backend.cast(P, backend.compute_dtype(alike[0].dtype))
        for i, power in zip(members, backend.unstack(P, alike), strict=True):
            powers[i] = power
    return powers


def inverse_metric(
    group: RankGroup,
    S: Stack,
    damping: float = 0.0,
    damping_mode: DampingMode = "relative",
    least: float = 0.0,
    sizes: Sequence[tuple[int, int]] | None = None,
) -> Stack:
    """``H⁻¹``, where the H of a factor is the damped Gram of its partner.

    `S` are the Grams of the partners. A factor whose partner is zero gets 0, with absolute damping
    the inverse of that, and an A with covariant damping ``S_A / δ``. The shift is at least `least`
    times the mean eigenvalue, in every mode. Covariant damping is 0 for an A whose B is fixed.
    Where a rank is above a side, directions in which the partner can have nothing are left out.
    Covariant damping acts in the others; in those of them in which A itself can have nothing it is
    without bound. `sizes` are the m and n of whole factors, where those of the group are pieces.
    """
    backend, xp = group.backend, group.xp
    if sizes is None:
        sizes = [(pair.B.shape[-2], pair.A.shape[-1]) for pair in group.params]
    empty = [(group.rank - m, group.rank - n) for m, n in sizes]
    lost = group.constant(empty) if max(map(max, empty)) > 0 else None
    power = partial(backend.damped_power, exponent=-1.0, least=least)
    if damping_mode != "covariant":
        return power(S, damping=damping, relative=damping_mode == "relative", lost=lost)
    S_B, S_A = _covariant_grams(group, S)
    if lost is None:
        return power(xp.concat([S_B + damping * power(S_A), S_A]))
    lost_B, lost_A = group.halves(lost)
    # Of trace r, as products of Grams leave the range long before the Grams. An overflown A gives
    # no damping.
    known = xp.where(xp.isinf(traces(xp, S_A)), xp.zeros_like(S_A), S_A)
    (sized_A, unit_A, _), (sized_B, unit_B, _) = (backend.of_trace_r(x, 0.0) for x in (known, S_B))
    seen = congruence(backend, backend.row_space(S_B, lost_B), sized_A)
    if is_zero(damping) or max(of_A for _, of_A in empty) <= 0:
        shift = damping * (power(seen, lost=lost_B) / unit_A)
        return power(xp.concat([S_B + shift, S_A]), lost=lost)
    # S_A has no inverse: with K² = S_A, H⁻¹ is K (K S_B K + δ I)⁻¹ K.
    K = backend.damped_power(seen, 0.5, lost=xp.maximum(lost_A, lost_B))
    H = congruence(backend, K, sized_B)
    P_A = congruence(backend, K, power(H, damping=damping / unit_A / unit_B, relative=False))
    # A zero A gives no damping; of an overflown B nothing is known.
    undamped = (traces(xp, K) == 0) | xp.isinf(traces(xp, S_B))
    P_A = xp.where(undamped, power(S_B, lost=lost_B), P_A / unit_B)
    return xp.concat([P_A, power(S_A, lost=lost_A)])


def _covariant_grams(group: RankGroup, S: Stack) -> tuple[Array, Array]:
    """The halves of S; where B is fixed, S_A is 0, which damps nothing.

    Covariant damping holds A back until B has grown, which such a B never does.
    """
    S_B, S_A = group.halves(S)
    if group.fixed_B is None or not any(group.fixed_B):
        return S_B, S_A
    fixed, _ = group.halves(group.constant([(float(x), 0.0) for x in group.fixed_B]))
    return S_B, group.xp.where(fixed != 0, group.xp.zeros_like(S_A), S_A)


def metric_half(
    group: RankGroup, S: Stack, damping: float, damping_mode: DampingMode, least: float
) -> Stack:
    """Triangular P with ``Pᵀ P = H⁻¹``, H as in `inverse_metric`: upper for A, lower for B.

    After a lower triangular change of basis T with a positive diagonal, ``A <- T A`` and ``B <- B
    T⁻¹``, the halves of B are ``P T⁻¹`` and, under covariant damping, those of A ``P Tᵀ``: what P
    makes of a gradient is the same in both bases.
    """
    half = partial(group.backend.damped_half, least=least)
    if damping_mode == "covariant":
        S_B, S_A = _covariant_grams(group, S)
        P_B = half(S_A)
        P_A = half(group.backend.plus_product(S_B, damping, P_B.mT, P_B), upper=True)
    else:
        relative = damping_mode == "relative"
        S_B, S_A = group.halves(S)
        P_B = half(S_A, damping, relative=relative)
        P_A = half(S_B, damping, relative=relative, upper=True)
    return group.xp.concat([P_A, P_B])


def to_new_coordinates(group: RankGroup, S: Stack, turn: Sequence[Factors]) -> Stack:
    """``S⁻¹ turn``, which takes moments from the coordinates of old factors to those of new ones.

    0 in directions of S that are lost in rounding: damped, their inverse would multiply what the
    rounding of parameters has put there since the turn was recorded.

    Parameters
    ----------
    group : RankGroup
        The pairs.
    S : Stack
        The Grams of the partners.
    turn : sequence of Factors
        See `record_turn`.
    """
    matmul, W = group.backend.matmul, group.backend.pseudo_half(S, group.lost)
    return matmul(W.mT, matmul(W, group.stack(turn)))


def record_turn(group: RankGroup, old: Sequence[Factors], state: State) -> State:
    """A transport that stores, for each factor, its partner's new rows times its old ones.

    With it the next step finds the old coordinates again: S⁻¹ turn takes them to the new ones. A
    factor that has not been updated is still in older ones, from which its turn leads to `old`.
    """
    turn = group.partner_cross(group.params, old)
    if not group.all_move:
        to_old = to_new_coordinates(group, group.partner_gram(old), state.turn)
        further = group.backend.matmul(turn, to_old)
        updated = group.constant([(float(a), float(b)) for a, b in group.moving])
        turn = group.xp.where(updated == 1, turn, further)
    return state._replace(turn=group.unstack(turn))


def no_turn(group: RankGroup, T: Stack) -> list[Factors]:
    """NaN in place of turns: who moves parameters without a `transport` shall see it at once.

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
    return group.apply(scale * P, G, onto=group.apply(shares, group.params))


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

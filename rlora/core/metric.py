"""The metric of a factor, the damped Gram of its partner: its inverse, its halves, where they act.

The metric of A is made of ``S_B = Bᵀ B`` and the other way round. A stack has first what acts on
the A factors, then what acts on the B factors.
"""

import math
from collections.abc import Sequence
from functools import partial
from math import prod
from typing import Any, Literal, TypeAlias

from rlora.core.algebra import traces
from rlora.core.backend import Backend
from rlora.core.checks import ComputeDtype, check_choice, check_nonnegative, is_zero
from rlora.core.factors import Array, Factors, indices_by_rank
from rlora.core.linalg import congruence
from rlora.core.rank_group import RankGroup, Stack

DampingMode = Literal["relative", "absolute", "covariant"]
Side = Literal["A", "B"]
Placement = Literal["before", "after", "both"]

Sizes: TypeAlias = Sequence[tuple[int, int]]
"""(m, n) of every pair."""

LEAST = 1e-6
"""The least relative damping behind an entrywise method: it keeps what rounding leaves of a null
space far below the damping, so that the filter finds it."""


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

    As `rlora.core.placement.preconditioners`, with one Gram where that has two. The Gram of a
    frozen factor is no worse than its start: covariant damping leaves it as it is, whichever factor
    it is.
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
    sizes: Sizes | None = None,
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


def split_power(
    group: RankGroup,
    S: Stack,
    sizes: Sizes,
    placement: Placement,
    damping: float,
    damping_mode: DampingMode,
    rate: Array | float = 1.0,
) -> tuple[Stack | None, Stack | None]:
    """``H⁻¹`` before an entrywise method, after it, or in halves on both sides of it.

    The halves are ``P`` before and ``c Pᵀ F⁴`` behind, with triangular P, ``Pᵀ P = H⁻¹``, and
    ``F = P S Pᵀ``, where S is the undamped Gram of the partner: its eigenvalues are
    ``s / (s + damping)``, with covariant damping ``σ² / (σ² + δ)`` for the singular values σ of
    BA. An entrywise method fills directions of the partner's null space, and Pᵀ would
    multiply what has no effect on the product by ``damping^-½`` at each step; F leaves it out.
    After it alone, ``c H⁻¹ (S H⁻¹)⁴``.

    The number ``c = (m / n)^¼`` for A and its inverse for B: an entrywise direction has about one
    unit in each entry, so that the halves would move BA by ``√n`` and ``√m`` in each direction of
    rank, and the larger factor would drift away under noise. With c both move it by ``(m n)^¼``.

    Parameters
    ----------
    group : RankGroup
        The pairs.
    S : Stack
        Grams of the partners.
    sizes : sequence of (int, int)
        The m and n of the group's pairs.
    placement, damping, damping_mode
        As `rlora.core.placement.preconditioners` has them.
    rate : float or array
        A number by which the second result is multiplied, such as the learning rate.

    Returns
    -------
    first, second : Stack or None
        None for the identity.
    """
    if placement == "before":
        return inverse_metric(group, S, damping, damping_mode, sizes=sizes), None
    xp, matmul, both = group.xp, group.backend.matmul, placement == "both"
    if both:
        P = metric_half(group, S, damping, damping_mode, LEAST)
    else:
        P = inverse_metric(group, S, damping, damping_mode, LEAST, sizes)
    if not group.backend.within([S], 0.0, math.inf):
        # A Gram that has overflowed has P = 0, and 0 times inf would be NaN.
        live = traces(xp, P) != 0
        S = xp.where(live, S, xp.zeros_like(P))
    transposed = P.mT
    F = matmul(S, transposed)
    F = matmul(P, F) if both else F
    F = matmul(F, F)
    second = matmul(transposed, matmul(F, F))
    c = group.constant([((m / n) ** 0.25, (n / m) ** 0.25) for m, n in sizes])
    return (P if both else None), rate * c * second

"""LoFT: AdamW on the full weight as far as one factor at a time can follow it, with its moments.

N. Tastan, S. Laskaridis, M. Takáč, K. Nandakumar, S. Horváth. LoFT: Low-Rank Adaptation That
Behaves Like Full Fine-Tuning. arXiv:2505.21289, 2025.
"""

import math
from typing import NamedTuple

from rlora.core.algebra import ROUNDING
from rlora.core.checks import check_choice, check_nonnegative, check_unit, hyperparameters
from rlora.core.dispatch import get_backend
from rlora.core.factors import Array, Factors, Tree, map_pairs
from rlora.core.linalg import no_overlap, one_more, record_overlap, to_new_coordinates
from rlora.core.metric import DampingMode, check_damping, inverse_metric
from rlora.core.moments import corrected_decays, counts, each, over, per_pair, small_zeros, zeros
from rlora.core.rank_group import RankGroup, by_rank
from rlora.core.transform import State, Transform, chain
from rlora.core.turns import First, decay_in_turn, next_turn, turns_of


class LoftState(NamedTuple):
    """State of LoFT for each pair."""

    mu: Tree
    """First moment of the preconditioned gradient, like the parameters."""

    nu: Tree
    """Second moment of its rows as products: (..., n, r, r) for A, (..., m, r, r) for B."""

    overlap: Tree
    """The partner's new rows times its old ones, (..., r, r)."""

    count: Tree
    """Gradients seen, one number a factor."""

    steps: Tree
    """Steps taken, their remainder by 2, one number a pair: whose turn it is."""

    scaling: Tree
    """The s of each pair."""


@hyperparameters
def scale_by_loft(
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-8,
    *,
    first: First = "B",
    damping: float = 1e-6,
    damping_mode: DampingMode = "relative",
    compute_dtype: str | None = None,
) -> Transform:
    """The direction of `loft` without decay, as a transformation."""
    check_unit("b1", b1)
    check_unit("b2", b2)
    check_nonnegative("eps", eps)
    check_choice("first", first, First)
    check_damping(damping, damping_mode)

    def init(params: Tree, scaling: float = 1.0) -> LoftState:
        return LoftState(
            zeros(params),
            map_pairs(no_rows, params),
            small_zeros(params, 2),
            counts(params),
            per_pair(params, 0.0),
            per_pair(params, scaling),
        )

    def rule(group: RankGroup, G: list[Factors], state: State) -> tuple[list[Factors], LoftState]:
        xp = group.xp
        S = group.partner_gram(group.params)
        T = to_new_coordinates(group, S, state.overlap)
        P = inverse_metric(group, S, damping, damping_mode)
        g = [
            Factors(*map(squarable, over(d, s)))
            for d, s in zip(group.apply(P, G), state.scaling, strict=True)
        ]
        old, to_new = group.apply(T, state.mu), group.unstack(T)

        inputs = zip(old, to_new, g, state.nu, state.count, strict=True)
        moments = [averages(group, (b1, b2), *of_pair) for of_pair in inputs]
        mu, rows = ([moment[i] for moment in moments] for i in (0, 1))
        turns = [turns_of(first, *k) for k in zip(state.steps, group.moving, strict=True)]
        seen = [
            seen_by_factors(group, pair, *moment, turn.B, eps)
            for pair, moment, turn in zip(group.params, moments, turns, strict=True)
        ]
        D = []
        for d, turn, s in zip(group.apply(P, seen), turns, state.scaling, strict=True):
            sides = zip(turn, over(d, s), strict=True)
            D.append(Factors(*(xp.where(each(t), x, 0 * x) for t, x in sides)))
        return D, LoftState(
            mu,
            rows,
            overlap=no_overlap(group, T),
            count=one_more(state.count),
            steps=list(map(next_turn, state.steps)),
            scaling=state.scaling,
        )

    return by_rank(init, rule, transport=record_overlap, compute_dtype=compute_dtype)


def averages(
    group: RankGroup,
    rates: tuple[float, float],
    old: Factors,
    to_new: Factors,
    g: Factors,
    nu: Factors,
    counts: Factors,
) -> tuple[Factors, Factors]:
    """Both moments without bias: of a partner that has turned, carried along."""
    matmul = group.backend.matmul
    mu, rows = [], []
    sides = zip(old, to_new, nu, g, in_rows(g), strict=True)
    for (m, T, C, x, v), count in zip(sides, counts, strict=True):
        d1, d2 = map(each, corrected_decays(group.backend, rates, count))
        T, d2 = T[..., None, :, :], d2[..., None]
        mu.append(d1 * m + (1 - d1) * x)
        rows.append(d2 * matmul(matmul(T, C), T.mT) + (1 - d2) * products(v))
    return Factors(*mu), Factors(*rows)


def seen_by_factors(
    group: RankGroup, pair: Factors, mu: Factors, rows: Factors, b_moves: Array, eps: float
) -> Factors:
    """``Bᵀ U`` and ``U Aᵀ`` of the full update U of this turn, (..., m, n)."""
    xp, matmul = group.xp, group.backend.matmul
    A, B = pair
    own, b_side = in_rows(pair), each(b_moves)
    X, Y = xp.where(b_side, mu.B, B), xp.where(b_side, A, mu.A)  # whose product is averaged
    left = xp.where(b_side, flat(rows.B), flat(products(own.B)))  # (..., m, r²)
    right = xp.where(b_side, flat(products(own.A)), flat(rows.A))  # (..., n, r²)
    # An entry that is lost in the rounding of its sum counts as that rounding.
    least = [xp.sum(x[..., :: group.rank + 1], axis=-1) for x in (left, right)]
    rounding = ROUNDING * float(xp.finfo(left.dtype).eps)
    seen_by_A, seen_by_B, m = xp.zeros_like(A), [], B.shape[-2]
    count = max(1, group.backend.piece(A) // (math.prod(A.shape[:-2]) * A.shape[-1]))
    for start in range(0, m, count):  # U, as large as the weight, is never made whole
        i = slice(start, min(start + count, m))
        V = matmul(left[..., i, :], right.mT)
        V = xp.maximum(V, rounding * least[0][..., i, None] * least[1][..., None, :])
        U = matmul(X[..., i, :], Y) / (xp.sqrt(V) + eps)
        seen_by_A = seen_by_A + matmul(B[..., i, :].mT, U)
        seen_by_B.append(matmul(U, A.mT))
    return Factors(seen_by_A, xp.concat(seen_by_B, axis=-2))


def in_rows(pair: Factors) -> Factors:
    """Columns of A and rows of B as rows: (..., n, r) and (..., m, r)."""
    return Factors(pair.A.mT, pair.B)


def squarable(g: Array) -> Array:
    """A gradient, shrunk where its squares would leave the range: there the second moment ends.

    For the first moment too, or a step would be as much too long.
    """
    xp = get_backend(g).xp
    largest = math.pow(xp.finfo(g.dtype).max, 0.45)  # what is made of products has room, too
    peak = xp.max(xp.abs(g), axis=(-2, -1), keepdims=True)
    return g * (largest / xp.clip(peak, min=largest))


def products(rows: Array) -> Array:
    """The product of each row with itself, (..., N, r, r)."""
    return rows[..., :, None] * rows[..., None, :]


def flat(rows: Array) -> Array:
    """(..., N, r, r) as (..., N, r²)."""
    return get_backend(rows).xp.reshape(rows, (*rows.shape[:-2], rows.shape[-1] ** 2))


def no_rows(pair: Factors) -> Factors:
    """The `LoftState.nu` of a pair before the first step."""
    xp = get_backend(pair.A).xp
    return Factors(*(xp.zeros_like(products(x)) for x in in_rows(pair)))


@hyperparameters
def loft(
    *,
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    first: First = "B",
    damping: float = 1e-6,
    damping_mode: DampingMode = "relative",
    compute_dtype: str | None = None,
) -> Transform:
    """LoFT, AdamW on the full weight as far as a factor can follow it.

    With ``g_A = (S_B + ..)⁻¹ G_A / s`` and ``T = S_B⁻¹ Bᵀ B_old``, where the dots are the damping,
    for A's turn and column j of A::

        M   = b1 T M + (1 - b1) g_A                first moment, (r, n)
        C_j = b2 T C_j Tᵀ + (1 - b2) g_j g_jᵀ      second moment, (n, r, r)
        U   = B M / (sqrt(V) + eps),   V_ij = b_iᵀ C_j b_i   the full update, (m, n)
        A   = A - lr ((S_B + ..)⁻¹ Bᵀ U / s + λ A)

    with b_i the rows of B and the moments without bias, ``M / (1 - b1^t)`` and ``C / (1 - b2^t)``;
    and the same for Bᵀ with the factors in each other's places. ``B g_A`` is the part of the full
    gradient in the column space of B, so that ``B M`` and V are the moments of AdamW on the full
    weight, seen through the columns that B has now. Both factors' moments take every gradient; the
    factors move in turns.

    Parameters
    ----------
    b1, b2 : float
        Decay rates, in [0, 1).
    eps : float
        At least 0; in units of the full gradient.
    weight_decay : float
        λ, at least 0; decoupled, of the factor whose turn it is.
    first : {"A", "B"}
        Who begins. B can move from B = 0, and begins in the authors' code.
    damping, damping_mode, compute_dtype
        As in `rlora.scaled_adamw`.

    Returns
    -------
    Transform
        State: one array a factor, r² numbers for each of its rows or columns, and for each factor
        r² numbers and its count; two numbers a pair.

    Raises
    ------
    ValueError, TypeError
        When a hyperparameter is out of its range or of the wrong type.

    Notes
    -----
    A step takes the time of one of the full weight, whose size U has, but memory for a few rows of
    U alone. Where a factor is frozen the other one moves every time. The path of the weight does
    not depend on s with relative damping or none, nor undamped on how the product is split: only on
    the weight's own axes, as AdamW's does.

    The authors' code carries the second moment by ``Tᵀ C T``; products of rows become ``T C Tᵀ``
    when rows become ``T g``. It has an eps of 1e-4, decays by λ without lr, after A's turn B's
    moments take an old gradient by the new A, and saved states lack the old factors and the turn.

    References
    ----------
    N. Tastan, S. Laskaridis, M. Takáč, K. Nandakumar, S. Horváth. LoFT: Low-Rank Adaptation That
    Behaves Like Full Fine-Tuning. arXiv:2505.21289, 2025.

    Examples
    --------
    >>> import rlora
    >>> method = rlora.loft(weight_decay=0.01)
    """
    transform = scale_by_loft(
        b1,
        b2,
        eps,
        first=first,
        damping=damping,
        damping_mode=damping_mode,
        compute_dtype=compute_dtype,
    )
    return chain(decay_in_turn(transform, weight_decay, first, "steps"))

"""OPLoRA: a proximal step of the weight by alternating least squares, with low-rank momentum.

A. J. Almansoori, M. Ivanova, A. Veprikov, A. Beznosikov, S. Horváth, M. Takáč. Faster Than SVD,
Smarter Than SGD: The OPLoRA Alternating Update. arXiv:2509.19977, 2025.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeAlias

from rlora.core.backend import Backend
from rlora.core.checks import check_nonnegative, check_unit, hyperparameters, is_zero
from rlora.core.dispatch import get_backend
from rlora.core.factors import (
    Array,
    Factors,
    Tree,
    counterparts,
    indices_by_rank,
    leaves_of,
    map_leaves,
    map_pairs,
    rebuild,
)
from rlora.core.linalg import add, one_more, scale, tangent
from rlora.core.metric import DampingMode, check_damping, inverse_metric
from rlora.core.moments import counts, each, keep_scaling, over, per_pair, zeros
from rlora.core.rank_group import RankGroup, Stack, by_rank
from rlora.core.sizes import into_range
from rlora.core.transform import State, Transform, apply_updates, chain

Coordinates: TypeAlias = Callable[[Sequence[Array]], list[Array]]


class LowRank(NamedTuple):
    """The matrix ``M_B M_A``: one thing, even where a factor is frozen."""

    A: Array
    B: Array


class OpState(NamedTuple):
    """State of OPLoRA."""

    mu: Tree
    """Momentum of the weight's gradient, a `LowRank` for each pair."""

    count: Tree
    """Gradients seen, one number a factor."""

    scaling: Tree
    """The s of each pair."""


@hyperparameters
def op_lora(
    *,
    momentum: float = 0.9,
    weight_decay: float = 0.0,
    damping: float = 1e-2,
    damping_mode: DampingMode = "covariant",
    compute_dtype: str | None = None,
) -> Transform:
    """OPLoRA, a proximal step of the weight by alternating least squares.

    The proximal step of ``X = B A`` is the pair with the least ``|B' A' - (X - lr M)|²``. It is
    solved by one half-step of A, then one of B, from the present pair::

        M_t = Π(G + β M)                           what the factors see of gradient and momentum
        A'  = A - lr H_B⁻¹ Bᵀ M_t                  the least |B A' - (X - lr M_t)|² + |A' - A|²_Λ
        B'  = argmin |B' A' - (X - lr M_t)|²
        M   = rank r of  β M + Π(G)                one half-step of each factor, from the old M

    with G the gradient by the weight over s, ``H_B = S_B + Λ`` and Π the projection on the tangent
    space of the matrices of rank r. In closed form without momentum, with ``D_A = H_B⁻¹ G_A / s²``,
    ``D_B = (I - B H_B⁻¹ Bᵀ) G_B H_A⁻¹ / s²`` and H_A the S_A, damped but for covariant damping::

        A' = A - lr D_A,    B' = B - lr D_B A A'ᵀ S_A'⁻¹

    and both factors decay by λ.

    Parameters
    ----------
    momentum : float
        β, in [0, 1).
    weight_decay : float
        λ, at least 0; decoupled, of each factor.
    damping, damping_mode, compute_dtype
        As in `rlora.scaled_sgd`.

    Returns
    -------
    Transform
        State: with momentum one array a factor and its count; one number a pair.

    Raises
    ------
    ValueError, TypeError
        When a hyperparameter is out of its range or of the wrong type.

    Notes
    -----
    Undamped or with covariant damping the product follows the same path however it is split, where
    r is at most m and n.
    Undamped the weight does so whatever s is (δ is compared with singular values of B A, not of s B
    A), and the two half-steps find ``X - lr M_t`` exactly if it has rank r and ``Bᵀ (X - lr M_t)``
    as well. Without momentum the direction is that of `rlora.lora_pro_sgd` in the gauge "zero";
    ``A A'ᵀ S_A'⁻¹`` takes the move of B from the old A to the new one.

    The authors keep inputs and output gradients of each layer, with which the second half-step sees
    the full gradient; factors' gradients show ``Π(G)`` and no more of it, a difference of order
    lr². They damp by ``lr λ I``, and start M_A at random; here it starts at A.

    References
    ----------
    A. J. Almansoori, M. Ivanova, A. Veprikov, A. Beznosikov, S. Horváth, M. Takáč. Faster Than
    SVD, Smarter Than SGD: The OPLoRA Alternating Update. arXiv:2509.19977, 2025.

    Examples
    --------
    >>> import rlora
    >>> method = rlora.op_lora(momentum=0.9)
    """
    check_unit("momentum", momentum)
    check_nonnegative("weight_decay", weight_decay)
    check_damping(damping, damping_mode)

    def init(params: Tree, scaling: float = 1.0) -> OpState:
        mu = map_pairs(lambda pair: LowRank(*pair), zeros(params))
        return OpState(mu, counts(params), per_pair(params, scaling))

    def inverses(group: RankGroup) -> Stack:
        return inverse_metric(group, group.partner_gram(group.params), damping, damping_mode)

    def plain(group: RankGroup, G: list[Factors], state: State) -> tuple[list[Factors], State]:
        return tangent(group, inverses(group), _by_weight(G, state)), state

    def rule(group: RankGroup, G: list[Factors], state: State) -> tuple[list[Factors], OpState]:
        P, g = inverses(group), _by_weight(G, state)
        seen = group.apply(group.partner_cross(group.params, state.mu), state.mu)
        mu = low_rank_sum(group, momentum, _started(group, state), tangent(group, P, g))
        D = tangent(group, P, add(g, scale(momentum, seen)))
        return D, OpState(mu, one_more(state.count), state.scaling)

    def move(params: Tree, direction: Tree, lr: Array | float) -> Tree:
        return proximal_step(params, direction, lr, weight_decay, compute_dtype)

    kept = (keep_scaling, plain) if is_zero(momentum) else (init, rule)
    return chain(by_rank(*kept, apply=move, compute_dtype=compute_dtype))


def _by_weight(G: Sequence[Factors], state: State) -> list[Factors]:
    """Gradients in units in which a step of the product is one of the weight."""
    return [over(x, s**2) for x, s in zip(G, state.scaling, strict=True)]


def _started(group: RankGroup, state: State) -> list[LowRank]:
    """The momentum; before the first gradient zero, with the rows of A to begin from."""

    def start(pair: Factors, M: LowRank, count: Factors) -> LowRank:
        return LowRank(group.xp.where(each(count.A + count.B) == 0, pair.A, M.A), M.B)

    return list(map(start, group.params, state.mu, state.count))


def low_rank_sum(
    group: RankGroup, keep: Array | float, M: Sequence[LowRank], D: Sequence[Factors]
) -> list[LowRank]:
    """LoRSum: a half-step of M_A, then one of M_B, towards ``T = keep M + B D_A + D_B A``.

    ``M_A + (M_BᵀM_B)⁻¹ M_Bᵀ (T - M_B M_A)``: of the least squares solutions the nearest one to M_A,
    in an orthonormal basis of its rows. M_B comes in an ordinary size, M_A makes up for it: the
    coordinates of a large B in a tiny M_B would be out of range. A zero M_B leaves M_A as it is.
    """
    (A, B), (D_A, D_B) = zip(*group.params, strict=True), zip(*D, strict=True)
    backend, xp, M_A = group.backend, group.xp, [x.A for x in M]
    M_B, numbers = into_range(backend, [x.B for x in M])
    if numbers is not None:
        peaks = (xp.max(xp.abs(y), axis=(-2, -1), keepdims=True) for y in M_B)
        each_of = zip(M_A, numbers, peaks, strict=True)
        M_A = [x / xp.where(peak > 0, c, xp.ones_like(c)) for x, c, peak in each_of]
    sums = list(M_A)
    inside = least_squares(backend, [x.mT for x in M_B], group.dtype)
    for c, Y, X in ((keep - 1, M_B, M_A), (1.0, B, D_A), (1.0, D_B, A)):
        parts = backend.apply_left([(c * y).mT for y in inside([y.mT for y in Y])], X)
        sums = [total + part for total, part in zip(sums, parts, strict=True)]
    sums = orthonormal(backend, sums, group.dtype)  # or the condition number grows at each step
    inside = least_squares(backend, sums, group.dtype)
    new: list[Any] = [0.0] * len(M)
    for c, Y, X in ((keep, M_B, M_A), (1.0, B, D_A), (1.0, D_B, A)):
        parts = backend.apply_right(Y, [c * x for x in inside(X)])
        new = [total + part for total, part in zip(new, parts, strict=True)]
    return list(map(LowRank, sums, new))


def orthonormal(backend: Backend, F: Sequence[Array], dtype: Any) -> list[Array]:
    """Rows (..., r, n) that span the same, orthonormal up to damping."""
    F, _ = into_range(backend, F)
    W = backend.cast(backend.damped_half(backend.cross_rows(F, F, dtype)), F[0].dtype)
    return backend.apply_left(backend.unstack(W, F), F)


def proximal_step(
    params: Tree, direction: Tree, lr: Array | float, weight_decay: float, dtype: str | None
) -> Tree:
    """``A' = A - lr D_A`` and ``B' = B - lr D_B A A'ᵀ S_A'⁻¹``; with a frozen factor a line."""
    pairs, D = counterparts(params, params, direction)
    both = [i for i, d in enumerate(D) if d.A is not None and d.B is not None]
    backend = get_backend(*leaves_of(params))
    for places in indices_by_rank([pairs[i] for i in both]):
        members = [both[k] for k in places]
        old = backend.widen([pairs[i].A for i in members])
        new = backend.add_scaled(old, [D[i].A for i in members], -lr)
        with backend.exact(old[0]):
            wide = backend.compute_dtype(pairs[members[0]].A.dtype, dtype)
            K = least_squares(backend, new, wide)(old)
            shares = backend.apply_right([D[i].B for i in members], K)
        for i, d in zip(members, shares, strict=True):
            D[i] = D[i]._replace(B=d)
    if not is_zero(weight_decay):
        D = [_decayed(d, pair, weight_decay) for d, pair in zip(D, pairs, strict=True)]
    moved: Tree = apply_updates(params, rebuild(params, D), lr)
    return moved


def _decayed(d: Factors, pair: Factors, weight_decay: float) -> Factors:
    decayed: Factors = map_leaves(lambda step, x: step + weight_decay * x, d, pair)
    return decayed


def least_squares(backend: Backend, F: Sequence[Array], dtype: Any) -> Coordinates:
    """``Y -> Y F⁺``, (..., r, r), the coordinates of rows Y in the rows of F (..., r, n).

    F may have a lower rank, as a momentum has whose gradients do: what its rounding leaves of a
    null direction counts as 0. A weak direction is damped: it belongs to the span that is sought.
    """
    xp = backend.xp
    F, c = into_range(backend, F)
    H, unit, damping = backend.of_trace_r(backend.cross_rows(F, F, dtype), 0.0)
    w, Q = backend.eigh(H)
    lost = w <= w.shape[-1] * float(xp.finfo(F[0].dtype).eps)
    inverse = xp.where(lost, xp.zeros_like(w), 1 / (xp.abs(w) + damping))
    P = backend.matmul(Q * xp.expand_dims(inverse, axis=-2), Q.mT) / unit

    def inside(Y: Sequence[Array]) -> list[Array]:
        Y, d = into_range(backend, Y)
        product = backend.matmul(backend.cross_rows(Y, F, dtype), P)
        found = backend.unstack(backend.cast(product, F[0].dtype), Y)
        if c is not None:
            found = [x * number for x, number in zip(found, c, strict=True)]
        return found if d is None else [x / number for x, number in zip(found, d, strict=True)]

    return inside

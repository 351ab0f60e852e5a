"""Riemannion: Muon on the manifold of rank-r matrices, whatever its points are split into.

V. Bogachev, V. Aletov, A. Molozhavenko, D. Bobkov, V. Soboleva, A. Alanov, M. Rakhuba. LoRA meets
Riemannion: Muon Optimizer for Parametrization-independent Low-Rank Adapters. arXiv:2507.12142,
2025.
"""

from collections.abc import Sequence
from typing import NamedTuple

from rlora.core.algebra import ROUNDING
from rlora.core.backend import Backend
from rlora.core.checks import check_nonnegative, check_unit, hyperparameters
from rlora.core.decay import remaining
from rlora.core.dispatch import get_backend
from rlora.core.factors import Array, Factors, Tree, device_of, leaves_of, map_leaves, map_pairs
from rlora.core.linalg import add, scale, tangent
from rlora.core.metric import inverse_metric
from rlora.core.moments import zeros
from rlora.core.rank_group import RankGroup, by_rank
from rlora.core.transform import State, Transform, apply_updates, chain


class Tangent(NamedTuple):
    """The tangent vector ``B M_A + M_B A``: one thing, even where a factor is frozen."""

    A: Array
    B: Array


class RiemannionState(NamedTuple):
    """State of Riemannion."""

    mu: Tree
    """Momentum at the present point, a `Tangent` for each pair."""


@hyperparameters
def riemannion(
    *, b1: float = 0.9, weight_decay: float = 0.0, compute_dtype: str | None = None
) -> Transform:
    """Riemannion, orthogonalised momentum on the manifold of rank-r matrices.

    At the point ``X = B A`` a tangent vector is ``B D_A + D_B A``. With Π the projection on the
    tangent space, G the gradient by X and msign(M) the matrix with M's singular vectors and all
    singular values 1::

        M = Π(G) + b1 Π(M_old)
        X = truncated SVD of rank r of  (1 - lr λ) X - lr Π(msign(M))

    Parameters
    ----------
    b1 : float
        Momentum, in [0, 1).
    weight_decay : float
        λ, at least 0; the product shrinks by ``1 - lr λ``.
    compute_dtype : {None, "float32", "float64"}
        Precision of the r x r algebra; None is the parameters' own, at least float32.

    Returns
    -------
    Transform
        State: one array a factor.

    Raises
    ------
    ValueError, TypeError
        When a hyperparameter is out of its range or of the wrong type.

    Notes
    -----
    The new factors are ``B = U`` and ``A = Σ Vᵀ``: after the first step the split is of the
    method's choice. The product follows the same path from every split. B = 0 is no point of the
    manifold: the first step is the move of B alone. A pair with a frozen factor moves along a
    straight line. The momentum is stored as it is before orthogonalisation. The move is in units
    of ``B A``, not of ``s B A``. A rank direction that is zero in both factors stays zero.

    References
    ----------
    V. Bogachev, V. Aletov, A. Molozhavenko, D. Bobkov, V. Soboleva, A. Alanov, M. Rakhuba. LoRA
    meets Riemannion: Muon Optimizer for Parametrization-independent Low-Rank Adapters.
    arXiv:2507.12142, 2025.

    Examples
    --------
    >>> import rlora
    >>> method = rlora.riemannion(b1=0.9)
    """
    check_unit("b1", b1)
    check_nonnegative("weight_decay", weight_decay)

    def init(params: Tree, scaling: float = 1.0) -> RiemannionState:
        return RiemannionState(map_pairs(lambda pair: Tangent(*pair), zeros(params)))

    def rule(group: RankGroup, G: list[Factors], state: State) -> tuple[list[Factors], State]:
        P = inverse_metric(group, group.partner_gram(group.params))
        mu = add(tangent(group, P, G), scale(b1, state.mu))
        seen = [_seen_msign(group.backend, X, M) for X, M in zip(group.params, mu, strict=True)]
        return tangent(group, P, seen), RiemannionState([Tangent(*M) for M in mu])

    def transport(group: RankGroup, old: Sequence[Factors], state: State) -> RiemannionState:
        # What the new factors see of the old tangent vector: its projection needs no more.
        overlap = group.partner_cross(group.params, old)
        move = group.partner_cross(group.params, state.mu)
        seen = add(group.apply(overlap, state.mu), group.apply(move, old))
        P = inverse_metric(group, group.partner_gram(group.params))
        # A tangent vector of the product, of which a frozen factor has its share too.
        return RiemannionState([Tangent(*M) for M in tangent(group, P, seen, both=1.0)])

    def retract(params: Tree, direction: Tree, lr: Array | float) -> Tree:
        A = leaves_of(params)[0]
        with get_backend(A).exact(A):
            return map_pairs(lambda pair, d: _retract(pair, d, lr, weight_decay), params, direction)

    return chain(
        by_rank(init, rule, transport=transport, apply=retract, compute_dtype=compute_dtype)
    )


def _seen_msign(backend: Backend, X: Factors, M: Factors) -> Factors:
    """``Bᵀ Y`` and ``Y Aᵀ`` for ``Y = msign(B M_A + M_B A)``."""
    xp, matmul = backend.xp, backend.matmul
    U, core, V = _core(backend, X, M)
    left, sigma, right = backend.svd(core)  # (..., k, l) with k, l at most 2r
    floor = ROUNDING * float(xp.finfo(sigma.dtype).eps) * core.shape[-1]
    live = sigma > floor * xp.max(sigma, axis=-1, keepdims=True)
    ones = xp.where(live, xp.ones_like(sigma), 0 * sigma)  # NaN stays
    sign = matmul(left * ones[..., None, :], right)
    return Factors(
        matmul(matmul(matmul(X.B.mT, U), sign), V.mT),
        matmul(U, matmul(sign, matmul(V.mT, X.A.mT))),
    )


def _core(backend: Backend, X: Factors, M: Factors) -> tuple[Array, Array, Array]:
    """``U core Vᵀ = B M_A + M_B A`` with orthonormal U (m, k) and V (n, l), k and l at most 2r."""
    xp = backend.xp
    U, R = backend.qr(xp.concat([X.B, M.B], axis=-1))
    V, T = backend.qr(xp.concat([M.A.mT, X.A.mT], axis=-1))
    return U, backend.matmul(R, T.mT), V


def _retract(pair: Factors, d: Factors, lr: Array | float, weight_decay: float) -> Factors:
    """The best rank-r approximation of ``(1 - lr λ) B A - lr (B D_A + D_B A)``, split anew."""
    backend = get_backend(*pair)
    xp, r, dtype = backend.xp, pair.A.shape[-2], backend.compute_dtype(pair.A.dtype)
    wide = Factors(*(backend.cast(x, dtype) for x in pair))
    if d.A is None or d.B is None:
        decayed = map_leaves(lambda step, x: step + weight_decay * x, d, wide)
        straight: Factors = apply_updates(pair, decayed, lr)
        return straight
    # [B, D_B] [(1 - lr λ) A - lr D_A; -lr A]
    move = Factors(remaining(lr, weight_decay, wide.A.dtype) * wide.A - lr * d.A, d.B)
    U, core, V = _core(backend, Factors(-lr * wide.A, wide.B), move)
    left, sigma, right = backend.svd(core)
    kept = min(r, sigma.shape[-1])
    B = backend.matmul(U, left)[..., :kept]
    A = (sigma[..., :, None] * backend.matmul(right, V.mT))[..., :kept, :]
    if missing := r - kept:  # a rank above that of the weight
        B = xp.concat([B, xp.zeros_like(wide.B[..., :missing])], axis=-1)
        A = xp.concat([A, xp.zeros_like(wide.A[..., :missing, :])], axis=-2)
    slots = _slots(backend, wide)
    A, B = backend.matmul(slots.mT, A), backend.matmul(B, slots)
    return Factors(backend.cast(A, pair.A.dtype), backend.cast(B, pair.B.dtype))


def _slots(backend: Backend, pair: Factors) -> Array:
    """The k-th row has its 1 at the k-th rank direction that is not zero on both sides.

    Zeros on both sides are padding, as PEFT's hotswap makes it: the point has a lower rank, and
    there is no gradient that could ask for a higher one.
    """
    xp, r = backend.xp, pair.A.shape[-2]
    used = xp.any(pair.A != 0, axis=-1) | xp.any(pair.B != 0, axis=-2)  # (..., r)
    used = backend.cast(used, pair.A.dtype)
    k = xp.arange(r, dtype=pair.A.dtype, device=device_of(pair.A))
    k = xp.reshape(k, (*[1] * (pair.A.ndim - 2), r, 1))
    below = backend.cast(k < k.mT, pair.A.dtype)
    before = xp.sum(used[..., :, None] * below, axis=-2, keepdims=True)  # (..., 1, r)
    return backend.cast(k == before, pair.A.dtype) * used[..., None, :]  # (..., r, r)

"""Spectral starts of A and B, from the gradient G of the loss by W at W0, or from W0 itself.

Matrices are (..., m, n) of any floating dtype; leading axes are a stack of equal layers. Factors
come in at least float32. `rank` is in 1..min(m, n), where 2r triplets are needed in half of that.
``**svd`` are `seed`, `oversample` and `iterations` of `randomized_svd`; other numbers are positive.
``[M]_r`` is the best approximation of M by rank r, and ``U S Vᵀ`` its singular value decomposition.

What is no matrix raises a ShapeError, what is no real floating-point array a NamespaceError, a
number out of its range a ValueError, one of the wrong type a TypeError. No entry is read: NaN and
inf end as NaN or as the library's own error. Under torch, call inside ``torch.no_grad()``.
"""

import math
from numbers import Integral
from typing import Any, Literal, NamedTuple

import numpy as np

from rlora.core.backend import Backend, mT
from rlora.core.checks import check_choice, check_nonnegative
from rlora.core.dispatch import get_backend
from rlora.core.errors import ShapeError
from rlora.core.factors import Array, Factors

__all__ = ["Start", "gaussian", "goat", "goat_scaling", "loi", "lora_ga", "lora_one", "lora_sb",
           "pissa", "randomized_svd"]  # fmt: skip

OneForm = Literal["algorithm", "theory"]
GAForm = Literal["original", "peft"]


class Start(NamedTuple):
    """Factors to start from, and what must leave the base weight for the function to stay.

    With an offset the base weight must become ``W0 - s offset.B offset.A``: see `base`. Without
    one it stays as it is. Nothing is applied here.
    """

    params: Factors
    offset: Factors | None = None

    def base(self, weight: Array, scaling: float) -> Array:
        """The new base weight for ``W0 + s B A``, in the dtype of `weight`, W0 (..., m, n).

        Round factors that will be kept in bfloat16 first, so that the weight makes up for it.
        """
        check_nonnegative("scaling", scaling)
        if self.offset is None:
            return weight
        A, B = self.offset
        if tuple(weight.shape) != (shape := (*B.shape[:-1], A.shape[-1])):
            msg = f"expected a weight {shape}, got {tuple(weight.shape)}; is it stored as (n, m)?"
            raise ShapeError(msg)
        backend = get_backend(weight, A, B)
        wide = backend.compute_dtype(backend.xp.result_type(weight.dtype, A.dtype))
        with backend.exact(weight):
            BA = backend.matmul(backend.cast(B, wide), backend.cast(A, wide))  # (..., m, n)
        return backend.cast(backend.cast(weight, wide) - scaling * BA, weight.dtype)


def randomized_svd(
    matrix: Array, rank: int, *, seed: int = 0, oversample: int = 10, iterations: int = 4
) -> tuple[Array, Array, Array]:
    """Leading triplets U (..., m, rank), S (..., rank), Vᵀ (..., rank, n), by subspace iteration.

    Q, an orthonormal basis of ``(M Mᵀ)^iterations M Ω`` with Ω Gaussian (n, rank + oversample) and
    a QR after each product; then the exact SVD of ``Qᵀ M``, or of M itself where min(m, n) is no
    more than rank + oversample. NumPy draws Ω for every library, and the largest entry of each
    column of U by magnitude is positive. A flat spectrum asks for more than the defaults. N. Halko,
    P.-G. Martinsson, J. A. Tropp. Finding Structure with Randomness. arXiv:0909.4061, 2009.

    >>> U, S, Vt = randomized_svd(np.diag([1.0, -3.0, 2.0]), 2)
    >>> [round(float(x), 6) for x in S]
    [3.0, 2.0]
    """
    backend, M = _door(matrix, rank)
    for name, value in {"seed": seed, "oversample": oversample, "iterations": iterations}.items():
        _check_count(name, value, 0)
    xp, k = backend.xp, rank + oversample
    with backend.exact(M):
        if min(M.shape[-2:]) <= k:
            U, S, Vt = xp.linalg.svd(M, full_matrices=False)
        else:
            Q, _ = xp.linalg.qr(backend.matmul(M, _normal(backend, (M.shape[-1], k), seed, M)))
            for _ in range(iterations):
                Z, _ = xp.linalg.qr(backend.matmul(mT(M), Q))  # (..., n, k)
                Q, _ = xp.linalg.qr(backend.matmul(M, Z))  # (..., m, k)
            U, S, Vt = xp.linalg.svd(backend.matmul(mT(Q), M), full_matrices=False)
            U = backend.matmul(Q, U)
    U, S, Vt = U[..., :rank], S[..., :rank], Vt[..., :rank, :]
    one = xp.ones_like(S)
    sign = xp.where(xp.max(U, axis=-2) >= -xp.min(U, axis=-2), one, -one)  # (..., r)
    return U * sign[..., None, :], S, sign[..., :, None] * Vt


def lora_one(
    gradient: Array, rank: int, *, gamma: float = 1 / 128, form: OneForm = "algorithm", **svd: int
) -> Start:
    """LoRA-One: ``B = √γ U S^½`` and ``A = √γ S^½ Vᵀ`` of ``[-G]_r``; W0 stays.

    The form "algorithm", as the authors' code, divides S by its largest entry first; "theory" does
    not. A zero G gives zero factors, which no method can leave. Y. Zhang, F. Liu, Y. Chen.
    LoRA-One: One-Step Full Gradient Could Suffice for Fine-Tuning Large Language Models, Provably
    and Efficiently. arXiv:2502.01235, 2025.

    >>> A, B = lora_one(np.diag([4.0, 1.0]), 1, gamma=1.0, form="theory").params
    >>> bool(np.allclose(B @ A, np.diag([-4.0, 0.0])))
    True
    """
    _check_positive("gamma", gamma)
    check_choice("form", form, OneForm)
    U, S, Vt = randomized_svd(gradient, rank, **svd)
    if form == "algorithm":
        xp, top = get_backend(S).xp, S[..., :1]
        S = S / xp.where(top > 0, top, xp.ones_like(top))
    return Start(_balanced(U, gamma * S, -Vt))


def lora_ga(
    gradient: Array, rank: int, *, gamma: float = 16.0, form: GAForm = "original", **svd: int
) -> Start:
    """LoRA-GA: ``A = c V_{1..r}ᵀ`` and ``B = c U_{r+1..2r}`` of G, ``c = m^¼ / √γ``; W0 is offset.

    The first step of gradient descent then goes along ``[G]_2r``. The form "peft" is what PEFT
    makes of it, ``A = V_{1..r}ᵀ`` and ``B = c U_{r+1..2r} S_{r+1..2r}``, and loses that. Where the
    rank of G is r or less, B is noise. S. Wang, L. Yu, J. Li. LoRA-GA: Low-Rank Adaptation with
    Gradient Approximation. arXiv:2407.05000, 2024.

    >>> W0, start = np.ones((4, 4)), lora_ga(np.diag([4.0, 3.0, 2.0, 1.0]), 2)
    >>> bool(np.allclose(start.base(W0, 2.0) + 2.0 * start.params.B @ start.params.A, W0))
    True
    """
    _check_positive("gamma", gamma)
    check_choice("form", form, GAForm)
    _door(gradient, rank, times=2)
    U, S, Vt = randomized_svd(gradient, 2 * rank, **svd)
    A, B, c = Vt[..., :rank, :], U[..., rank:], U.shape[-2] ** 0.25 / gamma**0.5
    pair = Factors(c * A, c * B) if form == "original" else Factors(A, c * B * S[..., None, rank:])
    return Start(pair, offset=pair)


def loi(gradient: Array, rank: int, *, alpha: float = 1.0, **svd: int) -> Start:
    """Riemannion's start: ``B = U_{1..r}`` and ``A = α V_{r+1..2r}ᵀ`` of G; W0 is offset.

    The tangent space of the rank-r matrices at B A holds ``[G]_2r``. V. Bogachev, V. Aletov,
    A. Molozhavenko, D. Bobkov, V. Soboleva, A. Alanov, M. Rakhuba. LoRA meets Riemannion: Muon
    Optimizer for Parametrization-independent Low-Rank Adapters. arXiv:2507.12142, 2025.

    >>> loi(np.diag([4.0, 3.0, 2.0, 1.0]), 2).params.A.shape
    (2, 4)
    """
    _check_positive("alpha", alpha)
    _door(gradient, rank, times=2)
    U, _, Vt = randomized_svd(gradient, 2 * rank, **svd)
    pair = Factors(alpha * Vt[..., rank:, :], U[..., :rank])
    return Start(pair, offset=pair)


def lora_sb(gradient: Array, rank: int, *, lr: float, **svd: int) -> Start:
    """LoRA-SB: ``B = U`` and ``A = S Vᵀ`` of ``[-lr sign(G)]_r``, a first step of Adam; W0 stays.

    `lr` is the first learning rate of the warm-up to come. The paper's core R = S stands in A, for
    A may move within its row space. The scaling s is 1. K. Ponkshe, R. Singhal, E. Gorbunov,
    A. Tumanov, S. Horvath, P. Vepakomma. Initialization using Update Approximation is a Silver
    Bullet for Extremely Efficient Low-Rank Fine-Tuning. arXiv:2411.19557, 2024.

    >>> A, B = lora_sb(np.outer([1.0, -2.0], [3.0, 4.0, 5.0]), 1, lr=0.1).params
    >>> bool(np.allclose(B @ A, [[-0.1] * 3, [0.1] * 3]))
    True
    """
    _check_positive("lr", lr)
    backend, G = _door(gradient, rank)
    U, S, Vt = randomized_svd(backend.xp.sign(G), rank, **svd)
    return Start(Factors(-lr * S[..., :, None] * Vt, U))


def pissa(weight: Array, rank: int, *, scaling: float = 1.0, **svd: int) -> Start:
    """PiSSA: ``B = U (S/s)^½`` and ``A = (S/s)^½ Vᵀ`` of ``[W0]_r``, s the scaling; W0 is offset.

    Weights have flat spectra: 16 iterations unless told otherwise, as the authors; an `oversample`
    of min(m, n) gives the exact SVD. F. Meng, Z. Wang, M. Zhang. PiSSA: Principal Singular Values
    and Singular Vectors Adaptation of Large Language Models. arXiv:2404.02948, 2024.

    >>> W0 = np.diag([4.0, 1.0])
    >>> bool(np.allclose(pissa(W0, 1, scaling=2.0).base(W0, scaling=2.0), np.diag([0.0, 1.0])))
    True
    """
    _check_positive("scaling", scaling)
    U, S, Vt = randomized_svd(weight, rank, **{"iterations": 16, **svd})
    pair = _balanced(U, S / scaling, Vt)
    return Start(pair, offset=pair)


def goat(weight: Array, rank: int, *, experts: int, scaling: float, rho: float = 10.0) -> Start:
    """GOAT: E experts, A (..., E, r_e, n) and B (..., E, m, r_e), from segments of the exact SVD.

    ``B_i = U_j (S_j/(s ρ))^½`` and ``A_i = (S_j/(s ρ))^½ V_jᵀ`` of W0, j the ``r_e = rank/E``
    triplets from ``i floor(min(m, n)/E)`` on; `rank` must be a multiple of E, s is best
    `goat_scaling`. W0 is offset by one pair of rank `rank`, ``(1/E) Σ B_i A_i``: under a uniform
    router the function stays in expectation. C. Fan, Z. Lu, S. Liu, C. Gu, X. Qu, W. Wei, Y. Cheng.
    Make LoRA Great Again: Boosting LoRA with Adaptive Singular Values and Mixture-of-Experts
    Optimization Alignment. arXiv:2502.16894, 2025.

    >>> goat(np.eye(8, 6), 4, experts=2, scaling=goat_scaling(6, 2)).params.B.shape
    (2, 8, 2)
    """
    _check_positive("scaling", scaling)
    _check_positive("rho", rho)
    _check_count("experts", experts, 1)
    backend, W = _door(weight, rank)
    if rank % experts:
        msg = f"rank must be a multiple of the number of experts, got {rank} and {experts}"
        raise ValueError(msg)
    U, S, Vt = randomized_svd(W, min(W.shape[-2:]))
    step, r_e = S.shape[-1] // experts, rank // experts
    parts = [slice(i * step, i * step + r_e) for i in range(experts)]
    pairs = [_balanced(U[..., j], S[..., j] / (scaling * rho), Vt[..., j, :]) for j in parts]
    A, B = zip(*pairs, strict=True)
    xp = backend.xp
    stacked = Factors(xp.stack(A, axis=-3), xp.stack(B, axis=-3))
    return Start(stacked, offset=Factors(xp.concat(A, axis=-2), xp.concat(B, axis=-1) / experts))


def goat_scaling(n: int, rank: int, *, eta: float = 1.0) -> float:
    """GOAT's ``s = sqrt(3 η n / r_e)`` for an expert of rank r_e: ``E[s² AᵀA] = η I``.

    That is for a kaiming-uniform A (r_e, n), of variance 1/(3 n); η is the ratio of the learning
    rates of full fine-tuning and of the factors. See `goat`.

    >>> goat_scaling(12, 1)
    6.0
    """
    _check_count("n", n, 1)
    _check_count("rank", rank, 1)
    _check_positive("eta", eta)
    return math.sqrt(3.0 * eta * n / rank)


def gaussian(weight: Array, rank: int, *, seed: int = 0) -> Start:
    """The plain start: A with entries from ``N(0, 1/r²)``, B zero; W0 stays.

    As PEFT's ``init_lora_weights="gaussian"``. Of the weight only shape, dtype, library and device
    count. Give each layer a seed of its own.

    >>> A, B = gaussian(np.zeros((6, 4)), 2).params
    >>> A.shape, float(abs(B).max())
    ((2, 4), 0.0)
    """
    backend, W = _door(weight, rank)
    _check_count("seed", seed, 0)
    A = _normal(backend, (*W.shape[:-2], rank, W.shape[-1]), seed, W) / rank
    return Start(Factors(A, backend.xp.zeros_like(W[..., :rank])))


def _door(matrix: Array, rank: int, *, times: int = 1) -> tuple[Backend, Array]:
    """The backend and the matrix in at least float32; raises unless `times` `rank` fits."""
    backend = get_backend(matrix)
    if matrix.ndim < 2:
        msg = f"expected a matrix (..., m, n), got shape {tuple(matrix.shape)}"
        raise ShapeError(msg)
    _check_count("rank", rank, 1, min(matrix.shape[-2:]) // times, f" for {tuple(matrix.shape)}")
    return backend, backend.cast(matrix, backend.compute_dtype(matrix.dtype))


def _check_count(
    name: str, value: Any, least: int, most: float = math.inf, where: str = ""
) -> None:
    if isinstance(value, bool) or not isinstance(value, Integral):
        msg = f"{name} must be an integer, got {value!r} ({type(value).__name__})"
        raise TypeError(msg)
    if not least <= int(value) <= most:
        msg = f"{name} must be in {least}..{most}{where}, got {value}"
        raise ValueError(msg)


def _check_positive(name: str, value: Any) -> None:
    check_nonnegative(name, value)
    if value == 0:
        msg = f"{name} must be positive, got {value!r}"
        raise ValueError(msg)


def _normal(backend: Backend, shape: tuple[int, ...], seed: int, like: Array) -> Array:
    return backend.asarray_like(np.random.default_rng(seed).standard_normal(shape), like)


def _balanced(U: Array, S: Array, Vt: Array) -> Factors:
    """``B = U S^½`` and ``A = S^½ Vᵀ``: the two Grams are equal."""
    root = S**0.5  # (..., r)
    return Factors(root[..., :, None] * Vt, U * root[..., None, :])

"""The leading singular triplets of a matrix, and what may be asked of them."""

import math

import numpy as np

from rlora.core.backend import Backend
from rlora.core.checks import check_count
from rlora.core.dispatch import get_backend
from rlora.core.errors import ShapeError
from rlora.core.factors import Array


def randomized_svd(
    matrix: Array, rank: int, *, seed: int = 0, oversample: int = 10, iterations: int = 4
) -> tuple[Array, Array, Array]:
    """Leading singular triplets by subspace iteration.

    Parameters
    ----------
    matrix : array of shape (..., m, n)
        M; leading axes are a stack.
    rank : int
        In 1..min(m, n).
    seed : int
        At least 0. NumPy draws Ω from it for every library.
    oversample, iterations : int
        At least 0. A flat spectrum asks for more than the defaults.

    Returns
    -------
    U, S, Vt : arrays of shape (..., m, rank), (..., rank) and (..., rank, n)
        In at least float32. The largest entry of each column of U by magnitude is positive.

    Raises
    ------
    ShapeError
        When `matrix` has fewer than two axes.
    NamespaceError
        When it is no real floating-point array.
    ValueError, TypeError
        When a number is out of its range or of the wrong type.

    Notes
    -----
    Q is an orthonormal basis of ``(M Mᵀ)^iterations M Ω`` with Ω Gaussian (n, rank + oversample)
    and a QR after each product; then comes the exact SVD of ``Qᵀ M``. Where min(m, n) is no more
    than rank + oversample it is the SVD of M itself.

    References
    ----------
    N. Halko, P.-G. Martinsson, J. A. Tropp. Finding Structure with Randomness: Probabilistic
    Algorithms for Constructing Approximate Matrix Decompositions. arXiv:0909.4061, 2009.

    Examples
    --------
    >>> import numpy as np
    >>> import rlora
    >>> U, S, Vt = rlora.initializers.randomized_svd(np.diag([1.0, -3.0, 2.0]), 2)
    >>> [round(float(x), 6) for x in S]
    [3.0, 2.0]
    """
    backend, M = checked_matrix(matrix, rank)
    for name, value in {"seed": seed, "oversample": oversample, "iterations": iterations}.items():
        check_count(name, value, 0)
    xp, k = backend.xp, rank + oversample
    with backend.exact(M):
        if min(M.shape[-2:]) <= k:
            U, S, Vt = xp.linalg.svd(M, full_matrices=False)
        else:
            Q, _ = xp.linalg.qr(backend.matmul(M, normal(backend, (M.shape[-1], k), seed, M)))
            for _ in range(iterations):
                Z, _ = xp.linalg.qr(backend.matmul(M.mT, Q))  # (..., n, k)
                Q, _ = xp.linalg.qr(backend.matmul(M, Z))  # (..., m, k)
            U, S, Vt = xp.linalg.svd(backend.matmul(Q.mT, M), full_matrices=False)
            U = backend.matmul(Q, U)
    U, S, Vt = U[..., :rank], S[..., :rank], Vt[..., :rank, :]
    one = xp.ones_like(S)
    sign = xp.where(xp.max(U, axis=-2) >= -xp.min(U, axis=-2), one, -one)  # (..., r)
    return U * sign[..., None, :], S, sign[..., :, None] * Vt


def checked_matrix(matrix: Array, rank: int, *, times: int = 1) -> tuple[Backend, Array]:
    """The backend and the matrix in at least float32; raises unless `times` `rank` fits.

    With `times` 0 every rank does.
    """
    backend = get_backend(matrix)
    if matrix.ndim < 2:
        msg = f"expected a matrix (..., m, n), got shape {tuple(matrix.shape)}"
        raise ShapeError(msg)
    most = min(matrix.shape[-2:]) // times if times else math.inf
    try:
        check_count("rank", rank, 1, most, f" for {tuple(matrix.shape)}")
    except ValueError as error:
        raise ShapeError(*error.args) from None
    return backend, backend.cast(matrix, backend.compute_dtype(matrix.dtype))


def normal(backend: Backend, shape: tuple[int, ...], seed: int, like: Array) -> Array:
    """Standard normal numbers, the same for every library."""
    return backend.asarray_like(np.random.default_rng(seed).standard_normal(shape), like)

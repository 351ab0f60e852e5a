"""Factors with the same product whose rank directions carry nearly equal parts of it."""

import numpy as np

from rlora.core.backend import Backend
from rlora.core.dispatch import get_backend
from rlora.core.factor_checks import check_pairs
from rlora.core.factors import Array, Factors, Tree, leaves_of, map_pairs


def rebalance(params: Tree) -> Tree:
    """Factors with the same product whose rank directions carry nearly equal parts of it.

    With ``B A = U Σ Vᵀ`` and an orthogonal C of size r without an entry above ``1.5 / sqrt(r)`` ::

        B <- U Σ^½ C,   A <- Cᵀ Σ^½ Vᵀ

    so that ``A Aᵀ = Bᵀ B``, with no entry of the diagonal above about twice their mean. For trained
    factors that are to be rounded: rounding to p binary digits changes the product by about ``4^-p
    / 3 · Σ |b_k|² |a_k|²`` (squared norm; sum over the columns of B and the rows of A), which is
    least where these are alike. A trained rank that needs few of its directions gains up to a
    factor r against its singular vectors. The state of an optimizer does not fit the result.

    Parameters
    ----------
    params : Factors, or list or dict of them
        Trained factors; leading axes are stacks. Nothing is changed in place.

    Returns
    -------
    Factors, or list or dict of them
        In the dtypes of `params`. A pair whose product is zero or not finite stays as it is.

    Raises
    ------
    ShapeError, NamespaceError, PairingError
        When factors do not fit together or are no real floating-point arrays.

    Examples
    --------
    >>> import numpy as np
    >>> from rlora import Factors, rebalance
    >>> A, B = rebalance(Factors(np.array([[9.0, 0.0], [0.0, 1.0]]), np.eye(2)))
    >>> bool(np.allclose(B @ A, [[9, 0], [0, 1]]) and np.allclose(A @ A.T, B.T @ B))
    True
    """
    check_pairs(params)
    backend = get_backend(*leaves_of(params))
    return map_pairs(lambda pair: _even(backend, pair), params)


def _even(backend: Backend, pair: Factors) -> Factors:
    xp, dtype = backend.xp, backend.compute_dtype(pair.A.dtype)
    A, B = (backend.cast(x, dtype) for x in pair)
    largest = [xp.max(xp.abs(x), axis=(-2, -1), keepdims=True) for x in (A, B)]
    a, b = (xp.where((x > 0) & xp.isfinite(x), x, xp.ones_like(x)) for x in largest)
    sound = (largest[0] == a) & (largest[1] == b)
    with backend.exact(A):
        U, R = xp.linalg.qr(xp.where(sound, B / b, xp.zeros_like(B)))  # (..., m, k), (..., k, r)
        V, L = xp.linalg.qr(xp.where(sound, A / a, xp.zeros_like(A)).mT)
        u, s, vt = xp.linalg.svd(backend.matmul(R, L.mT), full_matrices=False)
        C = backend.asarray_like(cosines(A.shape[-2])[: s.shape[-1]], A)
        root = s[..., None, :] ** 0.5 * a**0.5 * b**0.5
        new_B = backend.matmul(backend.matmul(U, u) * root, C)
        new_A = backend.matmul(backend.matmul(V, vt.mT) * root, C).mT
    sound = sound & (xp.max(s, axis=-1)[..., None, None] > 0)
    return Factors(
        backend.cast(xp.where(sound, new_A, A), pair.A.dtype),
        backend.cast(xp.where(sound, new_B, B), pair.B.dtype),
    )


def cosines(r: int) -> Array:
    """The orthogonal matrix nearest to cosines of r frequencies, a row for each.

    At a quarter of a step from those of the DCT-II, whose first row is constant: factors that are
    multiples of one another by powers of two round alike, and their errors add up.
    """
    frequency, x = np.arange(r)[:, None] + 0.25, np.arange(r) + 0.5
    U, _, Vt = np.linalg.svd(np.cos(np.pi / r * frequency * x))
    return U @ Vt

"""Starts from the inputs of a layer."""

from rlora.core.checks import check_count, hyperparameters
from rlora.core.factors import Array, Factors, device_of
from rlora.initializers.start import Start
from rlora.initializers.svd import checked_matrix, randomized_svd


@hyperparameters
def eva(inputs: Array, rank: int, *, out_features: int, **svd: int) -> Start:
    """EVA: the principal directions of the inputs of a layer in A, and a zero B; W0 stays.

    Parameters
    ----------
    inputs : array of shape (..., t, n)
        X, a row for each token.
    rank : int
        In 1..min(t, n).
    out_features : int
        m, at least 1.
    **svd : int
        `seed`, `oversample` and `iterations` of `randomized_svd`.

    Returns
    -------
    Start
        Without an offset.

    Raises
    ------
    ShapeError
        When `inputs` has fewer than two axes.
    NamespaceError
        When it is no real floating-point array.
    ValueError, TypeError
        When another argument is out of its range or of the wrong type.

    Notes
    -----
    The rows of A are the leading right singular vectors of X less its mean row; the largest entry
    of each by magnitude is positive. The paper also moves ranks to the layers where they explain
    more variance: here they stay, as with PEFT's ``EvaConfig(rho=1.0)``. PEFT leaves out tokens
    without a label; here every row counts.

    References
    ----------
    F. Paischer, L. Hauzenberger, T. Schmied, B. Alkin, M. P. Deisenroth, S. Hochreiter.
    Parameter Efficient Fine-tuning via Explained Variance Adaptation. arXiv:2410.07170, 2024.

    Examples
    --------
    >>> import numpy as np
    >>> import rlora
    >>> X = np.array([[1.0, 5.0], [3.0, 5.0]])
    >>> A, B = rlora.initializers.eva(X, 1, out_features=3).params
    >>> A.round(6).tolist(), B.shape
    ([[1.0, 0.0]], (3, 1))
    """
    check_count("out_features", out_features, 1)
    backend, X = checked_matrix(inputs, rank)
    V, _, _ = randomized_svd((X - backend.xp.mean(X, axis=-2, keepdims=True)).mT, rank, **svd)
    shape = (*X.shape[:-2], out_features, rank)
    B = backend.xp.zeros(shape, dtype=X.dtype, device=device_of(X))
    return Start(Factors(V.mT, B))

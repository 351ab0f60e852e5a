"""Starts from the base weight W0."""

import math

from rlora.core.checks import check_count, check_positive, hyperparameters
from rlora.core.factors import Array, Factors
from rlora.initializers.start import Start, balanced
from rlora.initializers.svd import checked_matrix, randomized_svd


@hyperparameters
def pissa(weight: Array, rank: int, *, scaling: float = 1.0, **svd: int) -> Start:
    """PiSSA: the principal part of the weight itself; W0 is offset.

    Parameters
    ----------
    weight : array of shape (..., m, n)
        W0.
    rank : int
        In 1..min(m, n).
    scaling : float
        The s of ``W0 + s B A``, positive.
    **svd : int
        `seed`, `oversample` and `iterations` of `randomized_svd`. Weights have flat spectra: 16
        iterations unless told otherwise, as the authors; an `oversample` of min(m, n) gives the
        exact SVD.

    Returns
    -------
    Start
        With the pair itself as its offset.

    Raises
    ------
    ShapeError
        When `weight` has fewer than two axes.
    NamespaceError
        When it is no real floating-point array.
    ValueError, TypeError
        When another argument is out of its range or of the wrong type.

    Notes
    -----
    ``B = U (S/s)^½`` and ``A = (S/s)^½ Vᵀ`` of ``[W0]_r``. The two Grams are equal.

    References
    ----------
    F. Meng, Z. Wang, M. Zhang. PiSSA: Principal Singular Values and Singular Vectors Adaptation of
    Large Language Models. arXiv:2404.02948, 2024.

    Examples
    --------
    >>> import numpy as np
    >>> import rlora
    >>> W0 = np.diag([4.0, 1.0])
    >>> start = rlora.initializers.pissa(W0, 1, scaling=2.0)
    >>> bool(np.allclose(start.base(W0, scaling=2.0), np.diag([0.0, 1.0])))
    True
    """
    check_positive("scaling", scaling)
    U, S, Vt = randomized_svd(weight, rank, **{"iterations": 16, **svd})
    pair = balanced(U, S / scaling, Vt)
    return Start(pair, offset=pair)


@hyperparameters
def milora(weight: Array, rank: int, *, scaling: float = 1.0) -> Start:
    """MiLoRA: the minor part of the weight, by its exact SVD; W0 is offset.

    Parameters
    ----------
    weight : array of shape (..., m, n)
        W0.
    rank : int
        In 1..min(m, n).
    scaling : float
        The s of ``W0 + s B A``, positive.

    Returns
    -------
    Start
        With the pair itself as its offset.

    Raises
    ------
    ShapeError
        When `weight` has fewer than two axes.
    NamespaceError
        When it is no real floating-point array.
    ValueError, TypeError
        When another argument is out of its range or of the wrong type.

    Notes
    -----
    ``B = U (S/s)^½`` and ``A = (S/s)^½ Vᵀ`` of the `rank` least singular triplets of W0, which no
    subspace iteration finds. Factors are as small as those singular values, and zero in the null
    space of W0.

    References
    ----------
    H. Wang, Y. Li, S. Wang, G. Chen, Y. Chen. MiLoRA: Harnessing Minor Singular Components for
    Parameter-Efficient LLM Finetuning. arXiv:2406.09044, 2024.

    Examples
    --------
    >>> import numpy as np
    >>> import rlora
    >>> W0 = np.diag([4.0, 1.0])
    >>> start = rlora.initializers.milora(W0, 1)
    >>> bool(np.allclose(start.base(W0, scaling=1.0), np.diag([4.0, 0.0])))
    True
    """
    check_positive("scaling", scaling)
    _, W = checked_matrix(weight, rank)
    U, S, Vt = randomized_svd(W, min(W.shape[-2:]))
    pair = balanced(U[..., -rank:], S[..., -rank:] / scaling, Vt[..., -rank:, :])
    return Start(pair, offset=pair)


@hyperparameters
def olora(weight: Array, rank: int) -> Start:
    """OLoRA: an orthonormal B from the QR decomposition of the weight; W0 is offset.

    Parameters
    ----------
    weight : array of shape (..., m, n)
        W0.
    rank : int
        In 1..min(m, n).

    Returns
    -------
    Start
        With the pair itself as its offset.

    Raises
    ------
    ShapeError
        When `weight` has fewer than two axes.
    NamespaceError
        When it is no real floating-point array.
    ValueError, TypeError
        When another argument is out of its range or of the wrong type.

    Notes
    -----
    ``B = Q_r`` and ``A = R_r``, the first `rank` columns of Q and rows of R in ``W0 = Q R`` with a
    positive diagonal. Q_r spans the first `rank` columns of W0, so that it is found from those
    alone, and ``A = Q_rᵀ W0``: which input features come first decides. As in PEFT, ``s B A``
    leaves W0 whatever s is.

    References
    ----------
    K. Büyükakyüz. OLoRA: Orthonormal Low-Rank Adaptation of Large Language Models.
    arXiv:2406.01775, 2024.

    Examples
    --------
    >>> import numpy as np
    >>> import rlora
    >>> start = rlora.initializers.olora(np.array([[0.0, 1.0], [-2.0, 3.0]]), 1)
    >>> start.params.A.tolist()
    [[2.0, -3.0]]
    """
    backend, W = checked_matrix(weight, rank)
    xp = backend.xp
    with backend.exact(W):
        Q, R = xp.linalg.qr(W[..., :, :rank])
        corner = xp.linalg.diagonal(R)  # (..., r)
        one = xp.ones_like(corner)
        Q = Q * xp.where(corner < 0, -one, one)[..., None, :]
        pair = Factors(backend.matmul(Q.mT, W), Q)
    return Start(pair, offset=pair)


@hyperparameters
def goat(weight: Array, rank: int, *, experts: int, scaling: float, rho: float = 10.0) -> Start:
    """GOAT: one pair for each expert, from segments of the exact SVD of the weight; W0 is offset.

    Parameters
    ----------
    weight : array of shape (..., m, n)
        W0.
    rank : int
        Of all experts together: in 1..min(m, n), a multiple of `experts`.
    experts : int
        E, at least 1.
    scaling : float
        The s of each expert's ``s B A``, positive; best is `goat_scaling`.
    rho : float
        ρ, positive; larger is smaller factors.

    Returns
    -------
    Start
        A (..., E, r_e, n) and B (..., E, m, r_e) with ``r_e = rank/E``; the offset is one pair of
        rank `rank`.

    Raises
    ------
    ShapeError
        When `weight` has fewer than two axes.
    NamespaceError
        When it is no real floating-point array.
    ValueError, TypeError
        When another argument is out of its range or of the wrong type.

    Notes
    -----
    ``B_i = U_j (S_j/(s ρ))^½`` and ``A_i = (S_j/(s ρ))^½ V_jᵀ``, where j are the r_e triplets from
    ``i floor(min(m, n)/E)`` on. The product of the offset is ``(1/E) Σ B_i A_i``: under a uniform
    router the function stays in expectation.

    References
    ----------
    C. Fan, Z. Lu, S. Liu, C. Gu, X. Qu, W. Wei, Y. Cheng. Make LoRA Great Again: Boosting LoRA with
    Adaptive Singular Values and Mixture-of-Experts Optimization Alignment. arXiv:2502.16894, 2025.

    Examples
    --------
    >>> import numpy as np
    >>> import rlora
    >>> s = rlora.initializers.goat_scaling(6, 2)
    >>> rlora.initializers.goat(np.eye(8, 6), 4, experts=2, scaling=s).params.B.shape
    (2, 8, 2)
    """
    check_positive("scaling", scaling)
    check_positive("rho", rho)
    check_count("experts", experts, 1)
    backend, W = checked_matrix(weight, rank)
    if rank % experts:
        msg = f"rank must be a multiple of the number of experts, got {rank} and {experts}"
        raise ValueError(msg)
    U, S, Vt = randomized_svd(W, min(W.shape[-2:]))
    step, r_e = S.shape[-1] // experts, rank // experts
    parts = [slice(i * step, i * step + r_e) for i in range(experts)]
    pairs = [balanced(U[..., j], S[..., j] / (scaling * rho), Vt[..., j, :]) for j in parts]
    A, B = zip(*pairs, strict=True)
    xp = backend.xp
    stacked = Factors(xp.stack(A, axis=-3), xp.stack(B, axis=-3))
    return Start(stacked, offset=Factors(xp.concat(A, axis=-2), xp.concat(B, axis=-1) / experts))


@hyperparameters
def goat_scaling(n: int, rank: int, *, eta: float = 1.0) -> float:
    """GOAT's scaling s, with which ``E[s² AᵀA] = η I``.

    Parameters
    ----------
    n : int
        Input features, at least 1.
    rank : int
        r_e of one expert, at least 1.
    eta : float
        η, positive: the ratio of the learning rates of full fine-tuning and of the factors.

    Returns
    -------
    float
        ``sqrt(3 η n / r_e)``.

    Raises
    ------
    ValueError, TypeError
        When an argument is out of its range or of the wrong type.

    Notes
    -----
    The mean is over a kaiming-uniform A (r_e, n), whose entries have the variance 1/(3 n).

    References
    ----------
    As in `goat`.

    Examples
    --------
    >>> import rlora
    >>> rlora.initializers.goat_scaling(12, 1)
    6.0
    """
    check_count("n", n, 1)
    check_count("rank", rank, 1)
    check_positive("eta", eta)
    return math.sqrt(3.0 * eta * n / rank)

"""Starts from the gradient G of the loss by W at W0."""

from typing import Literal

from rlora.core.checks import check_choice, check_positive, hyperparameters
from rlora.core.dispatch import get_backend
from rlora.core.factors import Array, Factors
from rlora.initializers.start import Start, balanced
from rlora.initializers.svd import checked_matrix, randomized_svd

OneForm = Literal["algorithm", "theory"]
GAForm = Literal["original", "peft"]


@hyperparameters
def lora_one(
    gradient: Array, rank: int, *, gamma: float = 1 / 128, form: OneForm = "algorithm", **svd: int
) -> Start:
    """LoRA-One: the factors of a step along the negative gradient; W0 stays.

    Parameters
    ----------
    gradient : array of shape (..., m, n)
        G.
    rank : int
        In 1..min(m, n).
    gamma : float
        γ, positive.
    form : {"algorithm", "theory"}
        "algorithm", as the authors' code, divides S by its largest entry first; "theory" does not.
    **svd : int
        `seed`, `oversample` and `iterations` of `randomized_svd`.

    Returns
    -------
    Start
        Without an offset. A zero G gives zero factors, which no method can leave.

    Raises
    ------
    ShapeError
        When `gradient` has fewer than two axes.
    NamespaceError
        When it is no real floating-point array.
    ValueError, TypeError
        When another argument is out of its range or of the wrong type.

    Notes
    -----
    ``B = √γ U S^½`` and ``A = √γ S^½ Vᵀ`` of ``[-G]_r``, so that ``B A = [-γ G]_r`` in the form
    "theory". The two Grams are equal.

    References
    ----------
    Y. Zhang, F. Liu, Y. Chen. LoRA-One: One-Step Full Gradient Could Suffice for Fine-Tuning Large
    Language Models, Provably and Efficiently. arXiv:2502.01235, 2025.

    Examples
    --------
    >>> import numpy as np
    >>> import rlora
    >>> G = np.diag([4.0, 1.0])
    >>> A, B = rlora.initializers.lora_one(G, 1, gamma=1.0, form="theory").params
    >>> bool(np.allclose(B @ A, np.diag([-4.0, 0.0])))
    True
    """
    check_positive("gamma", gamma)
    check_choice("form", form, OneForm)
    U, S, Vt = randomized_svd(gradient, rank, **svd)
    if form == "algorithm":
        xp, top = get_backend(S).xp, S[..., :1]
        S = S / xp.where(top > 0, top, xp.ones_like(top))
    return Start(balanced(U, gamma * S, -Vt))


@hyperparameters
def lora_ga(
    gradient: Array, rank: int, *, gamma: float = 16.0, form: GAForm = "original", **svd: int
) -> Start:
    """LoRA-GA: a pair whose first step of gradient descent goes along ``[G]_2r``; W0 is offset.

    Parameters
    ----------
    gradient : array of shape (..., m, n)
        G.
    rank : int
        In 1..min(m, n)/2. Where the rank of G is `rank` or less, B is noise.
    gamma : float
        γ, positive; larger is smaller factors.
    form : {"original", "peft"}
        "peft" is what PEFT makes of it, and loses the step along ``[G]_2r``.
    **svd : int
        `seed`, `oversample` and `iterations` of `randomized_svd`.

    Returns
    -------
    Start
        With the pair itself as its offset.

    Raises
    ------
    ShapeError
        When `gradient` has fewer than two axes.
    NamespaceError
        When it is no real floating-point array.
    ValueError, TypeError
        When another argument is out of its range or of the wrong type.

    Notes
    -----
    With the singular vectors of G and ``c = m^¼ / √γ``::

        original   A = c V_{1..r}ᵀ    B = c U_{r+1..2r}
        peft       A = V_{1..r}ᵀ      B = c U_{r+1..2r} S_{r+1..2r}

    References
    ----------
    S. Wang, L. Yu, J. Li. LoRA-GA: Low-Rank Adaptation with Gradient Approximation.
    arXiv:2407.05000, 2024.

    Examples
    --------
    >>> import numpy as np
    >>> import rlora
    >>> W0 = np.ones((4, 4))
    >>> start = rlora.initializers.lora_ga(np.diag([4.0, 3.0, 2.0, 1.0]), 2)
    >>> bool(np.allclose(start.base(W0, 2.0) + 2.0 * start.params.B @ start.params.A, W0))
    True
    """
    check_positive("gamma", gamma)
    check_choice("form", form, GAForm)
    checked_matrix(gradient, rank, times=2)
    U, S, Vt = randomized_svd(gradient, 2 * rank, **svd)
    A, B, c = Vt[..., :rank, :], U[..., rank:], U.shape[-2] ** 0.25 / gamma**0.5
    pair = Factors(c * A, c * B) if form == "original" else Factors(A, c * B * S[..., None, rank:])
    return Start(pair, offset=pair)


@hyperparameters
def loi(gradient: Array, rank: int, *, alpha: float = 1.0, **svd: int) -> Start:
    """Riemannion's start: a tangent space that holds ``[G]_2r``; W0 is offset.

    Parameters
    ----------
    gradient : array of shape (..., m, n)
        G.
    rank : int
        In 1..min(m, n)/2.
    alpha : float
        α, positive: the size of A.
    **svd : int
        `seed`, `oversample` and `iterations` of `randomized_svd`.

    Returns
    -------
    Start
        With the pair itself as its offset.

    Raises
    ------
    ShapeError
        When `gradient` has fewer than two axes.
    NamespaceError
        When it is no real floating-point array.
    ValueError, TypeError
        When another argument is out of its range or of the wrong type.

    Notes
    -----
    ``B = U_{1..r}`` and ``A = α V_{r+1..2r}ᵀ`` with the singular vectors of G. The tangent space is
    that of the rank-r matrices at B A.

    References
    ----------
    V. Bogachev, V. Aletov, A. Molozhavenko, D. Bobkov, V. Soboleva, A. Alanov, M. Rakhuba. LoRA
    meets Riemannion: Muon Optimizer for Parametrization-independent Low-Rank Adapters.
    arXiv:2507.12142, 2025.

    Examples
    --------
    >>> import numpy as np
    >>> import rlora
    >>> rlora.initializers.loi(np.diag([4.0, 3.0, 2.0, 1.0]), 2).params.A.shape
    (2, 4)
    """
    check_positive("alpha", alpha)
    checked_matrix(gradient, rank, times=2)
    U, _, Vt = randomized_svd(gradient, 2 * rank, **svd)
    pair = Factors(alpha * Vt[..., rank:, :], U[..., :rank])
    return Start(pair, offset=pair)


@hyperparameters
def lora_sb(gradient: Array, rank: int, *, lr: float, **svd: int) -> Start:
    """LoRA-SB: the factors of a first step of Adam; W0 stays.

    Parameters
    ----------
    gradient : array of shape (..., m, n)
        G.
    rank : int
        In 1..min(m, n).
    lr : float
        The first learning rate of the warm-up to come, positive.
    **svd : int
        `seed`, `oversample` and `iterations` of `randomized_svd`.

    Returns
    -------
    Start
        Without an offset, for a scaling s of 1.

    Raises
    ------
    ShapeError
        When `gradient` has fewer than two axes.
    NamespaceError
        When it is no real floating-point array.
    ValueError, TypeError
        When another argument is out of its range or of the wrong type.

    Notes
    -----
    ``B = U`` and ``A = S Vᵀ`` of ``[-lr sign(G)]_r``. The paper's core R = S stands in A, for A may
    move within its row space.

    References
    ----------
    K. Ponkshe, R. Singhal, E. Gorbunov, A. Tumanov, S. Horvath, P. Vepakomma. Initialization using
    Update Approximation is a Silver Bullet for Extremely Efficient Low-Rank Fine-Tuning.
    arXiv:2411.19557, 2024.

    Examples
    --------
    >>> import numpy as np
    >>> import rlora
    >>> G = np.outer([1.0, -2.0], [3.0, 4.0, 5.0])
    >>> A, B = rlora.initializers.lora_sb(G, 1, lr=0.1).params
    >>> bool(np.allclose(B @ A, [[-0.1] * 3, [0.1] * 3]))
    True
    """
    check_positive("lr", lr)
    backend, G = checked_matrix(gradient, rank)
    U, S, Vt = randomized_svd(backend.xp.sign(G), rank, **svd)
    return Start(Factors(-lr * S[..., :, None] * Vt, U))

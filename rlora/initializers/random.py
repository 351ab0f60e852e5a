"""Random starts, which take only the shape of the weight."""

import numpy as np

from rlora.core.checks import check_count, check_flag, check_positive, hyperparameters
from rlora.core.errors import ShapeError
from rlora.core.factors import Array, Factors, device_of
from rlora.initializers.start import Start
from rlora.initializers.svd import checked_matrix, normal


@hyperparameters
def gaussian(weight: Array, rank: int, *, seed: int = 0) -> Start:
    """The plain start: a Gaussian A, B zero; W0 stays.

    Parameters
    ----------
    weight : array of shape (..., m, n)
        Only its shape, dtype, library and device count.
    rank : int
        At least 1; it may be above m or n.
    seed : int
        At least 0; give each layer one of its own.

    Returns
    -------
    Start
        Without an offset.

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
    Entries of A are drawn from ``N(0, 1/r²)``, as with PEFT's ``init_lora_weights="gaussian"``.

    Examples
    --------
    >>> import numpy as np
    >>> import rlora
    >>> A, B = rlora.initializers.gaussian(np.zeros((6, 4)), 2).params
    >>> A.shape, float(abs(B).max())
    ((2, 4), 0.0)
    """
    backend, W = checked_matrix(weight, rank, times=0)
    check_count("seed", seed, 0)
    A = normal(backend, (*W.shape[:-2], rank, W.shape[-1]), seed, W) / rank
    B = backend.xp.zeros((*W.shape[:-1], rank), dtype=W.dtype, device=device_of(W))
    return Start(Factors(A, B))


@hyperparameters
def init_ab(
    weight: Array, rank: int, *, size: float = 1.0, offset: bool = False, seed: int = 0
) -> Start:
    """Init[AB]: A and B both random; W0 stays, or is offset.

    Parameters
    ----------
    weight : array of shape (..., m, n)
        Only its shape, dtype, library and device count.
    rank : int
        At least 1; it may be above m or n.
    size : float
        Positive; the plain start of PEFT has an A of size 1.
    offset : bool
        Whether the weight takes up the noise, so that the function stays.
    seed : int
        At least 0; give each layer one of its own.

    Returns
    -------
    Start
        With the pair as its offset where that was asked for.

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
    Entries of A and of B are uniform in ``±size/√n``. By the paper's theory of wide layers under
    Adam such a start suffers less from a learning rate that is too low, and in its experiments the
    noise ``s B A`` does no harm where it is not offset.

    References
    ----------
    S. Li, X. Luo, X. Tang, H. Wang, H. Chen, W. Luo, Y. Li, X. He, R. Li. Beyond Zero
    Initialization: Investigating the Impact of Non-Zero Initialization on LoRA Fine-Tuning
    Dynamics. arXiv:2505.23194, 2025.

    Examples
    --------
    >>> import numpy as np
    >>> import rlora
    >>> A, B = rlora.initializers.init_ab(np.zeros((6, 4)), 2).params
    >>> bool(abs(A).max() < 0.5), bool(abs(B).max() < 0.5)
    (True, True)
    """
    backend, W = checked_matrix(weight, rank, times=0)
    check_positive("size", size)
    check_count("seed", seed, 0)
    check_flag("offset", offset)
    rng, n, bound = np.random.default_rng(seed), W.shape[-1], size / W.shape[-1] ** 0.5
    A = rng.uniform(-bound, bound, (*W.shape[:-2], rank, n))
    B = rng.uniform(-bound, bound, (*W.shape[:-1], rank))
    pair = Factors(backend.asarray_like(A, W), backend.asarray_like(B, W))
    return Start(pair, offset=pair if offset else None)


@hyperparameters
def orthogonal(weight: Array, rank: int, *, size: float = 0.1, seed: int = 0) -> Start:
    """A and B random and not zero, with a product of zero; W0 stays.

    Parameters
    ----------
    weight : array of shape (..., m, n)
        Only its shape, dtype, library and device count.
    rank : int
        Even, at least 2; it may be above m or n.
    size : float
        Positive; the default is PEFT's.
    seed : int
        At least 0; give each layer one of its own.

    Returns
    -------
    Start
        Without an offset.

    Raises
    ------
    ShapeError
        When `weight` has fewer than two axes, or `rank` is odd.
    NamespaceError
        When it is no real floating-point array.
    ValueError, TypeError
        When another argument is out of its range or of the wrong type.

    Notes
    -----
    ``A = size Q_1ᵀ N_A`` and ``B = size N_B Q_2`` with Gaussian N_A (r/2, n) and N_B (m, r/2); Q_1
    and Q_2 are the odd and the even rows of an orthogonal Q (r, r), as with PEFT's
    ``init_lora_weights="orthogonal"``. In the basis Q half of the pair has a B of zero and the
    other half an A of zero. Each Gram has rank r/2: to a preconditioner this is a start from zero.

    References
    ----------
    datta0. Rethink LoRA Initialisations for Faster Convergence.
    https://datta0.github.io/posts/rethink-lora-init/, 2024.

    Examples
    --------
    >>> import numpy as np
    >>> import rlora
    >>> A, B = rlora.initializers.orthogonal(np.zeros((6, 4)), 2).params
    >>> bool(abs(A).max() > 0.01), bool(abs(B).max() > 0.01), bool(abs(B @ A).max() < 1e-15)
    (True, True, True)
    """
    backend, W = checked_matrix(weight, rank, times=0)
    check_positive("size", size)
    check_count("seed", seed, 0)
    if rank % 2:
        msg = f"rank must be even for an orthogonal start, got {rank}"
        raise ShapeError(msg)
    rng, lead, (m, n) = np.random.default_rng(seed), W.shape[:-2], W.shape[-2:]
    Q, _ = np.linalg.qr(rng.standard_normal((*lead, rank, rank)))
    A = size * np.swapaxes(Q[..., 0::2, :], -1, -2) @ rng.standard_normal((*lead, rank // 2, n))
    B = size * rng.standard_normal((*lead, m, rank // 2)) @ Q[..., 1::2, :]
    return Start(Factors(backend.asarray_like(A, W), backend.asarray_like(B, W)))

"""A first learning rate from the rank, s, and the size of the frozen weight."""

from math import sqrt
from typing import Final

from rlora.core.checks import check_count, check_positive, check_scaling

SHARE: Final = 0.25
"""The constant of `suggest_lr`: from the study of strings. SmolLM2 agrees in 160 steps, and wants a
half or a quarter of it in 640, which read its data six times."""


def suggest_lr(size: float, *, rank: int, scaling: float = 1.0) -> float:
    """First learning rate to try with `scaled_adamw` at its defaults: ``size / (4 s sqrt(r))``.

    A step of rate lr moves each of the r directions of ``s B A`` by about ``s lr (m n)^¼``, and the
    whole by ``sqrt(r)`` times that in the Frobenius norm. A frozen weight of random entries of
    size σ has singular values up to about ``2 σ (m n)^¼``. For a step that is the same share of
    the weight at every rank, s and shape, lr goes as ``σ / (s sqrt(r))``.

    Parameters
    ----------
    size : float
        σ, the root mean square of the entries of W0; positive.
    rank : int
        r, at least 1.
    scaling : float
        The s of ``W0 + s B A``, alpha / r in most libraries; positive.

    Returns
    -------
    float
        The highest rate of a schedule with a short warm-up.

    Raises
    ------
    ValueError, TypeError
        When a number is out of its range, or no number.

    Notes
    -----
    The constant was chosen in hindsight, the powers were not. The page of the study has the
    settings in which it was tried, and where it fails: it is where a sweep begins.

    Examples
    --------
    >>> import rlora
    >>> rlora.suggest_lr(0.02, rank=16, scaling=2.0)
    0.000625
    """
    check_positive("size", size)
    check_count("rank", rank, 1)
    check_scaling(scaling)
    return SHARE * size / (scaling * sqrt(rank))

"""A linear teacher: weights that are off by a matrix of low rank, and the inputs that show it.

With ``L(W) = |(W - W0 - D) X|² / (2 N)`` the gradient at ``W0 + s B A`` is ``(s B A - D) C``, where
``C = X Xᵀ / N`` is the covariance of the inputs: nothing else of the N samples is needed.
"""

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

Matrix = NDArray[Any]


class Teacher(NamedTuple):
    """NumPy arrays."""

    target: Matrix
    """D (m, n), with singular values from 1 down to 1 / condition."""

    covariance: Matrix
    """C (n, n), of standard normal inputs."""


def draw_teacher(
    rng: np.random.Generator, m: int, n: int, rank: int, condition: float, samples: int
) -> Teacher:
    """Draw a teacher with singular vectors in random directions."""
    U, V = (np.linalg.qr(rng.standard_normal((size, rank)))[0] for size in (m, n))
    X = rng.standard_normal((n, samples))
    return Teacher(U * np.geomspace(1.0, 1.0 / condition, rank) @ V.T, X @ X.T / samples)

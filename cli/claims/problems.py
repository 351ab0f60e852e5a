"""Problems that several claims are tried on: targets of low rank, and linear teachers."""

from collections.abc import Callable, Iterable, Sequence
from itertools import islice
from typing import Any, Final, NamedTuple

import numpy as np
from numpy.typing import NDArray

from rlora import Factors
from rlora.core.backend import Backend
from rlora.core.factors import Array

Matrix = NDArray[Any]

GOAL: Final = 1e-8
"""The relative error at which a run has arrived."""


def factor_gradients(pair: Factors, G: Array) -> Factors:
    """Gradients of the factors, ``Bᵀ G`` and ``G Aᵀ``, by that of the product."""
    return Factors(pair.B.mT @ G, G @ pair.A.mT)


def low_rank(rng: np.random.Generator, m: int, n: int, rank: int, condition: float) -> Matrix:
    """A matrix with singular values from 1 down to 1 / condition, in random directions."""
    U, V = (np.linalg.qr(rng.standard_normal((side, rank)))[0] for side in (m, n))
    product: Matrix = U * np.geomspace(1.0, 1.0 / condition, rank) @ V.T
    return product


def truncated(M: Matrix, r: int) -> Factors:
    """The balanced factors of the best approximation of rank r to M (..., m, n)."""
    U, sigma, Vt = np.linalg.svd(M, full_matrices=False)
    root = np.sqrt(sigma[..., :r])
    return Factors(root[..., :, None] * Vt[..., :r, :], U[..., :r] * root[..., None, :])


class Teacher(NamedTuple):
    """Weights that are off by a matrix of low rank, and the inputs that show it.

    With ``L(W) = |(W - W0 - D) X|² / (2 N)`` the gradient at ``W0 + B A`` is ``(B A - D) C``: of
    the N samples nothing but the covariance is needed.
    """

    target: Matrix
    """D (m, n)."""

    covariance: Matrix
    """C (n, n) = X Xᵀ / N, of standard normal inputs."""


def draw_teacher(
    rng: np.random.Generator, m: int, n: int, rank: int, condition: float, samples: int
) -> Teacher:
    """Draw a teacher."""
    target = low_rank(rng, m, n, rank, condition)
    X = rng.standard_normal((n, samples))
    return Teacher(target, X @ X.T / samples)


def errors(backend: Backend, path: Iterable[Factors], target: Array, most: int) -> list[float]:
    """``|B A - M| / |M|`` from the start to the goal, or for so many iterations."""
    norm: Callable[[Array], Array] = backend.xp.linalg.vector_norm
    found: list[float] = []
    for pair in islice(path, most + 1):
        found.append(float(norm(pair.B @ pair.A - target) / norm(target)))
        if not GOAL < found[-1] < float("inf"):
            break
    return found


def iterations(found: Sequence[float]) -> float:
    """Return how many steps it took; inf for a run that has not arrived."""
    return len(found) - 1 if found[-1] <= GOAL else float("inf")


def exponent(x: Sequence[float], y: Sequence[float]) -> float:
    """The power of x that fits y best."""
    return float(np.polyfit(np.log(x), np.log(y), 1)[0])

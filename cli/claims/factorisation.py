"""``½ |B A - M|²`` for a target M whose condition number is chosen."""

from collections.abc import Callable, Iterable, Sequence
from itertools import islice
from typing import Any, Final, NamedTuple

import numpy as np

from rlora import Factors
from rlora.core.algebra import mT
from rlora.core.backend import Backend
from rlora.core.factors import Array

from .claim import Setting

GOAL: Final = 1e-8
"""The relative error at which a run has arrived."""


class Factorisation(NamedTuple):
    """A target with its two starts, as arrays of a backend."""

    target: Array
    spectral: Factors
    """The best factors of ``M + N``, where N is a tenth of the smallest singular value of M."""
    lora: Factors
    """B = 0 and A random, as fine-tuning starts."""

    def grads(self, pair: Factors) -> Factors:
        """``Bᵀ G`` and ``G Aᵀ`` with ``G = B A - M``."""
        G = pair.B @ pair.A - self.target
        return Factors(mT(pair.B) @ G, G @ mT(pair.A))


def factorisation(setting: Setting, condition: float) -> Factorisation:
    """A target of shape (60, 50) and rank 5, its singular values from 1 down to 1 / condition."""
    rng = np.random.default_rng(0)
    m, n, r = 60, 50, 5
    U, V = (np.linalg.qr(rng.normal(size=(side, r)))[0] for side in (m, n))
    M = U * singular_values(condition) @ V.T
    N = rng.normal(size=(m, n))
    spectral = truncated(M + 0.1 / condition * N / np.linalg.norm(N, 2), r)
    lora = Factors(rng.normal(size=(r, n)) / n**0.5, np.zeros((m, r)))
    return Factorisation(
        setting.array(M),
        *(Factors(*map(setting.array, start)) for start in (spectral, lora)),
    )


def singular_values(condition: float) -> Any:
    """Those of the target."""
    return np.geomspace(1.0, 1.0 / condition, 5)


def truncated(M: Any, r: int) -> Factors:
    """The balanced factors of the best approximation of rank r to M (..., m, n)."""
    U, sigma, Vt = np.linalg.svd(M, full_matrices=False)
    root = np.sqrt(sigma[..., :r])
    return Factors(root[..., :, None] * Vt[..., :r, :], U[..., :r] * root[..., None, :])


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

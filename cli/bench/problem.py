"""Problems to time steps on: factors and gradients, as NumPy arrays."""

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from rlora import Factors

from .presets import Shape

Shapes = Mapping[tuple[int, int, int], int]
"""Number of pairs of each m, n, r."""

GRADIENT_SCALE = 1e-2
B_SCALE = 1e-2
"""Not zero, as B is at a start: of a zero factor every step would be the damping's alone."""


class Problem(NamedTuple):
    """Equal work for every case."""

    pairs: list[Factors]
    grads: list[Factors]

    @property
    def rank(self) -> int | list[int]:
        """The rank, or every one that occurs."""
        ranks = sorted({pair.A.shape[0] for pair in self.pairs})
        return ranks[0] if len(ranks) == 1 else ranks

    @property
    def shapes(self) -> Shapes:
        """The shapes alone, for those who outlive the arrays."""
        return Counter((B.shape[0], A.shape[1], A.shape[0]) for A, B in self.pairs)

    @property
    def parameters(self) -> int:
        """Numbers in all factors together."""
        return sum(pair.A.size + pair.B.size for pair in self.pairs)


def random_problem(shapes: Sequence[Shape], rank: int, seed: int) -> Problem:
    """Factors of full rank for weights of these shapes: A ~ N(0, 1/n), B ~ N(0, 1e-4)."""
    smallest = min(min(shape) for shape in shapes)
    if rank > smallest:
        msg = f"rank {rank} is more than {smallest}, the smallest side of the weights to adapt"
        raise ValueError(msg)
    rng = np.random.default_rng(seed)
    pairs = [
        Factors(_normal(rng, (rank, n), n**-0.5), _normal(rng, (m, rank), B_SCALE))
        for m, n in shapes
    ]
    return with_gradients(pairs, seed)


def with_gradients(pairs: Sequence[Factors], seed: int) -> Problem:
    """Factors as they are, with gradients ~ N(0, 1e-4)."""
    rng = np.random.default_rng([seed, 1])
    grads = [
        Factors(*(_normal(rng, x.shape, GRADIENT_SCALE) for x in (pair.A, pair.B)))
        for pair in pairs
    ]
    return Problem(list(pairs), grads)


def _normal(rng: np.random.Generator, shape: tuple[int, ...], scale: float) -> NDArray[np.float32]:
    return np.float32(scale) * rng.standard_normal(shape, np.float32)

"""A larger step for B while it is small, an experiment of the study."""

from typing import Final

from torch import Tensor

from rlora import Factors, Transform
from rlora.core.factors import Tree, map_pairs
from rlora.core.transform import State

MOST: Final = 16.0
"""The ratio of LoRA+, by which B is favoured at most."""


def favour_b(inner: Transform, most: float = MOST) -> Transform:
    """Any method, with its direction for B times a ratio that falls to 1 as B grows.

    At a start with ``B = 0`` only B moves the product, and a learning rate that is too low loses
    most there. For each layer the direction of B is multiplied by ``|A| / |B|``, root mean squares
    of the entries, between 1 and `most`. The ratio depends on how the product is split between
    the factors: no invariant method stays one.

    Parameters
    ----------
    inner : Transform
        Any method for tensors that moves both factors.
    most : float
        At least 1.

    Returns
    -------
    Transform
        State: that of `inner`.
    """

    def favour(d: Factors, pair: Factors) -> Factors:
        ratio = size(pair.A) / size(pair.B).clamp(min=1e-30)
        return Factors(d.A, d.B * ratio.clamp(1.0, most))

    def update(grads: Tree, state: State, params: Tree) -> tuple[Tree, State]:
        direction, state = inner.update(grads, state, params)
        return map_pairs(favour, direction, params), state

    return inner._replace(update=update)


def size(x: Tensor) -> Tensor:
    """Root mean square of the entries of each matrix, (..., 1, 1)."""
    found: Tensor = x.float().square().mean((-2, -1), keepdim=True).sqrt()
    return found

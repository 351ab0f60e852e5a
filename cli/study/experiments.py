"""Methods that are tried here and are not public: the study says what they are worth."""

from typing import Final

from torch import Tensor

from rlora import Factors, Transform, chain
from rlora.core.factors import Array, Tree, map_leaves, map_pairs
from rlora.core.moments import AdamState, counts, zeros
from rlora.core.transform import State

MOST: Final = 16.0
"""The ratio of LoRA+, by which B is favoured at most."""

POWER: Final = 0.8


def favour_b(inner: Transform) -> Transform:
    """Any method, with its direction for B times a ratio that falls to 1 as B grows.

    At a start with ``B = 0`` only B moves the product, and a learning rate that is too low loses
    most there. For each layer the direction of B is multiplied by ``|A| / |B|``, root mean squares
    of the entries, between 1 and `MOST`. The ratio depends on how the product is split between
    the factors: no invariant method stays one.
    """

    def size(x: Tensor) -> Tensor:
        return x.float().square().mean((-2, -1), keepdim=True).sqrt()

    def favour(d: Factors, pair: Factors) -> Factors:
        ratio = size(pair.A) / size(pair.B).clamp(min=1e-30)
        return Factors(d.A, d.B * ratio.clamp(1.0, MOST))

    def update(grads: Tree, state: State, params: Tree) -> tuple[Tree, State]:
        direction, state = inner.update(grads, state, params)
        return map_pairs(favour, direction, params), state

    return inner._replace(update=update)


def scale_by_growing_adam(b1: float) -> Transform:
    """Adam's direction with ``b2 = 1 - t^-0.8`` at step t, a memory that grows with the run.

    ``M <- b1 M + (1 - b1) G``, ``V <- b2 V + (1 - b2) G∘G``; the direction is
    ``M / (1 - b1^t) / (sqrt(V) + 1e-8)``. V needs no correction, as the first step has ``b2 = 0``.

    References
    ----------
    N. Shazeer, M. Stern. Adafactor: Adaptive Learning Rates with Sublinear Memory Cost.
    arXiv:1804.04235, 2018.
    """

    def init(params: Tree, scaling: float = 1.0) -> AdamState:
        return AdamState(zeros(params), zeros(params), counts(params))

    def second(V: Array, G: Array, t: Array) -> Array:
        return V + t[..., None, None] ** -POWER * (G * G - V)

    def direction(M: Array, V: Array, t: Array) -> Array:
        return M / (1 - b1 ** t[..., None, None]) / (V**0.5 + 1e-8)

    def update(grads: Tree, state: State, params: Tree) -> tuple[Tree, AdamState]:
        count = map_leaves(lambda t: t + 1, state.count)
        mu = map_leaves(lambda M, G: b1 * M + (1 - b1) * G, state.mu, grads)
        nu = map_leaves(second, state.nu, grads, count)
        return map_leaves(direction, mu, nu, count), AdamState(mu, nu, count)

    return chain(Transform(init, update))

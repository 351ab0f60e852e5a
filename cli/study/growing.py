"""Adam with a second moment whose memory grows with the run, an experiment of the study."""

from typing import Final

from rlora import Transform, chain
from rlora.core.factors import Array, Tree, map_leaves
from rlora.core.moments import AdamState, counts, zeros
from rlora.core.transform import State

POWER: Final = 0.8


def scale_by_growing_adam(b1: float, eps: float = 1e-8) -> Transform:
    """Adam's direction with ``b2 = 1 - t^-0.8`` at step t.

    ``M <- b1 M + (1 - b1) G``, ``V <- b2 V + (1 - b2) G∘G``; the direction is
    ``M / (1 - b1^t) / (sqrt(V) + eps)``. V needs no correction, as the first step has ``b2 = 0``.

    Parameters
    ----------
    b1, eps : float
        As for `rlora.core.moments.scale_by_adam`.

    Returns
    -------
    Transform
        For factors that all have gradients. State: two arrays a factor and its step count.

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
        return M / (1 - b1 ** t[..., None, None]) / (V**0.5 + eps)

    def update(grads: Tree, state: State, params: Tree) -> tuple[Tree, AdamState]:
        count = map_leaves(lambda t: t + 1, state.count)
        mu = map_leaves(lambda M, G: b1 * M + (1 - b1) * G, state.mu, grads)
        nu = map_leaves(second, state.nu, grads, count)
        return map_leaves(direction, mu, nu, count), AdamState(mu, nu, count)

    return chain(Transform(init, update))

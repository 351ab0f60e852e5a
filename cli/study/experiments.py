"""Methods that are tried here and are not public: the study says what they are worth."""

from collections.abc import Mapping
from typing import Final

from torch import Tensor

from rlora import Factors, Transform, chain
from rlora.core.factors import Array, Tree, counterparts, map_leaves, map_pairs, rebuild
from rlora.core.moments import AdamState, counts, zeros
from rlora.core.transform import State

MOST: Final = 16.0
"""The ratio of LoRA+, by which B is favoured at most."""

POWER: Final = 0.8


def trust_region(inner: Transform, bounds: float | Mapping[str, float]) -> Transform:
    """Any method, with steps cut so that no product B A moves far.

    With the direction D of `inner` and the learning rate η, the fraction t of a step moves the
    product of a layer, B of shape (m, r) and A (r, n), by ::

        Δ(t) = -t η (B D_A + D_B A) + t² η² D_B D_A

    of which the root mean square of the entries is at most ``t f + t² q`` with ::

        f = η |B D_A + D_B A|_F / sqrt(m n)
        q = η² |D_B D_A|_F / sqrt(m n)

    The step has the largest t in (0, 1] for which that is at most the bound ρ::

        t = min(1, 2 ρ / (f + sqrt(f² + 4 ρ q)))

    f and q are those of the product, so that t is invariant if `inner` is. The bound, of all layers
    or of each by its key, is a share of the size of W0, divided by the s of ``W0 + s B A``.
    """
    move = inner.apply

    def apply(params: Tree, direction: Tree, lr: Array | float) -> Tree:
        def cut(pair: Factors, d: Factors, bound: float) -> Factors:
            t = fraction(pair, Factors(lr * d.A, lr * d.B), bound)
            return Factors(t * d.A, t * d.B)

        each = bounds if isinstance(bounds, Mapping) else map_pairs(lambda _: bounds, params)
        pieces = zip(*(counterparts(params, x) for x in (params, direction, each)), strict=True)
        return move(params, rebuild(params, [cut(*piece) for piece in pieces]), lr)

    return inner._replace(apply=apply)


def fraction(pair: Factors, step: Factors, bound: float) -> Tensor:
    """The t of `trust_region`, (..., 1, 1)."""
    (A, B), (a, b) = pair, step
    A, B = A.to(a.dtype), B.to(b.dtype)

    def mean(X: Tensor, Y: Tensor) -> Tensor:
        found: Tensor = (X * Y).sum((-2, -1), keepdim=True) / (A.shape[-1] * B.shape[-2])
        return found

    outer, moved = a @ a.mT, b.mT @ b
    first = mean(B.mT @ B, outer) + mean(moved, A @ A.mT) + 2 * mean(b.mT @ B, A @ a.mT)
    f, q = (x.clamp(min=0.0).sqrt() for x in (first, mean(moved, outer)))  # rounding may leave less
    t: Tensor = 2 * bound / (f + (f**2 + 4 * bound * q).sqrt())
    return t.clamp(max=1.0)


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


def scale_by_growing_adam(b1: float, eps: float = 1e-8) -> Transform:
    """Adam's direction with ``b2 = 1 - t^-0.8`` at step t, a memory that grows with the run.

    ``M <- b1 M + (1 - b1) G``, ``V <- b2 V + (1 - b2) G∘G``; the direction is
    ``M / (1 - b1^t) / (sqrt(V) + eps)``. V needs no correction, as the first step has ``b2 = 0``.

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

"""A trust region on what a step does to the product, an experiment of the study.

It is no public method: the study says what it is worth.
"""

from collections.abc import Mapping

from torch import Tensor

from rlora import Factors, Transform
from rlora.core.factors import Array, Tree, counterparts, map_pairs, rebuild


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

    f and q are those of the product, so that t is invariant if `inner` is.

    Parameters
    ----------
    inner : Transform
        Any method for tensors that moves both factors, along a straight line.
    bounds : float, or dict of them with the keys of the parameters
        ρ of each layer, positive: a share of the size of W0, divided by the s of ``W0 + s B A``.

    Returns
    -------
    Transform
        State: that of `inner`.
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

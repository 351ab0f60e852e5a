"""Trust region: no step moves the product of a pair by more than a bound."""

from typing import Any

from rlora.core.algebra import mT
from rlora.core.checks import check_positive, hyperparameters
from rlora.core.decay import add_decayed_weights
from rlora.core.dispatch import get_backend
from rlora.core.factors import Array, Factors, Tree, map_pairs
from rlora.core.moments import scale_by_adam
from rlora.core.sizes import shrink_to
from rlora.core.transform import Transform, chain, still_at_zero


@hyperparameters
def trust_region(
    inner: Transform | None = None,
    *,
    bound: float = 1e-2,
    b1: float = 0.7,
    b2: float = 0.8,
    eps: float = 1e-8,
    weight_decay: float = 0.0,
) -> Transform:
    """Any method, with steps cut so that no product B A moves far.

    With A (r, n), B (m, r), the direction D of `inner` and the learning rate lr, the fraction t of
    a step moves the product by ``-t lr (B D_A + D_B A) + t² lr² D_B D_A``. With ``|X|`` the root
    mean square of the entries ::

        f = lr |B D_A + D_B A|                     q = lr² |D_B D_A|
        t = min(1, 2 bound / (f + sqrt(f² + 4 bound q)))
        A <- A - t lr D_A                          B <- B - t lr D_B

    t is the largest fraction with ``t f + t² q <= bound``, so the product moves by the bound at
    most. f and q are those of the product: where `inner` is invariant, so is this.

    Parameters
    ----------
    inner : Transform, optional
        Any method; AdamW with the following hyperparameters by default.
    bound : float
        The most that the entries of B A move in a step, in the root mean square; positive. A share
        of W0 in ``W0 + s B A`` is that share of the size of its entries, divided by s: the default
        is 1 % for entries of size 1 and s = 1, and without effect on the usual small ones.
    b1, b2, eps, weight_decay
        Of the default AdamW; without effect on an `inner` that is given. Decay that is a part of
        the direction is cut with it.

    Returns
    -------
    Transform
        State: that of `inner`.

    Raises
    ------
    ValueError, TypeError
        When a hyperparameter is out of its range or of the wrong type.

    Notes
    -----
    One t for both factors of a pair, each pair its own, so that the direction stays what it was. It
    bounds a single step and not the sum of many. A learning rate of 0 changes nothing.

    Adafactor clips the root mean square of a parameter's update. Of factors that would depend on
    the split of the product; the t of the product's change is derived here.

    References
    ----------
    N. Shazeer, M. Stern. Adafactor: Adaptive Learning Rates with Sublinear Memory Cost.
    arXiv:1804.04235, 2018.

    Examples
    --------
    >>> import rlora
    >>> method = rlora.trust_region(bound=1e-4)
    >>> scaled = rlora.trust_region(rlora.scaled_adamw(), bound=1e-4)
    """
    check_positive("bound", bound)
    adamw = chain(scale_by_adam(b1, b2, eps), add_decayed_weights(weight_decay))
    inner = adamw if inner is None else inner
    move = inner.apply

    def apply(params: Tree, direction: Tree, lr: Array | float) -> Tree:
        def cut(pair: Factors, d: Factors) -> Factors:
            if d.A is None and d.B is None:
                return d
            t = fraction(pair, Factors(*(None if x is None else lr * x for x in d)), bound)
            return Factors(*(None if x is None else t * x for x in d))

        return move(params, map_pairs(cut, params, direction), lr)

    return inner._replace(apply=still_at_zero(apply), sharded=False)


def fraction(pair: Factors, step: Factors, bound: float) -> Array:
    """The t of `trust_region` for a step of a pair, (..., 1, 1); None in a step is zero.

    ``B D_A + D_B A`` is ``[B D_B] [D_A; A]``, so that its squared norm is the inner product of two
    Grams of (2r, 2r). Its terms do not change as B is divided and D_A multiplied by a number, nor
    as A and D_B are: so all squares are of numbers of at most 1.
    """
    backend = get_backend(*pair)
    xp, dtype = backend.xp, backend.compute_dtype(pair.A.dtype)
    A, B = (backend.cast(x, dtype) for x in pair)
    changes = zip(step, (A, B), strict=True)
    a, b = (xp.zeros_like(p) if x is None else backend.cast(x, dtype) for x, p in changes)
    peak_A, peak_B = _peak(xp, A), _peak(xp, B)
    a, b = peak_B * a, peak_A * b
    peak = xp.maximum(_peak(xp, a), _peak(xp, b))
    with backend.exact(A):
        rows = xp.concat([a / peak, A / peak_A], axis=-2)
        columns = xp.concat([B / peak_B, b / peak], axis=-1)
        of_rows = backend.matmul(rows, mT(rows))
        of_columns = backend.matmul(mT(columns), columns)
    r, entries = A.shape[-2], A.shape[-1] * B.shape[-2]

    def size(K: Array, L: Array) -> Array:  # rounding may leave less than zero
        square = xp.sum(K * L, axis=(-2, -1), keepdims=True) / entries
        return xp.sqrt(xp.clip(square, min=0.0))

    f = peak * size(of_rows, of_columns)
    q = size(of_rows[..., :r, :r], of_columns[..., r:, r:])
    g = 2 * peak * xp.sqrt(bound * q) / (xp.sqrt(peak_A) * xp.sqrt(peak_B))
    largest = xp.maximum(f, g)
    unit = xp.where(largest > 0, largest, xp.ones_like(largest))
    longest = unit * xp.sqrt((f / unit) ** 2 + (g / unit) ** 2)
    return shrink_to(xp, 2 * bound, f + longest)


def _peak(xp: Any, x: Array) -> Array:
    """The largest magnitude, (..., 1, 1), and 1 where all are zero."""
    peak = xp.max(xp.abs(x), axis=(-2, -1), keepdims=True)
    return xp.where(peak > 0, peak, xp.ones_like(peak))

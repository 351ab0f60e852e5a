"""Trust region: no step moves the product of a pair by more than a bound."""

from rlora.core.checks import check_positive, hyperparameters
from rlora.core.dispatch import get_backend
from rlora.core.factors import Array, Factors, Tree, map_pairs
from rlora.core.inner import check_jacobi, inner_or_adamw
from rlora.core.sizes import shrink_to
from rlora.core.transform import Transform, still_at_zero


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
    most, before it is rounded to the parameters' dtype. f and q are those of the product: where
    `inner` is invariant, so is this.

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
        When a hyperparameter is out of its range or of the wrong type, or `inner` moves one factor
        after the other.

    Notes
    -----
    One t for both factors of a pair, each pair its own, so that the direction stays what it was. It
    bounds a single step and not the sum of many. What `inner` does beside its step comes on top:
    the decay of `lora_muon`, `riemannion`, `op_lora` and of ``decay="after"``, the shrinking of
    `stable_lora`. bfloat16 factors lose, or gain by stochastic rounding, more than a small bound.
    Where a step hardly changes the product in first order, rounding leaves f known to about
    ``ε^½ lr |B D_A|`` only, and the product may move by as much beyond the bound.

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
    inner = inner_or_adamw(inner, b1, b2, eps, weight_decay)
    check_jacobi("trust_region", inner)
    move = inner.apply

    def apply(params: Tree, direction: Tree, lr: Array | float) -> Tree:
        def cut(pair: Factors, d: Factors) -> Factors:
            if d.A is None and d.B is None:
                return d
            t = fraction(pair, Factors(*(None if x is None else lr * x for x in d)), bound)
            return Factors(*(None if x is None else t * x for x in d))

        return move(params, map_pairs(cut, params, direction), lr)

    # Norms are of whole factors: pieces would have to be summed.
    return inner._replace(apply=still_at_zero(apply), sharded=False)


def fraction(pair: Factors, step: Factors, bound: float) -> Array:
    """The t of `trust_region` for a step of a pair, (..., 1, 1); None in a step is zero.

    All four matrices are divided by their largest entries first, so that no square overflows, and
    none is lost beside a larger one.
    """
    backend = get_backend(*pair)
    xp, dtype = backend.xp, backend.compute_dtype(pair.A.dtype)
    A, B = (backend.cast(x, dtype) for x in pair)
    changes = zip(step, (A, B), strict=True)
    a, b = (xp.zeros_like(p) if x is None else backend.cast(x, dtype) for x, p in changes)
    info = xp.finfo(dtype)
    least, most = float(info.smallest_normal), float(info.max) / 4
    sizes = [xp.max(xp.abs(x), axis=(-2, -1), keepdims=True) for x in (A, B, a, b)]
    sizes = [xp.clip(x, min=least, max=most) for x in sizes]
    A, B, a, b = (x / size for x, size in zip((A, B, a, b), sizes, strict=True))

    def product(x: Array, y: Array) -> Array:
        return x * xp.minimum(y, most / xp.clip(x, min=1.0))

    of_A, of_B, of_a, of_b = sizes
    first, second = product(of_B, of_a), product(of_A, of_b)  # of B D_A, of D_B A
    unit = xp.clip(xp.maximum(first, second), min=least)
    ones = xp.ones_like(a[..., :1])
    shares = xp.concat([first / unit * ones, second / unit * ones], axis=-2)  # (..., 2r, 1)
    r, entries = A.shape[-2], A.shape[-1] * B.shape[-2]
    with backend.exact(A):  # [B D_B] [D_A; A], whose squared norm is that of two Grams (2r, 2r)
        rows, columns = xp.concat([a, A], axis=-2), xp.concat([B, b], axis=-1)
        K, L = backend.matmul(rows, rows.mT), backend.matmul(columns.mT, columns)

    def size(K: Array, L: Array) -> Array:  # rounding may leave less than zero
        square = xp.sum(K * L, axis=(-2, -1), keepdims=True) / entries
        return xp.sqrt(xp.clip(square, min=0.0))

    f = product(unit, size(K * shares * shares.mT, L))
    root = xp.sqrt(bound * size(K[..., :r, :r], L[..., r:, r:]))
    g = 2 * product(xp.sqrt(of_a) * xp.sqrt(of_b), root)
    largest = xp.clip(xp.maximum(f, g), min=least)
    length = largest * xp.sqrt((f / largest) ** 2 + (g / largest) ** 2)
    t = shrink_to(xp, 2 * bound, f + length)
    return xp.where(xp.maximum(unit, largest) >= most / 2, xp.zeros_like(t), t)  # out of range

"""Every verb of the arithmetic, complete on any Array-API namespace.

A file in ``backends/`` may override any of them with something quicker; none is ever needed.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

from rlora.core.errors import BackendError, NamespaceError
from rlora.core.factors import Array, device_of

ROUNDING = 10
"""A Gram formed in precision eps has eigenvalues uncertain by about eps * trace; ten times that
keeps every factorisation of a rank-deficient Gram away from zero."""

Workspace = dict[Any, Any]
"""What a backend keeps from one call to the next with factors of the same shapes: memory that it
writes into and hands out again, and where everything lies. A caller makes it as an empty dict."""

Tall = Sequence[Array]
"""Factors, or what has their shapes."""


class Backend:
    """Every verb the methods need, written with nothing but the Array API.

    The tall verbs take lists of factors, of any outer size and with any leading axes; the small
    algebra sees one stack (K, r, r) for all factors of one rank, K counting every layer of them.

    Parameters
    ----------
    xp : module
        The array namespace, as array-api-compat gives it.
    name : str
        First word of the namespace: "numpy", "torch", "jax", ...
    """

    def __init__(self, xp: Any, name: str) -> None:
        self.xp = xp
        self.name = name

    # --- tall work: O((m + n) r^2) per pair --------------------------------------------------

    def gram_rows(
        self, tall: Sequence[Array], dtype: Any, workspace: Workspace | None = None
    ) -> Array:
        """``A Aᵀ`` for every (..., r, n) of the list, as one stack (K, r, r)."""
        return self.cross_rows(tall, tall, dtype)

    def gram_columns(
        self, tall: Sequence[Array], dtype: Any, workspace: Workspace | None = None
    ) -> Array:
        """``Bᵀ B`` for every (..., m, r) of the list, as one stack (K, r, r)."""
        return self.gram_rows([mT(B) for B in tall], dtype, workspace)

    def cross_rows(self, X: Sequence[Array], Y: Sequence[Array], dtype: Any) -> Array:
        """``X Yᵀ`` for every (..., r, n) of two lists of equal shapes, as one stack (K, r, r)."""
        products = []
        for x, y in zip(X, Y, strict=True):
            C = self.matmul(self.cast(x, dtype), mT(self.cast(y, dtype)))  # (..., r, r)
            products.append(self.xp.reshape(C, (-1, *C.shape[-2:])))
        return self.xp.concat(products)

    def apply_left(
        self, P: Tall, tall: Tall, workspace: Workspace | None = None, onto: Tall | None = None
    ) -> list[Array]:
        """``P G`` for each (..., r, r) and (..., r, n) of the lists, plus `onto`, which is lost."""
        products = [self.matmul(p, self.cast(G, p.dtype)) for p, G in zip(P, tall, strict=True)]
        return products if onto is None else [x + z for x, z in zip(products, onto, strict=True)]

    def apply_right(
        self, tall: Tall, P: Tall, workspace: Workspace | None = None, onto: Tall | None = None
    ) -> list[Array]:
        """``G P`` for each (..., m, r) and (..., r, r) of the lists, plus `onto`, which is lost."""
        products = [self.matmul(self.cast(G, p.dtype), p) for p, G in zip(P, tall, strict=True)]
        return products if onto is None else [x + z for x, z in zip(products, onto, strict=True)]

    def within(self, X: Tall, low: float, high: float) -> bool:
        """Whether each largest magnitude is known, without a wait, to be 0 or in [low, high)."""
        return False

    # --- small work: r x r, batched over the whole model ---------------------------------------

    def spd_power(self, S: Array, power: float) -> Array:
        """``S^power`` of symmetric positive definite matrices (K, r, r) with trace about r."""
        w, Q = self.eigh(S)
        # Rounding can push an eigenvalue of a semidefinite matrix below zero; the floor is far
        # below anything `damped_power` lets through.
        w = self.xp.clip(w, min=float(self.xp.finfo(S.dtype).eps) ** 2)
        return self.matmul(Q * self.xp.expand_dims(w**power, axis=-2), mT(Q))

    def eigh(self, S: Array) -> tuple[Array, Array]:
        """Eigenvalues (K, r), ascending, and eigenvectors (K, r, r) of symmetric matrices.

        A member that is not finite has NaN eigenvalues; LAPACK may refuse a whole stack for it.
        """
        xp = self.xp
        finite = xp.all(xp.isfinite(S), axis=(-2, -1), keepdims=True)  # (K, 1, 1)
        eye = xp.eye(S.shape[-1], dtype=S.dtype, device=device_of(S))
        w, Q = xp.linalg.eigh(xp.where(finite, S, eye))
        return xp.where(finite[..., 0], w, xp.full_like(w, float("nan"))), Q

    def svd(self, X: Array) -> tuple[Array, Array, Array]:
        """The thin ``U, sigma, Vᵀ``; a member that is not finite has NaN singular values."""
        xp = self.xp
        finite = xp.all(xp.isfinite(X), axis=(-2, -1), keepdims=True)
        U, sigma, Vt = xp.linalg.svd(xp.where(finite, X, xp.zeros_like(X)), full_matrices=False)
        return U, xp.where(finite[..., 0], sigma, xp.full_like(sigma, float("nan"))), Vt

    def qr(self, X: Array) -> tuple[Array, Array]:
        """The thin ``Q R`` of (..., m, n)."""
        Q, R = self.xp.linalg.qr(X)
        return Q, R

    def damped_power(
        self,
        S: Array,
        exponent: float,
        damping: float = 0.0,
        *,
        relative: bool = True,
        least: float = 0.0,
    ) -> Array:
        """``(S + shift I)^exponent`` for a stack (K, r, r) of Grams, each member by itself.

        The shift is ``damping tr(S)/r`` or ``damping``, and never below ``least tr(S)/r`` nor
        ``10 eps tr(S)``, what the rounding of the Gram itself can carry.

        Each member is scaled to trace r first, so that no factor leaves the range of the dtype. A
        member whose trace is zero or too small to be inverted gives 0: a zero factor does not move
        its partner. An overflown one gives 0 too, the limit; NaN gives NaN, for itself alone.
        """
        xp, r, info = self.xp, S.shape[-1], self.xp.finfo(S.dtype)
        rounding = ROUNDING * r * float(info.eps)
        mean = xp.reshape(xp.linalg.trace(S), (-1, 1, 1)) / r  # (K, 1, 1), the mean eigenvalue
        floor = max(rounding, least)
        ratio = xp.clip(damping * xp.ones_like(mean), min=floor)
        shift = ratio * mean if relative else xp.clip(floor * mean, min=damping)
        scale = mean + shift
        live = (scale > float(info.smallest_normal) / rounding) & (scale < float(info.max))
        unit = xp.where(live, scale, xp.ones_like(scale))
        eye = xp.eye(r, dtype=S.dtype, device=device_of(S))
        shift = xp.where(live, shift, xp.zeros_like(scale))  # inf times 0 is NaN
        H = xp.where(live, (S + shift * eye) / unit, eye)  # (K, r, r)
        dead = xp.where(xp.isnan(scale), scale, xp.zeros_like(scale))
        return xp.where(live, self.spd_power(H, exponent) * unit**exponent, dead)

    def pseudo_power(self, S: Array, exponent: float) -> Array:
        """``S^exponent`` for a stack (K, r, r) of Grams, 0 in directions that are lost in rounding.

        For methods that normalise what they see: a direction without mass, damped or not, would
        come back as large as the others.
        """
        xp, r, info = self.xp, S.shape[-1], self.xp.finfo(S.dtype)
        rounding = ROUNDING * r * float(info.eps)
        mean = xp.reshape(xp.linalg.trace(S), (-1, 1, 1)) / r
        zero = mean <= float(info.smallest_normal) / rounding  # or too small, as in `damped_power`
        unit = xp.where(zero, xp.ones_like(mean), mean)
        w, Q = self.eigh(xp.where(zero, xp.zeros_like(S), S / unit))
        gone = w <= rounding
        power = xp.where(gone, xp.zeros_like(w), xp.where(gone, xp.ones_like(w), w) ** exponent)
        return self.matmul(Q * xp.expand_dims(power, axis=-2), mT(Q)) * unit**exponent

    def inverse_root(self, V: Array, shift: Array, eps: float) -> Array:
        """``((V + shift I)^½ + eps I)⁻¹`` of semidefinite V (K, r, r) and shifts (K, 1, 1).

        An eigenvalue of V below what rounding has left of it counts as that rounding.
        """
        xp = self.xp
        w, Q = self.eigh(V)
        trace = xp.sum(w, axis=-1, keepdims=True)
        floor = ROUNDING * float(xp.finfo(V.dtype).eps) * xp.clip(trace, min=0.0)
        root = xp.sqrt(xp.maximum(w, floor) + shift[..., 0]) + eps
        return self.matmul(Q / xp.expand_dims(root, axis=-2), mT(Q))

    def newton_schulz(self, S: Array) -> tuple[Array, Array]:
        """``S^-½`` and ``S^½`` of definite (K, r, r) by products alone; 0 and 0 for a zero.

        ``T = (3 I - Z Y) / 2, Y <- Y T, Z <- T Z`` from ``Y = S / tr S, Z = I``. The root of an
        eigenvalue grows by half a step until it nears 1; the steps are enough for one of 10 eps
        tr S. The error is about eps times the condition number: callers keep that far below 1.
        """
        xp, matmul = self.xp, self.matmul
        least = ROUNDING * float(xp.finfo(S.dtype).eps)
        eye = xp.eye(S.shape[-1], dtype=S.dtype, device=device_of(S))
        trace = xp.reshape(xp.linalg.trace(S), (-1, 1, 1))
        unit = xp.where(trace == 0, xp.ones_like(trace), trace)
        Y, Z = S / unit, eye + xp.zeros_like(S)
        for _ in range(math.ceil(-0.5 * math.log(least) / math.log(1.5)) + 6):
            T = 1.5 * eye - 0.5 * matmul(Z, Y)
            Y, Z = matmul(Y, T), matmul(T, Z)
        live, zero = trace != 0, xp.zeros_like(S)
        return xp.where(live, Z * unit**-0.5, zero), xp.where(live, Y * unit**0.5, zero)

    # --- entrywise work -------------------------------------------------------------------------

    def adam(
        self, mu: Array, nu: Array, g: Array, b1: float, b2: float, c1: Any, root2: Any, eps: Any
    ) -> tuple[Array, Array, Array]:
        """Adam's direction and its new moments.

        ``M = b1 M + (1 - b1) g``, ``V = b2 V + (1 - b2) g∘g``, ``(M / c1) / (sqrt(V) / root2 +
        eps)``.
        """
        mu = b1 * mu + (1 - b1) * g
        nu = b2 * nu + (1 - b2) * (g * g)
        return (mu / c1) / (self.xp.sqrt(nu) / root2 + eps), mu, nu

    def descend(self, param: Array, d: Array, lr: Array | float) -> Array:
        """``param - lr d``."""
        return param - lr * d

    # --- small change ---------------------------------------------------------------------------

    def matmul(self, X: Array, Y: Array) -> Array:
        """``X Y`` in the full precision of the arrays' dtype."""
        return self.xp.matmul(X, Y)

    def cast(self, x: Array, dtype: Any) -> Array:
        return x if x.dtype == dtype else self.xp.astype(x, dtype)

    def unstack(self, P: Array, tall: Sequence[Array]) -> Iterator[Array]:
        """The pieces of a stack (K, r, r) that belong to each factor, with its leading axes."""
        start = 0
        for G in tall:
            lead = tuple(G.shape[:-2])
            stop = start + math.prod(lead)
            yield self.xp.reshape(P[start:stop, ...], (*lead, *P.shape[1:]))
            start = stop

    def compute_dtype(self, dtype: Any, wanted: str | None = None) -> Any:
        """At least float32; `wanted` ("float32", "float64") may ask for more, never for less."""
        name = dtype_name(dtype)
        if wanted is not None and wanted not in ("float32", "float64"):
            msg = f"compute_dtype must be None, 'float32' or 'float64', got {wanted!r}"
            raise ValueError(msg)
        if name in ("float16", "bfloat16", "float32"):
            wide = wanted or "float32"
        elif name == "float64":
            wide = name
        else:
            came = f"{name} from {self.name}"
            msg = f"factors must be real floating-point arrays, got {came}; convert them first"
            raise NamespaceError(msg)
        if wide == "float64" and not self.has_float64():
            msg = f"float64 arithmetic was asked of {self.name}, which has none here" + (
                "; set jax_enable_x64 first" if self.name == "jax" else ""
            )
            raise BackendError(msg)
        return getattr(self.xp, wide)

    def has_float64(self) -> bool:
        return hasattr(self.xp, "float64")

    def exact(self, like: Array) -> AbstractContextManager[Any]:
        """A context in which nothing lowers the precision of a product."""
        return nullcontext()

    def reusing(self, workspace: Workspace) -> AbstractContextManager[None]:
        """A step inside may write over its state, and its results hold until the next one."""
        return nullcontext()

    # --- what a benchmark or a test needs -------------------------------------------------------

    def devices(self) -> list[str]:
        """Devices that can be used here; a BackendError says why there are none."""
        return ["cpu"]

    def asarray(self, x: Any, dtype: str = "float32", device: str | None = None) -> Array:
        """A NumPy array as an array of this backend."""
        return self.cast(self.xp.asarray(x, device=device), getattr(self.xp, dtype))

    def asarray_like(self, x: Any, like: Array) -> Array:
        """A NumPy array with the library, dtype and device of `like`."""
        return self.xp.asarray(x, dtype=like.dtype, device=device_of(like))

    def to_numpy(self, x: Array) -> Any:
        """An array of this backend as a NumPy array."""
        import numpy as np

        return np.asarray(x)

    def synchronize(self, *arrays: Array) -> None:
        """Wait until the device has finished what was asked of it."""

    def compile(self, f: Callable[..., Any]) -> Callable[..., Any]:
        """The fastest form of a pure function this backend knows; here the function itself."""
        return f


def mT(x: Array) -> Array:
    """Transpose of the last two axes; a view where the library has views."""
    return x.mT if hasattr(x, "mT") else x.swapaxes(-1, -2)


def dtype_name(dtype: Any) -> str:
    """Plain names such as "float32", whatever the library calls its dtypes."""
    return str(getattr(dtype, "name", dtype)).rpartition(".")[2]

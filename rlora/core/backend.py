"""Every operation of the arithmetic, complete on any Array-API namespace.

A file in ``backends/`` may override any of them with something quicker; none is ever needed.
"""

import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

from rlora.core.algebra import MatrixAlgebra
from rlora.core.errors import BackendError, NamespaceError
from rlora.core.factors import Array, detached, device_of

Workspace = dict[Any, Any]
"""Memory of a backend from one call to the next with factors of the same shapes: memory that it
writes into and hands out again, and where everything lies. A caller makes it as an empty dict."""

Arrays = Sequence[Array]
"""Factors, or what has their shapes."""

LARGE = 40_000
"""On a CPU a factor with so many numbers is multiplied where it is; smaller ones of one shape are
stacked first, as the copies cost less than a call for each."""


AT_ONCE, IN_CACHE = 1 << 24, 1 << 18
"""Entries of an array that is made piece by piece: enough for a device, and for a CPU's cache."""


class AdamNumbers(NamedTuple):
    """The numbers of a step of Adam; those of the arrays are plain or (..., 1, 1)."""

    b1: float
    b2: float
    c1: Sequence[Any]
    """Corrections of the first moments, one for each array."""
    root2: Sequence[Any]
    """Roots of the corrections of the second ones."""
    eps: Sequence[Any]


class Backend(MatrixAlgebra):
    """Every operation that the methods need, written with nothing but the Array API.

    Factor-sized operations take lists of factors, of any outer size and with any leading axes; the
    r x r algebra works on one stack (K, r, r) for all factors of one rank, K counting every layer.

    Parameters
    ----------
    xp : module
        The array namespace, as array-api-compat gives it.
    name : str
        First word of the namespace: "numpy", "torch", "jax", ...
    """

    on_pieces: bool = False
    """True for arrays of which each process has a part, with sums over all of them."""

    def __init__(self, xp: Any, name: str) -> None:
        self.xp = xp
        self.name = name

    # --- factor-sized work: O((m + n) r^2) per pair ------------------------------------------

    def gram_rows(self, X: Arrays, dtype: Any, workspace: Workspace | None = None) -> Array:
        """``A Aᵀ`` for every (..., r, n) of the list, as one stack (K, r, r)."""
        return self.cross_rows(X, X, dtype)

    def gram_columns(self, X: Arrays, dtype: Any, workspace: Workspace | None = None) -> Array:
        """``Bᵀ B`` for every (..., m, r) of the list, as one stack (K, r, r)."""
        return self.gram_rows([B.mT for B in X], dtype, workspace)

    def cross_rows(self, X: Arrays, Y: Arrays, dtype: Any) -> Array:
        """``X Yᵀ`` for every (..., r, n) of two lists of equal shapes, as one stack (K, r, r)."""
        products = []
        for x, y in zip(X, Y, strict=True):
            C = self.matmul(self.cast(x, dtype), self.cast(y, dtype).mT)  # (..., r, r)
            products.append(self.xp.reshape(C, (-1, *C.shape[-2:])))
        return self.xp.concat(products)

    def grams(
        self, A: Arrays, B: Arrays, dtype: Any, workspace: Workspace | None = None
    ) -> tuple[Array, Array]:
        """The stacks of `gram_rows` and of `gram_columns`."""
        return self.gram_rows(A, dtype, workspace), self.gram_columns(B, dtype, workspace)

    def peaks(self, X: Arrays) -> Array:
        """Largest magnitudes of the (..., r, n) of a list, as one stack (K, 1, 1)."""
        norm = self.xp.linalg.vector_norm
        found = [norm(x, axis=(-2, -1), ord=math.inf) for x in X]
        return self.xp.concat([self.xp.reshape(x, (-1, 1, 1)) for x in found])

    def apply_left(
        self,
        P: Arrays,
        X: Arrays,
        workspace: Workspace | None = None,
        accumulate: Arrays | None = None,
        keep: float = 1.0,
    ) -> list[Array]:
        """``P X`` for each (..., r, r) and (..., r, n) of the lists.

        Added to ``keep * accumulate`` if `accumulate` is given, which may be overwritten.
        """
        products = list(map(self.matmul, P, self.cast_like(X, P)))
        return products if accumulate is None else _sums(products, accumulate, keep)

    def apply_right(
        self,
        X: Arrays,
        P: Arrays,
        workspace: Workspace | None = None,
        accumulate: Arrays | None = None,
        keep: float = 1.0,
    ) -> list[Array]:
        """``X P`` for each (..., m, r) and (..., r, r) of the lists.

        Added to ``keep * accumulate`` if `accumulate` is given, which may be overwritten.
        """
        products = list(map(self.matmul, self.cast_like(X, P), P))
        return products if accumulate is None else _sums(products, accumulate, keep)

    def within(self, X: Arrays, low: float, high: float) -> bool:
        """Return whether all largest magnitudes are known, without a wait: 0 or in [low, high)."""
        return False

    def piece(self, like: Array) -> int:
        """The number of entries to make at once of an array that is larger than the factors."""
        return AT_ONCE

    # --- entrywise work -------------------------------------------------------------------------

    def adam(
        self, M: Arrays, V: Arrays, G: Arrays, numbers: AdamNumbers
    ) -> tuple[list[Array], ...]:
        """Adam's new moments and directions, array by array.

        ``M = b1 M + (1 - b1) G``, ``V = b2 V + (1 - b2) G∘G``, ``(M / c1) / (sqrt(V) / root2 +
        eps)``.
        """
        b1, b2, *by_array = numbers
        M = [b1 * m + (1 - b1) * g for m, g in zip(M, G, strict=True)]
        V = [b2 * v + (1 - b2) * g * g for v, g in zip(V, G, strict=True)]
        each = zip(M, V, *by_array, strict=True)
        return M, V, [(m / c) / (self.xp.sqrt(v) / root + e) for m, v, c, root, e in each]

    def add_scaled(
        self, X: Arrays, D: Arrays, c: Array | float, donate: bool = False
    ) -> list[Array]:
        """``x + c d`` of two lists; with `donate` the first may be written over."""
        return [x + c * d for x, d in zip(X, D, strict=True)]

    def lerp(self, X: Array, Y: Array, weight: Array) -> Array:
        """``(1 - weight) X + weight Y``."""
        return (1 - weight) * X + weight * Y

    # --- small change ---------------------------------------------------------------------------

    def cast(self, x: Array, dtype: Any) -> Array:
        return x if x.dtype == dtype else self.xp.astype(x, dtype)

    def cast_like(self, arrays: Arrays, like: Arrays) -> list[Array]:
        """Arrays, each in the dtype of its counterpart; None stays."""
        cast = list(arrays)
        for i, (x, y) in enumerate(zip(arrays, like, strict=True)):
            if x is not None and x.dtype != y.dtype:
                cast[i] = self.cast(x, y.dtype)
        return cast

    def widen(self, arrays: Arrays) -> list[Array]:
        """Arrays in `compute_dtype`, in no graph of operations; None stays."""
        wide = detached(arrays)
        dtypes: dict[Any, Any] = {}
        for i, x in enumerate(wide):
            if x is not None:
                if x.dtype not in dtypes:
                    dtypes[x.dtype] = self.compute_dtype(x.dtype)
                if x.dtype != dtypes[x.dtype]:
                    wide[i] = self.cast(x, dtypes[x.dtype])
        return wide

    def unstack(self, P: Array, X: Arrays) -> list[Array]:
        """The pieces of a stack (K, r, r) that belong to each factor, with its leading axes."""
        pieces, start = [], 0
        for G in X:
            lead = tuple(G.shape[:-2])
            stop = start + math.prod(lead)
            pieces.append(self.xp.reshape(P[start:stop, ...], (*lead, *P.shape[1:])))
            start = stop
        return pieces

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

    def address(self, x: Array) -> int:
        """The place in memory where an array begins; its identity if the library does not tell."""
        return id(x)

    def has_float64(self) -> bool:
        return hasattr(self.xp, "float64")

    def for_type(self, kind: type) -> "Backend":
        """The backend of a class of arrays of this library."""
        return self

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


def _sums(X: Arrays, Z: Arrays, keep: float) -> list[Array]:
    """``X + keep Z`` of two lists."""
    return [x + (z if keep == 1.0 else keep * z) for x, z in zip(X, Z, strict=True)]


def dtype_name(dtype: Any) -> str:
    """Plain names such as "float32", whatever the library calls its dtypes."""
    return str(getattr(dtype, "name", dtype)).rpartition(".")[2]

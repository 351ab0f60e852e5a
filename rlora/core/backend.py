"""One complete implementation on any Array-API namespace, and the way to a faster one.

A file in ``backends/`` may override any verb with something quicker; none of them is ever needed.
The fast class is found by the type of the arrays, so nothing is imported that the caller has not
imported already.
"""

import importlib
import importlib.util
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from importlib.metadata import EntryPoint, entry_points
from typing import Any

import array_api_compat

from rlora.core.errors import BackendError, NamespaceError
from rlora.core.factors import Array

ENTRY_POINT_GROUP = "rlora.backends"

Workspace = dict[Any, Any]
"""What a backend keeps from one call to the next with factors of the same shapes: memory that it
writes into and hands out again, and where everything lies. A caller makes it as an empty dict."""


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
        grams = []
        for A in tall:
            A = self.cast(A, dtype)
            S = self.matmul(A, mT(A))  # (..., r, r)
            grams.append(self.xp.reshape(S, (-1, *S.shape[-2:])))
        return grams[0] if len(grams) == 1 else self.xp.concat(grams)

    def gram_columns(
        self, tall: Sequence[Array], dtype: Any, workspace: Workspace | None = None
    ) -> Array:
        """``Bᵀ B`` for every (..., m, r) of the list, as one stack (K, r, r)."""
        return self.gram_rows([mT(B) for B in tall], dtype, workspace)

    def apply_left(
        self, P: Sequence[Array], tall: Sequence[Array], workspace: Workspace | None = None
    ) -> list[Array]:
        """``P G`` for each (..., r, r) and (..., r, n) of the lists."""
        return [self.matmul(P_k, self.cast(G, P_k.dtype)) for P_k, G in zip(P, tall, strict=True)]

    def apply_right(
        self, tall: Sequence[Array], P: Sequence[Array], workspace: Workspace | None = None
    ) -> list[Array]:
        """``G P`` for each (..., m, r) and (..., r, r) of the lists."""
        return [self.matmul(self.cast(G, P_k.dtype), P_k) for P_k, G in zip(P, tall, strict=True)]

    # --- small work: r x r, batched over the whole model ---------------------------------------

    def spd_power(self, S: Array, power: float) -> Array:
        """``S^power`` of symmetric positive definite matrices (K, r, r) with trace about r."""
        w, Q = self.xp.linalg.eigh(S)
        # Rounding can push an eigenvalue of a semidefinite matrix below zero; the floor is far
        # below anything `damp` lets through.
        w = self.xp.clip(w, min=float(self.xp.finfo(S.dtype).eps) ** 2)
        return self.matmul(Q * self.xp.expand_dims(w**power, axis=-2), mT(Q))

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
            stop = start + _product(lead)
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
            msg = (
                f"factors must be real floating-point arrays, got dtype {name} from {self.name}; "
                f"convert them first"
            )
            raise NamespaceError(msg)
        if wide == "float64" and not self.has_float64():
            msg = f"float64 arithmetic was asked of {self.name}, which has none here" + (
                "; set jax_enable_x64 first" if self.name == "jax" else ""
            )
            raise BackendError(msg)
        return getattr(self.xp, wide)

    def has_float64(self) -> bool:
        return hasattr(self.xp, "float64")

    @contextmanager
    def exact(self, like: Array) -> Iterator[None]:
        """A context in which nothing lowers the precision of a product behind our back."""
        yield

    # --- what a benchmark or a test needs -------------------------------------------------------

    def devices(self) -> list[str]:
        """Devices that can be used here; a BackendError says why there are none."""
        return ["cpu"]

    def asarray(self, x: Any, dtype: str = "float32", device: str | None = None) -> Array:
        """A NumPy array as an array of this backend."""
        array = self.xp.asarray(x, device=device)
        return self.cast(array, getattr(self.xp, dtype))

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


def device_of(x: Array) -> Any:
    """The device to make an array on; under a JAX trace there is none to name, nor needed."""
    return None if hasattr(x, "aval") else getattr(x, "device", None)


def dtype_name(dtype: Any) -> str:
    """Plain names such as "float32", whatever the library calls its dtypes."""
    return str(getattr(dtype, "name", dtype)).rpartition(".")[2]


def _product(sizes: Sequence[int]) -> int:
    total = 1
    for size in sizes:
        total *= size
    return total


def get_backend(*arrays: Array) -> Backend:
    """The backend of these arrays; a NamespaceError when they are of two libraries."""
    backends = {_backend_of(type(x)) or _backend_for(x) for x in arrays if x is not None}
    if len(backends) != 1:
        names = sorted(backend.name for backend in backends)
        msg = (
            f"arrays of two libraries in one call: {' and '.join(names)}; convert them to one"
            if names
            else "no array to work on: every factor is None"
        )
        raise NamespaceError(msg)
    return backends.pop()


_by_type: dict[type, Backend] = {}


def _backend_of(kind: type) -> Backend | None:
    return _by_type.get(kind)


def _backend_for(x: Array) -> Backend:
    try:
        xp = array_api_compat.array_namespace(x)
    except TypeError as error:
        msg = (
            f"expected an array of a library that follows the Array API, got {type(x).__name__}; "
            f"NumPy, CuPy, PyTorch and JAX arrays work, and any with __array_namespace__"
        )
        raise NamespaceError(msg) from error
    backend = _by_type[type(x)] = backend_for_namespace(xp)
    return backend


def namespace_name(xp: Any) -> str:
    """First word of a namespace, without the wrapper of array-api-compat around it."""
    return str(xp.__name__).removeprefix("array_api_compat.").partition(".")[0]


@cache
def backend_for_namespace(xp: Any) -> Backend:
    """The fast backend for a namespace if there is one, else the generic class around it."""
    name = namespace_name(xp)
    kind = load_backend_class(name) or Backend
    return kind(xp, name)


def plugins() -> dict[str, EntryPoint]:
    """Backends of other packages: the entry points of the group ``rlora.backends``."""
    return {point.name: point for point in entry_points(group=ENTRY_POINT_GROUP)}


def load_backend_class(name: str) -> type[Backend] | None:
    """The class of a plug-in, else of ``rlora.backends.<name>``, else None.

    A plug-in or file that cannot be imported is left out with a warning that says why: the
    generic class gives the same answers.
    """
    module = f"rlora.backends.{name}"
    try:
        if point := plugins().get(name):
            return _checked(point.load(), point.value)
        if importlib.util.find_spec("rlora.backends") and importlib.util.find_spec(module):
            return _checked(importlib.import_module(module).BACKEND, module)
    except Exception as error:  # a stranger's code may raise anything
        msg = (
            f"the {name} backend could not be loaded ({type(error).__name__}: {error}); "
            f"rlora goes on with its generic one, which is right but slower"
        )
        warnings.warn(msg, RuntimeWarning, stacklevel=2)
    return None


def _checked(kind: Any, origin: str) -> type[Backend]:
    if not (isinstance(kind, type) and issubclass(kind, Backend)):
        msg = f"{origin} must be a subclass of rlora.core.backend.Backend, got {kind!r}"
        raise BackendError(msg)
    return kind

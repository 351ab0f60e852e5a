"""Finding the backend of an array: by its type, with nothing imported that the caller has not."""

import importlib
import importlib.util
import warnings
from functools import cache
from importlib.metadata import EntryPoint, entry_points
from typing import Any

import array_api_compat

from rlora.core.backend import Backend
from rlora.core.errors import BackendError, NamespaceError
from rlora.core.factors import Array

ENTRY_POINT_GROUP = "rlora.backends"


def get_backend(*arrays: Array) -> Backend:
    """The backend of these arrays; a NamespaceError when they are of two libraries."""
    backends = set()
    for x in arrays:
        if x is not None:
            backends.add(_by_type.get(type(x)) or _backend_for(x))
    if len(backends) != 1:
        names = sorted(backend.name for backend in backends)
        msg = (
            f"arrays of two libraries in one call: {' and '.join(names)}; convert them to one"
            if names
            else "no array to work on: every factor is None"
            if arrays
            else "no array to work on: the collection has no pair; give at least one Factors(A, B)"
        )
        raise NamespaceError(msg)
    return backends.pop()


_by_type: dict[type, Backend] = {}


def _backend_for(x: Array) -> Backend:
    try:
        xp = array_api_compat.array_namespace(x)
    except TypeError as error:
        msg = (
            f"expected an array of a library that follows the Array API, got {type(x).__name__}; "
            f"NumPy, CuPy, PyTorch and JAX arrays work, and any with __array_namespace__"
        )
        raise NamespaceError(msg) from error
    kind = type(x)
    if kind.__module__.startswith("numpy") and kind.__name__ in ("MaskedArray", "matrix"):
        msg = f"a {kind.__name__} of NumPy multiplies otherwise than an array: give np.asarray(x)"
        raise NamespaceError(msg)
    backend = _by_type[kind] = backend_for_namespace(xp).for_type(kind)
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
    except Exception as error:  # third-party code may raise anything
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

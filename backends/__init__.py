"""Faster operations for known array libraries, and the state of each on this machine.

Delete any file of this folder: everything still works, only slower.
"""

import importlib
import importlib.util
from typing import Any, NamedTuple

from rlora.core.backend import Backend
from rlora.core.dispatch import backend_for_namespace, plugins
from rlora.core.errors import BackendError, not_installed

__all__ = ["Backend", "BackendInfo", "available", "get"]

BUILTIN = ("numpy", "torch", "jax", "cupy")


class BackendInfo(NamedTuple):
    """The answer of `available` for one backend."""

    name: str
    version: str | None
    devices: tuple[str, ...]
    why_not: str | None

    @property
    def usable(self) -> bool:
        """True if arrays of this library can be made here."""
        return self.why_not is None


def available() -> dict[str, BackendInfo]:
    """Every backend by name: its version and devices here, or why it cannot be used.

    Imports each library that is installed. A broken one is reported, never raised.

    Returns
    -------
    dict of str to BackendInfo
        The built-in ones first, then those of the entry points ``rlora.backends``.
    """
    return {name: _info(name) for name in dict.fromkeys((*BUILTIN, *plugins()))}


def get(name: str) -> Backend:
    """The backend of a library by name, ready to make arrays.

    Parameters
    ----------
    name : str
        "numpy", "torch", "jax", "cupy", or any importable Array-API namespace. A plug-in's entry
        point has the name of the library it is for.

    Returns
    -------
    Backend
        With at least one device.

    Raises
    ------
    BackendError
        When the library is not installed, cannot be imported, or has no device here.
    """
    if importlib.util.find_spec(name.partition(".")[0]) is None:
        if name in BUILTIN:
            raise not_installed(name, name)
        msg = (
            f"{name} is not installed; there are {', '.join(BUILTIN)}, and any Array-API namespace"
        )
        raise BackendError(msg)
    try:
        backend = backend_for_namespace(_namespace(name))
        backend.devices()
    except BackendError:
        raise
    except Exception as error:  # a broken installation may raise anything
        msg = f"the {name} backend cannot be used here: {type(error).__name__}: {error}"
        raise BackendError(msg) from error
    return backend


def _namespace(name: str) -> Any:
    if name in ("numpy", "torch", "cupy"):
        # The wrapper fills the gaps between the library and the standard.
        return importlib.import_module(f"array_api_compat.{name}")
    return importlib.import_module("jax.numpy" if name == "jax" else name)


def _info(name: str) -> BackendInfo:
    try:
        backend = get(name)
        version = str(getattr(importlib.import_module(name.partition(".")[0]), "__version__", "?"))
        return BackendInfo(name, version, tuple(backend.devices()), None)
    except Exception as error:  # reported, never raised
        return BackendInfo(name, None, (), str(error))

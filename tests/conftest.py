"""One `backend` fixture over every array library that is installed; others skip with the reason."""

import gc
import os
from functools import cache
from pathlib import Path

os.environ.setdefault("JAX_ENABLE_X64", "1")
os.environ.setdefault("JAX_PLATFORMS", "cpu")
# Most of the time goes to compiling steps that run once or twice: a third less of it.
os.environ.setdefault(
    "XLA_FLAGS",
    "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true",
)
os.environ.setdefault("HF_HUB_OFFLINE", "1")
# Small problems, and a process for each core: one thread each.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
os.environ.setdefault("MKL_NUM_THREADS", "1")

import numpy as np
import pytest

from rlora import BackendError
from rlora.backends import get
from rlora.core.backend import Backend

LINES = (Path(__file__).parent / "slow.txt").read_text(encoding="utf-8").splitlines()
SLOW = tuple(line for line in LINES if not line.startswith(("#", "!")))
QUICK = tuple(line.removeprefix("!") for line in LINES if line.startswith("!"))
SLOW_LIBRARIES = ("array_api_strict", "jax")
"""Libraries whose tests of methods are slow: compiled for each, or checked at each operation."""

gc.disable()  # until all tests are collected

LIBRARIES = ("numpy", "numpy-readonly", "array_api_strict", "torch", "jax", "cupy")


class ReadOnlyNumPy(Backend):
    """The generic operations on NumPy arrays that nobody may write to."""

    def asarray(self, x, dtype="float32", device=None):
        array = np.array(x, dtype=dtype)
        array.setflags(write=False)
        return array


def pytest_collection_finish():
    """Let the garbage collector pass over what imports and collecting left: millions of objects."""
    gc.freeze()
    gc.enable()


def pytest_collection_modifyitems(items):
    """Mark what tests/slow.txt names; `pytest` alone leaves it out, the gate does not."""
    for item in items:
        library = item.callspec.params.get("backend") if hasattr(item, "callspec") else None
        of_methods = item.nodeid.startswith("tests/methods/") and library in SLOW_LIBRARIES
        listed = item.nodeid.startswith(SLOW) and not item.nodeid.startswith(QUICK)
        if of_methods or listed:
            item.add_marker("slow")


@cache
def load(library: str) -> Backend | BackendError:
    if library == "numpy-readonly":
        return ReadOnlyNumPy(get("numpy").xp, "numpy")
    try:
        return get(library)
    except BackendError as error:
        return error


@pytest.fixture(params=LIBRARIES)
def backend(request) -> Backend:
    found = load(request.param)
    if isinstance(found, BackendError):
        pytest.skip(str(found))
    return found

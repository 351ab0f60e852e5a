"""One `backend` fixture over every array library that is installed; others skip with the reason."""

import os

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

LIBRARIES = ("numpy", "numpy-readonly", "array_api_strict", "torch", "jax", "cupy")


class ReadOnlyNumPy(Backend):
    """The generic verbs on NumPy arrays that nobody may write to."""

    def asarray(self, x, dtype="float32", device=None):
        array = np.array(x, dtype=dtype)
        array.setflags(write=False)
        return array


def load(library: str) -> Backend:
    if library == "numpy-readonly":
        return ReadOnlyNumPy(get("numpy").xp, "numpy")
    try:
        return get(library)
    except BackendError as error:
        pytest.skip(str(error))


@pytest.fixture(params=LIBRARIES)
def backend(request) -> Backend:
    return load(request.param)

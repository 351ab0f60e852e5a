"""CuPy: cuSOLVER's batched inverse, and an error that says so when there is no CUDA device."""

from typing import Any

import cupy as cp

from rlora.core.backend import Backend
from rlora.core.errors import BackendError
from rlora.core.factors import Array


class CuPyBackend(Backend):
    """The operations that CuPy does faster than the generic class."""

    def spd_power(self, S: Array, power: float) -> Array:
        # Batched LU. cuSOLVER's failures are silent by default, but the damping keeps every member
        # away from singularity, and members with NaN have been replaced by the identity.
        return cp.linalg.inv(S) if power == -1.0 else super().spd_power(S, power)

    def inverse_cholesky(self, S: Array, *, upper: bool = False) -> Array:
        W = cp.tril(cp.linalg.inv(cp.linalg.cholesky(S[..., ::-1, ::-1] if upper else S)))
        return W[..., ::-1, ::-1] if upper else W

    def address(self, x: Array) -> int:
        return int(x.data.ptr) if isinstance(x, cp.ndarray) else id(x)

    def devices(self) -> list[str]:
        try:
            count = cp.cuda.runtime.getDeviceCount()
        except cp.cuda.runtime.CUDARuntimeError as error:
            count, why = 0, f" ({error})"
        else:
            why = ""
        if count == 0:
            msg = f"CuPy is installed but finds no CUDA device{why}; use another backend"
            raise BackendError(msg)
        return [f"cuda:{i}" for i in range(count)]

    def asarray(self, x: Any, dtype: str = "float32", device: str | None = None) -> Array:
        names = self.devices()
        index = names.index(device) if device in names else 0
        if device not in (None, "cuda", *names):
            msg = f"CuPy has no device {device!r} here; it has {', '.join(names)}"
            raise ValueError(msg)
        with cp.cuda.Device(index):
            return cp.asarray(x, dtype=dtype)

    def to_numpy(self, x: Array) -> Any:
        return cp.asnumpy(x)

    def synchronize(self, *arrays: Array) -> None:
        for x in arrays:
            x.device.synchronize()


BACKEND = CuPyBackend

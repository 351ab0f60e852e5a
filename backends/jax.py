"""JAX: products at the highest precision, Cholesky instead of eigh, and jit."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import jax.scipy.linalg as jsl

from rlora.core.backend import Backend, mT
from rlora.core.factors import Array


class JaxBackend(Backend):
    """The verbs that JAX does faster, or less precisely unless told, than the generic class."""

    def matmul(self, X: Array, Y: Array) -> Array:
        # The default precision of a GPU or TPU rounds the operands to 10 or 8 bits.
        return jnp.matmul(X, Y, precision=jax.lax.Precision.HIGHEST)

    def spd_power(self, S: Array, power: float) -> Array:
        if power != -1.0:
            return super().spd_power(S, power)
        L = jnp.linalg.cholesky(S)  # (K, r, r)
        eye = jnp.broadcast_to(jnp.eye(S.shape[-1], dtype=S.dtype), S.shape)
        W = jsl.solve_triangular(L, eye, lower=True)
        return self.matmul(mT(W), W)

    def has_float64(self) -> bool:
        config: Any = jax.config  # its options are made at run time
        return bool(config.jax_enable_x64)

    def devices(self) -> list[str]:
        return [str(device) for device in jax.devices()]

    def asarray(self, x: Any, dtype: str = "float32", device: str | None = None) -> Array:
        named = {str(d): d for d in jax.devices()} | {d.platform: d for d in jax.devices()}
        if device is not None and device not in named:
            msg = f"JAX has no device {device!r} here; it has {', '.join(sorted(named))}"
            raise ValueError(msg)
        return jnp.asarray(x, dtype=dtype, device=named.get(device or ""))

    def synchronize(self, *arrays: Array) -> None:
        for x in arrays:
            x.block_until_ready()

    def compile(self, f: Callable[..., Any]) -> Callable[..., Any]:
        return jax.jit(f)


BACKEND = JaxBackend

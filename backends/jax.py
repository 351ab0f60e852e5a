"""JAX: products at the highest precision, Cholesky instead of eigh, LAPACK in turn, and jit."""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import jax.scipy.linalg as jsl
import numpy as np

from rlora.core.algebra import ROUNDING
from rlora.core.backend import Backend
from rlora.core.factors import Array


class JaxBackend(Backend):
    """Operations that JAX does faster, or less precisely unless told, than the generic class."""

    def matmul(self, X: Array, Y: Array) -> Array:
        # The default precision of a GPU or TPU rounds the operands to 10 or 8 bits.
        return jnp.matmul(X, Y, precision=jax.lax.Precision.HIGHEST)

    def spd_power(self, S: Array, power: float) -> Array:
        if power != -1.0:
            return super().spd_power(S, power)
        W = self.inverse_cholesky(S)  # (K, r, r)
        return self.matmul(W.mT, W)

    def inverse_cholesky(self, S: Array, *, upper: bool = False) -> Array:
        W = one_by_one(lower_inverse, S[..., ::-1, ::-1] if upper else S)
        return W[..., ::-1, ::-1] if upper else W

    def eigh(self, S: Array) -> tuple[Array, Array]:
        w, Q = one_by_one(symmetric_eigh, S)
        return w, Q

    def svd(self, X: Array) -> tuple[Array, Array, Array]:
        U, sigma, Vt = one_by_one(thin_svd, X)
        return U, sigma, Vt

    def qr(self, X: Array) -> tuple[Array, Array]:
        Q, R = one_by_one(jnp.linalg.qr, X)
        return Q, R

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


symmetric_eigh = partial(jnp.linalg.eigh, symmetrize_input=False)
thin_svd = partial(jnp.linalg.svd, full_matrices=False)


@partial(jax.jit, static_argnums=0)
def one_by_one(f: Callable[[Array], Any], stack: Array) -> Any:
    """``f`` of a stack (..., m, n) of matrices, which a CPU takes in turn.

    LAPACK behind JAX deals a stack out to the thread pool that it itself runs in, and waits: as
    many stacks at once as the pool has threads would wait for ever (seen with jaxlib 0.10).
    """

    def in_turn(stack: Array) -> Any:
        results = jax.lax.map(f, stack.reshape(-1, *stack.shape[-2:]))
        return jax.tree.map(lambda x: x.reshape(*stack.shape[:-2], *x.shape[1:]), results)

    return (
        f(stack) if stack.ndim == 2 else jax.lax.platform_dependent(stack, cpu=in_turn, default=f)
    )


def lower_inverse(S: Array) -> Array:
    """The lower triangular W of ``S⁻¹ = Wᵀ W``, S definite."""
    cholesky = partial(jnp.linalg.cholesky, symmetrize_input=False)
    L, eye = cholesky(S), jnp.broadcast_to(jnp.eye(S.shape[-1], dtype=S.dtype), S.shape)
    # By ten times the damping of rounding, of which `MatrixAlgebra.above_rounding` says why.
    trace = jnp.trace(S, axis1=-2, axis2=-1)[..., None, None]
    lift = 10 * ROUNDING * float(np.finfo(S.dtype).eps) * trace
    L = jax.lax.cond(
        jnp.isnan(L).any(), lambda: jnp.where(jnp.isnan(L), cholesky(S + lift * eye), L), lambda: L
    )
    return jsl.solve_triangular(L, eye, lower=True)


BACKEND = JaxBackend

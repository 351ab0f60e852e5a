"""NumPy: products into one stack, LAPACK's batched inverse, entrywise work in place."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import numpy as np

from rlora.core.algebra import mT
from rlora.core.backend import Backend, Tall, Workspace
from rlora.core.factors import Array

from ._cpu import cholesky_half


class NumPyBackend(Backend):
    """The operations that NumPy does faster than the generic class."""

    def gram_rows(
        self, tall: Sequence[Array], dtype: Any, workspace: Workspace | None = None
    ) -> Array:
        layers = [int(np.prod(A.shape[:-2], dtype=int)) for A in tall]
        r = tall[0].shape[-2]
        stack = np.empty((sum(layers), r, r), dtype)
        start = 0
        for A, count in zip(tall, layers, strict=True):
            A = A.astype(dtype, copy=False)
            out = stack[start : start + count].reshape(*A.shape[:-2], r, r)
            np.matmul(A, mT(A), out=out)
            start += count
        return stack

    def within(self, X: Tall, low: float, high: float) -> bool:
        return all(is_within(x, low, high) for x in X)

    def spd_power(self, S: Array, power: float) -> Array:
        return np.linalg.inv(S) if power == -1.0 else super().spd_power(S, power)

    def inverse_cholesky(self, S: Array, *, upper: bool = False) -> Array:
        try:
            L = np.linalg.cholesky(S[..., ::-1, ::-1] if upper else S)
        except np.linalg.LinAlgError:  # NaN, or indefinite by rounding, in any member of the stack
            return super().inverse_cholesky(S, upper=upper)
        W = np.tril(np.linalg.inv(L))
        return W[..., ::-1, ::-1] if upper else W

    def pseudo_half(self, S: Array) -> Array:
        return cholesky_half(self, S)

    def adam(
        self, mu: Array, nu: Array, g: Array, b1: float, b2: float, c1: Any, root2: Any, eps: Any
    ) -> tuple[Array, Array, Array]:
        """In place on arrays of its own, or donated: fresh pages cost more than the arithmetic."""
        mu, nu = _times(b1, mu), _times(b2, nu)
        work = (1 - b1) * g
        mu += work
        np.multiply(g, g, out=work)
        work *= 1 - b2
        nu += work
        np.sqrt(nu, out=work)
        work /= root2
        work += eps
        np.divide(mu, work, out=work)
        work /= c1
        return work, mu, nu

    @contextmanager
    def reusing(self, workspace: Workspace) -> Iterator[None]:
        token = _donated.set(True)
        try:
            yield
        finally:
            _donated.reset(token)

    def descend(
        self, param: Array, d: Array, lr: Array | float, into: Array | None = None
    ) -> Array:
        moved = np.asarray(lr * d)
        fits = into is not None and into.flags.writeable
        return np.subtract(param, moved, out=into if fits else moved)


_donated: ContextVar[bool] = ContextVar("donated", default=False)


def _times(number: float, x: Array) -> Array:
    """``number x``, of a donated x in its own memory."""
    own = _donated.get() and x.flags.writeable
    return np.multiply(x, number, out=x if own else None)


def is_within(x: Any, low: float, high: float) -> bool:
    """`Backend.within` of one array (..., r, n)."""
    peak = np.maximum(x.max(axis=(-2, -1)), -x.min(axis=(-2, -1)))
    return bool(((peak < high) & ((peak >= low) | (peak == 0))).all())


BACKEND = NumPyBackend

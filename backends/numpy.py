"""NumPy: products into one stack, LAPACK's batched inverse, entrywise work in place."""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from math import prod
from typing import Any

import numpy as np

from rlora.core.backend import IN_CACHE, AdamNumbers, Arrays, Backend, Workspace
from rlora.core.factors import Array

from ._cpu import cholesky_half


class NumPyBackend(Backend):
    """The operations that NumPy does faster than the generic class."""

    def gram_rows(self, X: Arrays, dtype: Any, workspace: Workspace | None = None) -> Array:
        layers = [prod(A.shape[:-2]) for A in X]
        r = X[0].shape[-2]
        stack = np.empty((sum(layers), r, r), dtype)
        start = 0
        for A, count in zip(X, layers, strict=True):
            A = A.astype(dtype, copy=False)
            out = stack[start : start + count].reshape(*A.shape[:-2], r, r)
            np.matmul(A, A.swapaxes(-1, -2), out=out)
            start += count
        return stack

    def address(self, x: Array) -> int:
        return int(x.__array_interface__["data"][0]) if isinstance(x, np.ndarray) else id(x)

    def within(self, X: Arrays, low: float, high: float) -> bool:
        for x in X:
            peak = np.maximum(x.max(axis=(-2, -1)), -x.min(axis=(-2, -1)))
            if not ((peak < high) & ((peak >= low) | (peak == 0))).all():
                return False
        return True

    def piece(self, like: Array) -> int:
        return IN_CACHE

    def spd_power(self, S: Array, power: float) -> Array:
        if power != -1.0:
            return super().spd_power(S, power)
        W = self.inverse_cholesky(S)  # which sees what is not definite, as LU does not
        return np.matmul(W.mT, W)

    def inverse_cholesky(self, S: Array, *, upper: bool = False) -> Array:
        try:
            L = np.linalg.cholesky(S[..., ::-1, ::-1] if upper else S)
        except np.linalg.LinAlgError:  # NaN, or indefinite by rounding, in any member of the stack
            return super().inverse_cholesky(S, upper=upper)
        W = np.tril(np.linalg.inv(L))
        return W[..., ::-1, ::-1] if upper else W

    def pseudo_half(self, S: Array, least: float = 0.0) -> Array:
        return cholesky_half(self, S, least, self.inverse_cholesky)

    def adam(
        self, M: Arrays, V: Arrays, G: Arrays, numbers: AdamNumbers
    ) -> tuple[list[Array], ...]:
        """In place on arrays of its own, or donated: fresh pages cost more than the arithmetic."""
        b1, b2, *by_array = numbers
        M, V, D = _times(b1, M), _times(b2, V), []
        for m, v, g, c, root, e in zip(M, V, G, *by_array, strict=True):
            work = (1 - b1) * g
            m += work
            np.multiply(g, 1 - b2, out=work)  # before the square, which may leave the range
            work *= g
            v += work
            # (root / c) M / (sqrt(V) + root e), a pass less than the usual form
            np.sqrt(v, out=work)
            work += root * e
            np.divide(m, work, out=work)
            work *= root / c
            D.append(work)
        return M, V, D

    @contextmanager
    def reusing(self, workspace: Workspace) -> Iterator[None]:
        token = _donated.set(True)
        try:
            yield
        finally:
            _donated.reset(token)

    def add_scaled(
        self, X: Arrays, D: Arrays, c: Array | float, donate: bool = False
    ) -> list[Array]:
        moved = []
        for x, d in zip(X, D, strict=True):
            change = np.asarray(c * d)
            moved.append(np.add(x, change, out=x if donate and x.flags.writeable else change))
        return moved


_donated: ContextVar[bool] = ContextVar("donated", default=False)


def _times(number: float, X: Arrays) -> list[Array]:
    """``number x`` of a list, of donated arrays in their own memory."""
    own = _donated.get()
    return [np.multiply(x, number, out=x if own and x.flags.writeable else None) for x in X]


BACKEND = NumPyBackend

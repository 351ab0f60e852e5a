"""NumPy: products written straight into one stack, and LAPACK's batched inverse."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from rlora.core.backend import Backend, Workspace, mT
from rlora.core.factors import Array


class NumPyBackend(Backend):
    """The verbs that NumPy does faster than the generic class."""

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

    def spd_power(self, S: Array, power: float) -> Array:
        return np.linalg.inv(S) if power == -1.0 else super().spd_power(S, power)


BACKEND = NumPyBackend

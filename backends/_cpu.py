"""Steps that NumPy and torch share on a CPU, where asking for a value costs nothing.

NumPy's arithmetic on a few numbers takes a fraction of the time of a call of torch.
"""

import numpy as np

from rlora.core.algebra import ROUNDING
from rlora.core.backend import Backend
from rlora.core.factors import Array


def cholesky_half(backend: Backend, S: Array) -> Array:
    """`Backend.pseudo_half` without an eigh for the members that have no direction near rounding.

    With ``Wᵀ W = H⁻¹``, H the S of trace r, the least eigenvalue of H is at least ``1 / tr(H⁻¹) =
    1 / |W|²``.
    """
    values, r = backend.to_numpy(S), S.shape[-1]
    info = np.finfo(values.dtype)
    rounding = ROUNDING * r * info.eps
    with np.errstate(over="ignore"):
        mean = np.trace(values, axis1=-2, axis2=-1)[:, None, None] / r
    inverted = mean > info.smallest_normal / rounding  # as in `of_trace_r`; false for NaN too
    unit = np.where(inverted, mean, np.ones_like(mean))
    W = backend.inverse_cholesky(S / backend.asarray_like(unit, S))
    with np.errstate(over="ignore"):
        squares = np.square(backend.to_numpy(W)).sum(axis=(-2, -1))
    W = W * backend.asarray_like(unit**-0.5, S)
    sound = inverted[:, 0, 0] & (squares * rounding < 1)
    if not sound.all():
        W[~sound] = backend.pseudo_power(S[~sound], -0.5)
    return W

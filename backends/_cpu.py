"""Steps that NumPy and torch share on a CPU, where asking for a value costs nothing."""

from collections.abc import Callable

from rlora.core.backend import Backend
from rlora.core.factors import Array


def cholesky_half(
    backend: Backend, S: Array, least: float, inverse_cholesky: Callable[[Array], Array]
) -> Array:
    """`Backend.pseudo_half` without an eigh for the members that have no direction nearly lost.

    With ``Wᵀ W = S⁻¹`` the least eigenvalue of S is at least ``1 / tr(S⁻¹) = 1 / |W|²``.
    """
    xp = backend.xp
    H, unit, lost = backend.of_trace_r(S, least)
    W = inverse_cholesky(H)
    sound = xp.sum(W * W, axis=(-2, -1)) * lost < 1  # false for NaN too
    W = W * unit**-0.5
    if not backend.to_numpy(sound).all():
        W[~sound] = backend.pseudo_power(S[~sound], -0.5, least)
    return W

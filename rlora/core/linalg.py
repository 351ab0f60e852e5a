"""The r x r algebra: Gram matrices of both factors, their damping, and powers of the result.

``S_A = A Aᵀ`` and ``S_B = Bᵀ B``. The metric of A is made of S_B and the other way round, so
everything here comes as ``Factors``: first the member that acts on A, then the one that acts on B.
"""

import math
from collections.abc import Sequence
from typing import Any, Literal, get_args

from rlora.core.backend import Backend, Workspace, device_of, dtype_name
from rlora.core.factors import Array, Factors

DampingMode = Literal["relative", "absolute", "covariant"]

ROUNDING = 10
"""A Gram formed in precision eps has eigenvalues uncertain by about eps * trace; ten times that
keeps every factorisation of a rank-deficient Gram away from zero."""


def check_damping(damping: Any, damping_mode: Any) -> None:
    """ValueError or TypeError unless the two make sense."""
    if isinstance(damping, bool) or not isinstance(damping, (int, float)):
        msg = f"damping must be a real number, got {damping!r} ({type(damping).__name__})"
        raise TypeError(msg)
    if not (math.isfinite(damping) and damping >= 0):
        msg = f"damping must be finite and at least 0, got {damping!r}"
        raise ValueError(msg)
    modes = get_args(DampingMode)
    if damping_mode not in modes:
        msg = f"damping_mode must be one of {', '.join(modes)}, got {damping_mode!r}"
        raise ValueError(msg)


def preconditioners(
    backend: Backend,
    params: Sequence[Factors],
    *,
    damping: float,
    damping_mode: DampingMode,
    exponent: float = -1.0,
    compute_dtype: str | None = None,
    workspace: Workspace | None = None,
) -> list[Factors]:
    """``H_A^exponent`` and ``H_B^exponent`` of every pair: one batch for all pairs of one rank.

    Parameters
    ----------
    backend : Backend
        Of the parameters.
    params : sequence of Factors
        A (..., r, n) and B (..., m, r), of any shapes.
    damping, damping_mode
        See `metric`.
    exponent : float
        -1, or -1/2 for one half of a preconditioner that stands on both sides of Adam.
    compute_dtype : {None, "float32", "float64"}
        Precision of Grams and powers; the result comes in the parameters' own, at least float32.
    workspace : dict, optional
        Memory to use again at the next call.

    Returns
    -------
    list of Factors of (..., r, r)
        First the one that multiplies G_A from the left, then the one that multiplies G_B from
        the right.
    """
    result: list[Factors] = list(params)
    for members in _by_rank(params).values():
        A, B = [params[i].A for i in members], [params[i].B for i in members]
        dtype = backend.compute_dtype(A[0].dtype, compute_dtype)
        grams = Factors(
            backend.gram_rows(A, dtype, workspace), backend.gram_columns(B, dtype, workspace)
        )
        H = metric(backend, grams, damping, damping_mode)
        P = power(backend, backend.xp.concat([H.A, H.B]), exponent)  # (2K, r, r)
        P = backend.cast(P, backend.compute_dtype(A[0].dtype))
        pieces = list(backend.unstack(P, A + B))
        for i, P_A, P_B in zip(members, pieces, pieces[len(members) :], strict=False):
            result[i] = Factors(P_A, P_B)
    return result


def precondition(
    backend: Backend,
    P: Sequence[Factors],
    grads: Sequence[Factors],
    workspace: Workspace | None = None,
) -> list[Factors]:
    """``P_A G_A`` and ``G_B P_B`` for every pair; None stays None."""
    left = [i for i, G in enumerate(grads) if G.A is not None]
    right = [i for i, G in enumerate(grads) if G.B is not None]
    A = backend.apply_left([P[i].A for i in left], [grads[i].A for i in left], workspace)
    B = backend.apply_right([grads[i].B for i in right], [P[i].B for i in right], workspace)
    of_A, of_B = dict(zip(left, A, strict=True)), dict(zip(right, B, strict=True))
    return [Factors(of_A.get(i), of_B.get(i)) for i in range(len(grads))]


def _by_rank(params: Sequence[Factors]) -> dict[tuple[int, str, str], list[int]]:
    groups: dict[tuple[int, str, str], list[int]] = {}
    for i, (A, _) in enumerate(params):
        key = (A.shape[-2], dtype_name(A.dtype), str(device_of(A)))
        groups.setdefault(key, []).append(i)
    return groups


def metric(
    backend: Backend, grams: Factors, damping: float, damping_mode: DampingMode
) -> Factors:
    """The damped Gram matrices: ``H_A`` from S_B, which acts on A, and ``H_B`` from S_A.

    Parameters
    ----------
    backend : Backend
        Of the Gram matrices.
    grams : Factors of (K, r, r)
        ``S_A`` and ``S_B`` of K pairs.
    damping : float
        δ, at least 0.
    damping_mode : {"relative", "absolute", "covariant"}
        ``S + δ tr(S)/r I`` on both sides; ``S + δ I`` on both sides; or ``S_B + δ S_A⁻¹`` for A
        and S_A as it is for B, which transforms as S_B does and so keeps the invariance: δ is then
        compared with the squared singular values of BA.

    Notes
    -----
    Whatever is asked, the shift is never below what the rounding of the Gram itself can carry,
    ``10 eps tr(S)``.
    """
    S_A, S_B = grams
    if damping_mode == "covariant":
        H_B = _shift(backend, S_A, 0.0)
        H_A = _shift(backend, S_B + damping * power(backend, H_B, -1.0), 0.0)
    else:
        relative = damping_mode == "relative"
        H_A, H_B = (
            _shift(backend, S, damping * trace(backend, S) / S.shape[-1] if relative else damping)
            for S in (S_B, S_A)
        )
    return Factors(H_A, H_B)


def power(backend: Backend, H: Array, exponent: float) -> Array:
    """``H^exponent`` for a stack (K, r, r) of damped Grams, each member by itself.

    Each is scaled to trace r first, so that neither tiny nor huge factors leave the range of the
    dtype. A member whose trace is zero or too small to be inverted gives 0: a zero factor does
    not move its partner. One whose trace has overflowed gives 0 too, the limit of the formula.
    One with NaN gives NaN, and no member sees another.
    """
    xp = backend.xp
    scale = xp.reshape(trace(backend, H), (-1, 1, 1)) / H.shape[-1]  # (K, 1, 1)
    info = xp.finfo(H.dtype)
    smallest = float(info.smallest_normal) / (ROUNDING * H.shape[-1] * float(info.eps))
    live = (scale > smallest) & xp.isfinite(scale)
    unit = xp.where(live, scale, xp.ones_like(scale))
    eye = xp.eye(H.shape[-1], dtype=H.dtype, device=device_of(H))
    P = backend.spd_power(xp.where(live, H / unit, eye), exponent) * unit**exponent
    return xp.where(live, P, xp.where(xp.isnan(scale), scale, xp.zeros_like(scale)))


def trace(backend: Backend, S: Array) -> Array:
    """Traces (K,) of a stack (K, r, r)."""
    return backend.xp.linalg.trace(S)


def _shift(backend: Backend, S: Array, shift: Array | float) -> Array:
    """``S + max(shift, rounding) I``."""
    xp = backend.xp
    floor = ROUNDING * float(xp.finfo(S.dtype).eps) * trace(backend, S)  # (K,)
    shift = xp.maximum(floor, shift + xp.zeros_like(floor))
    eye = xp.eye(S.shape[-1], dtype=S.dtype, device=device_of(S))
    return S + xp.reshape(shift, (-1, 1, 1)) * eye  # (K, r, r)

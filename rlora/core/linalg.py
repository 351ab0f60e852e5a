"""The r x r algebra: Gram matrices of both factors, their damping, and powers of the result.

``S_A = A Aᵀ`` and ``S_B = Bᵀ B``. The metric of A is made of S_B and the other way round, so
everything here comes as ``Factors``: first the member that acts on A, then the one that acts on B.
"""

from collections.abc import Sequence
from typing import Any, Literal

from rlora.core.backend import Backend, Workspace, device_of
from rlora.core.checks import check_choice, check_nonnegative
from rlora.core.factors import Array, Factors

DampingMode = Literal["relative", "absolute", "covariant"]


def check_damping(damping: Any, damping_mode: Any) -> None:
    """ValueError or TypeError unless the two make sense."""
    check_nonnegative("damping", damping)
    check_choice("damping_mode", damping_mode, DampingMode)


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
    damping : float
        δ, at least 0.
    damping_mode : {"relative", "absolute", "covariant"}
        ``S + δ tr(S)/r I`` on both sides; ``S + δ I`` on both sides; or ``S_B + δ S_A⁻¹`` for A
        and S_A as it is for B, which transforms as S_B does and so keeps the invariance: δ is then
        compared with the squared singular values of BA.
    exponent : float
        -1, or -1/2 for one half of a preconditioner that stands on both sides of Adam.
    compute_dtype : {None, "float32", "float64"}
        Precision of Grams and powers; the result comes in the parameters' own, at least float32.
    workspace : dict, optional
        Memory to use again at the next call with factors of the same shapes.

    Returns
    -------
    list of Factors of (..., r, r)
        First the one that multiplies G_A from the left, then the one that multiplies G_B from
        the right.
    """
    result: list[Factors] = list(params)
    for rank, members in _by_rank(params, workspace).items():
        memory = None if workspace is None else workspace.setdefault(rank, {})
        A, B = [params[i].A for i in members], [params[i].B for i in members]
        dtype = backend.compute_dtype(A[0].dtype, compute_dtype)
        S_A = backend.gram_rows(A, dtype, memory)  # (K, r, r)
        S_B = backend.gram_columns(B, dtype, memory)  # (K, r, r)
        P = _powers(backend, S_A, S_B, damping, damping_mode, exponent)  # (2K, r, r)
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


def _by_rank(params: Sequence[Factors], workspace: Workspace | None) -> dict[Any, list[int]]:
    """Positions of the pairs of one rank, dtype and device."""
    groups: dict[Any, list[int]] | None = (workspace or {}).get("by rank")
    if groups is None:
        groups = {}
        for i, (A, _) in enumerate(params):
            groups.setdefault((A.shape[-2], A.dtype, device_of(A)), []).append(i)
        if workspace is not None:
            workspace["by rank"] = groups
    return groups


def _powers(
    backend: Backend,
    S_A: Array,
    S_B: Array,
    damping: float,
    damping_mode: DampingMode,
    exponent: float,
) -> Array:
    """``H_A^exponent`` on top of ``H_B^exponent``, (2K, r, r)."""
    concat = backend.xp.concat
    if damping_mode != "covariant":
        relative = damping_mode == "relative"
        return backend.damped_power(concat([S_B, S_A]), exponent, damping, relative=relative)
    inverse_S_A = backend.damped_power(S_A, -1.0)
    return backend.damped_power(concat([S_B + damping * inverse_S_A, S_A]), exponent)

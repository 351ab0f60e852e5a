"""Preconditioning by damped Grams: before an entrywise method, after it, or in halves around it.

The metric of A is made of ``Bᵀ B`` and the other way round, so everything here comes as
``Factors``: first the member that acts on A, then the one that acts on B.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

from rlora.core.backend import Backend, Workspace
from rlora.core.factors import Factors, indices_by_rank
from rlora.core.metric import DampingMode, Placement, Sizes, split_power
from rlora.core.rank_group import RankGroup, Stack


class Preconditioners(NamedTuple):
    """Preconditioners before and after an entrywise method such as Adam; None for the identity.

    Lists of Factors of (..., r, r): the A member multiplies from the left what belongs to A, the B
    member from the right what belongs to B.
    """

    first: list[Factors] | None
    second: list[Factors] | None


def preconditioners(
    backend: Backend,
    params: Sequence[Factors],
    *,
    damping: float,
    damping_mode: DampingMode,
    placement: Placement = "before",
    compute_dtype: str | None = None,
) -> Preconditioners:
    """Preconditioners of every pair by the damped Grams: one batch for all pairs of one rank.

    Parameters
    ----------
    backend : Backend
        The backend of the parameters.
    params : sequence of Factors
        A (..., r, n) and B (..., m, r), of any shapes.
    damping : float
        δ, at least 0.
    damping_mode : {"relative", "absolute", "covariant"}
        ``S + δ tr(S)/r I`` on both sides; ``S + δ I`` on both sides; or ``S_B + δ S_A⁻¹`` for A
        and S_A as it is for B, which transforms as S_B does and so keeps the invariance: δ is then
        compared with the squared singular values of BA.
    placement : {"before", "after", "both"}
        See `rlora.core.metric.split_power`.
    compute_dtype : {None, "float32", "float64"}
        Precision of Grams and powers; the result comes in the parameters' own, at least float32.
    """
    grams = rank_grams(backend, params, compute_dtype=compute_dtype)
    sizes = [(pair.B.shape[-2], pair.A.shape[-1]) for pair in params]
    return gram_powers(
        grams, sizes, placement=placement, damping=damping, damping_mode=damping_mode
    )


class RankGrams(NamedTuple):
    """The Grams of all pairs of one rank."""

    members: list[int]
    """Positions of the pairs."""
    group: RankGroup
    S: Stack
    """Those of the partner of each factor."""


def rank_grams(
    backend: Backend,
    params: Sequence[Factors],
    *,
    compute_dtype: str | None = None,
    workspace: Workspace | None = None,
    fixed_B: Sequence[bool] | None = None,
) -> list[RankGrams]:
    """``Bᵀ B`` and ``A Aᵀ`` of every pair, rank by rank: the first half of `preconditioners`.

    The Grams of pieces of a factor along its outer axis add up, so code that holds single pieces
    sums the stacks before the second half. `fixed_B` is as in `RankGroup`, for all pairs.
    """
    grams = []
    for members in indices_by_rank(params, workspace):
        pairs = [params[i] for i in members]
        memory = None if workspace is None else workspace.setdefault(members[0], {})
        dtype = backend.compute_dtype(pairs[0].A.dtype, compute_dtype)
        fixed = None if fixed_B is None else [fixed_B[i] for i in members]
        group = RankGroup(backend, pairs, fixed_B=fixed, dtype=dtype, workspace=memory)
        grams.append(RankGrams(members, group, group.partner_gram(pairs)))
    return grams


def gram_powers(
    grams: Sequence[RankGrams],
    sizes: Sizes,
    *,
    placement: Placement,
    damping: float,
    damping_mode: DampingMode,
) -> Preconditioners:
    """The second half of `preconditioners`.

    Parameters
    ----------
    grams : sequence of RankGrams
        The Grams of whole factors, from `rank_grams`.
    sizes : sequence of (int, int)
        The m and n of all pairs, of whole factors too.
    placement, damping, damping_mode
        As `preconditioners` has them.
    """
    lists: tuple[list[Any], list[Any]] = ([None] * len(sizes), [None] * len(sizes))
    for members, group, S in grams:
        own = [sizes[i] for i in members]
        powers = split_power(group, S, own, placement, damping, damping_mode)
        for P, result in zip(powers, lists, strict=True):
            if P is not None:
                for i, pair in zip(members, group.multipliers(P), strict=True):
                    result[i] = pair
    first, second = lists
    return Preconditioners(
        None if placement == "after" else first, None if placement == "before" else second
    )


def precondition(
    backend: Backend,
    P: Sequence[Factors],
    grads: Sequence[Factors],
) -> list[Factors]:
    """``P_A G_A`` and ``G_B P_B`` for every pair; None stays None."""
    left = [i for i, G in enumerate(grads) if G.A is not None]
    right = [i for i, G in enumerate(grads) if G.B is not None]
    A = backend.apply_left([P[i].A for i in left], [grads[i].A for i in left])
    B = backend.apply_right([grads[i].B for i in right], [P[i].B for i in right])
    of_A, of_B = dict(zip(left, A, strict=True)), dict(zip(right, B, strict=True))
    places = range(len(grads))
    return list(map(Factors, map(of_A.get, places), map(of_B.get, places)))

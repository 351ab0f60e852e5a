"""The r x r algebra: Gram matrices of both factors, their damping, and powers of the result.

``S_A = A Aᵀ`` and ``S_B = Bᵀ B``. The metric of A is made of S_B and the other way round, so
everything here comes as ``Factors``: first the member that acts on A, then the one that acts on B.
"""

from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

from rlora.core.backend import ROUNDING, Backend, Workspace, mT
from rlora.core.bundle import Bundle, Stack, by_rank
from rlora.core.checks import ComputeDtype, check_choice, check_nonnegative
from rlora.core.factors import Array, Factors, device_of

DampingMode = Literal["relative", "absolute", "covariant"]
Side = Literal["A", "B"]


def check_damping(damping: Any, damping_mode: Any, compute_dtype: Any = None) -> None:
    """ValueError or TypeError unless they make sense."""
    check_nonnegative("damping", damping)
    check_choice("damping_mode", damping_mode, DampingMode)
    check_choice("compute_dtype", compute_dtype, ComputeDtype)


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
    grams = rank_grams(backend, params, compute_dtype=compute_dtype, workspace=workspace)
    return gram_powers(params, grams, exponent=exponent, damping=damping, damping_mode=damping_mode)


class RankGrams(NamedTuple):
    """The Grams of all pairs of one rank."""

    members: list[int]
    """Positions of the pairs."""
    bundle: Bundle
    S: Stack


def rank_grams(
    backend: Backend,
    params: Sequence[Factors],
    *,
    compute_dtype: str | None = None,
    workspace: Workspace | None = None,
) -> list[RankGrams]:
    """``A Aᵀ`` and ``Bᵀ B`` of every pair, rank by rank: the first half of `preconditioners`.

    Of pieces of a factor along its outer axis the Grams add up, so whoever has the pieces apart
    sums the stacks before the second half.
    """
    grams = []
    for members in by_rank(params, workspace):
        pairs = [params[i] for i in members]
        memory = None if workspace is None else workspace.setdefault(pairs[0].A.shape[-2], {})
        dtype = backend.compute_dtype(pairs[0].A.dtype, compute_dtype)
        bundle = Bundle(backend, pairs, dtype=dtype, workspace=memory)
        grams.append(RankGrams(members, bundle, bundle.gram(pairs)))
    return grams


def gram_powers(
    params: Sequence[Factors],
    grams: Sequence[RankGrams],
    *,
    damping: float,
    damping_mode: DampingMode,
    exponent: float = -1.0,
) -> list[Factors]:
    """The second half of `preconditioners`."""
    result: list[Factors] = list(params)
    for members, bundle, S in grams:
        P = metric_power(bundle, S, exponent, damping, damping_mode)
        for i, pair in zip(members, bundle.unstack(P), strict=True):
            result[i] = pair
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


def frozen_inverses(
    backend: Backend,
    params: Sequence[Factors],
    frozen: Side,
    *,
    damping: float,
    damping_mode: DampingMode,
    compute_dtype: str | None = None,
) -> list[Array]:
    """``S⁻¹`` of the factor that stays in every pair, which preconditions its partner.

    As `preconditioners`, with one Gram where that has two. The Gram of a frozen factor is no
    worse than its start: covariant damping leaves it as it is, whichever factor it is.
    """
    gram = backend.gram_rows if frozen == "A" else backend.gram_columns
    factors = [getattr(pair, frozen) for pair in params]
    inverses = list(factors)
    for members in by_rank(params):
        alike = [factors[i] for i in members]
        S = gram(alike, backend.compute_dtype(alike[0].dtype, compute_dtype))
        shift = 0.0 if damping_mode == "covariant" else damping
        P = backend.damped_power(S, -1.0, shift, relative=damping_mode == "relative")
        P = backend.cast(P, backend.compute_dtype(alike[0].dtype))
        for i, inverse in zip(members, backend.unstack(P, alike), strict=True):
            inverses[i] = inverse
    return inverses


def metric_power(
    bundle: Bundle,
    S: Stack,
    exponent: float = -1.0,
    damping: float = 0.0,
    damping_mode: DampingMode = "relative",
) -> Stack:
    """``H^exponent``, where the H of a factor is the damped Gram of its partner.

    `S` are the Grams of the factors themselves. A factor whose partner is zero gets 0.
    """
    power, concat = bundle.backend.damped_power, bundle.xp.concat
    if damping_mode != "covariant":
        return power(bundle.partner(S), exponent, damping, relative=damping_mode == "relative")
    S_A, S_B = bundle.halves(S)
    return power(concat([S_B + damping * power(S_A, -1.0), S_A]), exponent)


def without_null_space(bundle: Bundle, P: Stack, S: Stack) -> Stack:
    """P without the directions in which no partner of that shape can have anything.

    A rank above the outer side of a factor leaves its Gram a null space whatever its entries are,
    and in it a power of the damped Gram multiplies rounding by 1/damping.

    Parameters
    ----------
    bundle : Bundle
        The pairs.
    P : Stack
        What acts on each factor, such as `metric_power` gives it.
    S : Stack
        The Grams of the factors themselves.
    """
    r, xp, matmul = bundle.rank, bundle.xp, bundle.backend.matmul
    sides = [(pair.A.shape[-1], pair.B.shape[-2]) for pair in bundle.params]
    if all(min(both) >= r for both in sides):
        return P
    _, Q = bundle.backend.eigh(bundle.partner(S))
    first = bundle.partner(bundle.constant([(float(r - n), float(r - m)) for n, m in sides]))
    places = xp.arange(r, dtype=S.dtype, device=device_of(S))  # of ascending eigenvalues
    Q = xp.where(places < first, xp.zeros_like(Q), Q)
    kept = matmul(Q, mT(Q))
    return symmetric(matmul(matmul(kept, P), kept))


def tangent(
    bundle: Bundle, P: Stack, G: Sequence[Factors], X: Array | None = None
) -> list[Factors]:
    """The pair of moves whose effect on the product comes nearest to a full gradient G.

    ``D_A = S_B⁻¹ G_A + X A`` and ``D_B = (I - B S_B⁻¹ Bᵀ) G_B S_A⁻¹ - B X``, so that
    ``B D_A + D_B A`` is the projection of G on the tangent space of the rank-r matrices whatever
    the gauge X. Where the partner is frozen, the nearest move of one factor alone.

    Parameters
    ----------
    bundle : Bundle
        The pairs.
    P : Stack
        Inverse metrics: S_B⁻¹ for A and S_A⁻¹ for B.
    G : sequence of Factors
        ``Bᵀ G`` and ``G Aᵀ``.
    X : array of shape (K, r, r), optional
        The gauge; 0 by default.
    """
    matmul = bundle.backend.matmul
    P_A, P_B = bundle.halves(P)
    _, C = bundle.halves(bundle.cross(bundle.params, G))  # Bᵀ G_B
    both = bundle.both_move()
    Y = matmul(matmul(P_A, C), P_B)  # (K, r, r), what both factors would do twice
    X = bundle.xp.zeros_like(Y) if X is None else X
    from_params = bundle.apply(bundle.xp.concat([both * X, -both * mT(X + Y)]), bundle.params)
    return bundle.apply(P, G, onto=from_params)


def add(X: Sequence[Factors], Y: Sequence[Factors]) -> list[Factors]:
    """The sums, pair by pair."""
    return [Factors(x.A + y.A, x.B + y.B) for x, y in zip(X, Y, strict=True)]


def scale(c: Array | float, X: Sequence[Factors]) -> list[Factors]:
    """``c X``, pair by pair, with one number for all."""
    return [Factors(c * x.A, c * x.B) for x in X]


def symmetric(S: Array) -> Array:
    """The symmetric part, which rounding has left."""
    return 0.5 * (S + mT(S))


def congruence(backend: Backend, W: Array, S: Array) -> Array:
    """``W S Wᵀ``, symmetric as S is."""
    return symmetric(backend.matmul(backend.matmul(W, S), mT(W)))


def geometric_mean(backend: Backend, M: Array, S: Array) -> Array:
    """``M⁻¹ # S = M^-½ (M^½ S M^½)^½ M^-½`` of positive definite matrices."""
    xp = backend.xp
    m, s = (xp.reshape(xp.linalg.trace(X), (-1, 1, 1)) for X in (M, S))
    m, s = (xp.where(x > 0, x, xp.ones_like(x)) for x in (m, s))
    M, S = M / m, S / s  # what is below has their product
    W = backend.damped_power(M, -0.5)
    middle = backend.damped_power(congruence(backend, backend.matmul(M, W), S), 0.5)
    return congruence(backend, W, middle) * (s**0.5 / m**0.5)


def sylvester_spd(backend: Backend, P: Array, Q: Array, C: Array) -> Array:
    """The X of ``P X + X Q = C`` for positive semidefinite P and Q, in their eigenbases."""
    xp, matmul = backend.xp, backend.matmul
    (p, U), (q, V) = backend.eigh(P), backend.eigh(Q)
    sums = xp.expand_dims(p, axis=-1) + xp.expand_dims(q, axis=-2)  # (K, r, r)
    live = ~(
        sums <= ROUNDING * float(xp.finfo(C.dtype).eps) * xp.max(sums, axis=(-2, -1), keepdims=True)
    )
    rotated = matmul(matmul(mT(U), C), V)
    rotated = xp.where(live, rotated / xp.where(live, sums, xp.ones_like(sums)), 0 * sums)
    return matmul(matmul(U, rotated), mT(V))

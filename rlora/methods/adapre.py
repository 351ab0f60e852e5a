"""AdaPreLoRA: the pair of moves nearest to an Adafactor step of the weight, in that step's metric.

Z. Liu, F. Bian, J.-F. Cai. AdaPreLoRA: Adafactor Preconditioned Low-Rank Adaptation.
arXiv:2605.08734, 2026.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

from rlora.core.checks import check_nonnegative, check_unit, hyperparameters, is_zero
from rlora.core.decay import add_decayed_weights
from rlora.core.dispatch import get_backend
from rlora.core.factors import Array, Factors, Tree, in_pairs, map_pairs
from rlora.core.linalg import add, one_more, symmetric, tangent
from rlora.core.metric import DampingMode, check_damping, inverse_metric
from rlora.core.moments import corrected_decay, counts, momentum, over, per_pair
from rlora.core.rank_group import RankGroup, by_rank
from rlora.core.sizes import into_range
from rlora.core.transform import State, Transform, chain


class AdaPreState(NamedTuple):
    """State of AdaPreLoRA."""

    norms: Tree
    """Root of the average of the squared norms of the columns and of the rows of the gradient,
    (..., n) and (..., m): the squares themselves would leave the range long before it does."""

    count: Tree
    """Steps taken, one number a factor."""

    scaling: Tree
    """The s of each pair."""


@hyperparameters
def scale_by_adapre(
    b2: float = 0.999,
    eps: float = 1e-8,
    *,
    damping: float = 1e-6,
    damping_mode: DampingMode = "relative",
    compute_dtype: str | None = None,
) -> Transform:
    """The direction of `adapre_lora` without momentum, as a transformation."""
    check_unit("b2", b2)
    check_nonnegative("eps", eps)
    check_damping(damping, damping_mode)

    def init(params: Tree, scaling: float = 1.0) -> AdaPreState:
        def along(pair: Factors) -> Factors:
            xp = get_backend(pair.A).xp
            return Factors(xp.zeros_like(pair.A[..., 0, :]), xp.zeros_like(pair.B[..., 0]))

        return AdaPreState(map_pairs(along, params), counts(params), per_pair(params, scaling))

    def rule(group: RankGroup, G: list[Factors], state: State) -> tuple[list[Factors], AdaPreState]:
        xp = group.xp
        g = [over(G_k, s) for G_k, s in zip(G, state.scaling, strict=True)]
        g, number = _in_range(group, g)
        P = inverse_metric(group, group.partner_gram(group.params), damping, damping_mode)

        def average(old: Array, new: Array, count: Array) -> Array:
            decay = corrected_decay(xp, b2, count)[..., None]
            return _hypot(xp, decay**0.5 * old, (1 - decay) ** 0.5 * new)

        now = product_norms(group, tangent(group, P, g), number)
        norms = [
            Factors(*map(average, old, new, count))
            for old, new, count in zip(state.norms, now, state.count, strict=True)
        ]
        weights = [Factors(*(_root_weight(xp, x, eps) for x in pair)) for pair in norms]
        D = weighted_tangent(group, g, weights, damping, damping_mode)
        D = [over(d, s * c) for d, s, c in zip(D, state.scaling, number, strict=True)]
        return D, AdaPreState(norms, one_more(state.count), state.scaling)

    return by_rank(init, rule, compute_dtype=compute_dtype)


def _in_range(group: RankGroup, X: Sequence[Factors]) -> tuple[list[Factors], list[Array | float]]:
    """Both factors of each pair times one number that brings squares into range; the numbers."""
    _, found = into_range(group.backend, [x for pair in X for x in pair])
    if found is None:
        return list(X), [1.0] * len(X)
    numbers = [group.xp.minimum(*both) for both in in_pairs(found)]
    pairs = [Factors(c * x.A, c * x.B) for c, x in zip(numbers, X, strict=True)]
    return pairs, [c[..., 0, 0] for c in numbers]


def _hypot(xp: Any, x: Array, y: Array) -> Array:
    """``(x² + y²)^½`` of what is not negative, in range wherever x and y are."""
    most, least = xp.maximum(x, y), xp.minimum(x, y)
    ratio = least / xp.where(most == 0, xp.ones_like(most), most)
    return most * (1 + ratio**2) ** 0.5


def product_norms(
    group: RankGroup, D: Sequence[Factors], number: Sequence[Array | float]
) -> list[Factors]:
    """Norms of the columns and rows of ``B D_A + D_B A``, divided by one number for each pair."""
    D, own = _in_range(group, D)
    squares = energies(group, D)

    def row(c: Array | float) -> Array | float:
        return c if isinstance(c, float) else c[..., None]

    return [
        Factors(*(group.xp.clip(x, min=0.0) ** 0.5 / row(c) / row(d) for x in pair))
        for pair, c, d in zip(squares, own, number, strict=True)
    ]


def energies(group: RankGroup, D: Sequence[Factors]) -> list[Factors]:
    """Squares of ``B D_A + D_B A`` summed over its columns, (..., n), and rows, (..., m).

    In row form, with F and D of the factor and F', D' of its partner, column j of the product is
    ``F'ᵀ d_j + D'ᵀ f_j``: only r x r matrices of the partner are needed.
    """
    pairs, apply = group.params, group.apply
    own, mixed = group.partner_gram(pairs), group.partner_cross(pairs, D)
    left = add(apply(own, D), apply(2 * mixed, pairs))  # F'F'ᵀ d + 2 F'D'ᵀ f
    right = apply(group.partner_gram(D), pairs)  # D'D'ᵀ f
    total = group.xp.sum
    return [
        Factors(total(d.A * x.A + f.A * y.A, axis=-2), total(d.B * x.B + f.B * y.B, axis=-1))
        for f, d, x, y in zip(pairs, D, left, right, strict=True)
    ]


def _root_weight(xp: Any, norms: Array, eps: float) -> Array:
    """``(e / sqrt(sum e))^½`` of the squares e, each no less than eps times their mean.

    1 without a gradient yet.
    """
    most = xp.max(norms, axis=-1, keepdims=True)
    zero = most == 0
    most = xp.where(zero, xp.ones_like(most), most)
    energy = (norms / most) ** 2
    energy = energy + eps * xp.mean(energy, axis=-1, keepdims=True)
    total = xp.sum(energy, axis=-1, keepdims=True) ** 0.5
    weight = (energy / xp.where(zero, xp.ones_like(total), total)) ** 0.5
    return xp.where(zero, xp.ones_like(weight), weight * most**0.5)


def weighted_tangent(
    group: RankGroup,
    g: Sequence[Factors],
    weights: Sequence[Factors],
    damping: float,
    damping_mode: DampingMode,
) -> list[Factors]:
    """The pair of moves with ``B D_A + D_B A`` nearest to ``L^-½ G R^-½`` in the metric H.

    ``H[Y] = L^½ Y R^½``; of all such pairs the one with the least ``|B D_A - D_B A|_H``::

        D_A = S_B⁻¹ (g_A R^-½ - ½ g_A Aᵀ S_A⁻¹ A),   S_A = A R^½ Aᵀ
        D_B = (L^-½ g_B - ½ B S_B⁻¹ Bᵀ g_B) S_A⁻¹,    S_B = Bᵀ L^½ B

    Parameters
    ----------
    group : RankGroup
        The pairs.
    g : sequence of Factors
        ``Bᵀ G`` and ``G Aᵀ``.
    weights : sequence of Factors
        The diagonals of R^½, (..., n), and L^½, (..., m).
    damping, damping_mode
        Of S_A and S_B, see `rlora.core.metric.inverse_metric`.
    """
    matmul = group.backend.matmul
    weighted = [
        Factors(f.A * w.A[..., None, :], f.B * w.B[..., :, None])
        for f, w in zip(group.params, weights, strict=True)
    ]
    scaled = [
        Factors(x.A / w.A[..., None, :], x.B / w.B[..., :, None])
        for x, w in zip(g, weights, strict=True)
    ]
    S = symmetric(group.partner_cross(weighted, group.params))
    P = inverse_metric(group, S, damping, damping_mode)
    # From the left: the rounding of a product that already has one inverse in it would otherwise be
    # multiplied by the other one, and where both factors have lost rank both are huge.
    C = matmul(matmul(P, group.cross(g, group.params)), group.swap_sides(P))  # S'⁻¹ g Fᵀ S⁻¹
    both = group.both_move()
    halves = [both * X for X in group.halves(-0.5 * C)]
    shared = group.apply(group.xp.concat(halves), group.params)
    return add(group.apply(P, scaled), shared)


@hyperparameters
def adapre_lora(
    *,
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    damping: float = 1e-6,
    damping_mode: DampingMode = "relative",
    compute_dtype: str | None = None,
) -> Transform:
    """AdaPreLoRA, Adafactor-preconditioned low-rank adaptation.

    Adafactor would move the weight by ``G / sqrt(V)`` with ``V = l rᵀ / sum(l)``, l and r the
    averaged sums of squares of the rows and columns of G. The factors take, of all pairs of moves
    whose ``s (B D_A + D_B A)`` comes nearest to it in the norm ``<Y, sqrt(V) Y>``, the one whose
    two parts are nearest to each other (`rlora.methods.adapre.weighted_tangent`); then the momentum
    ``M <- b1 M + (1 - b1) D`` of those moves D, at first ``M = D``.

    Parameters
    ----------
    b1, b2 : float
        Decay rates of the momentum and of the energies, in [0, 1).
    eps : float
        At least 0; times the mean energy it is added to that of each row and column.
    weight_decay : float
        At least 0; decoupled, of each factor.
    damping, damping_mode, compute_dtype
        As in `rlora.scaled_adamw`, for the weighted Gram matrices and for those in the projection
        of G.

    Returns
    -------
    Transform
        State: m + n numbers and three more a pair; with momentum one array a factor and its count.

    Raises
    ------
    ValueError, TypeError
        When a hyperparameter is out of its range or of the wrong type.

    Notes
    -----
    An optimizer of factors does not see G: the energies are those of its projection on the tangent
    space, ``B D_A + D_B A``, which no split can change. So the product follows the same path
    however it is split, up to damping and where r is at most m and n. The paper's constants for the
    averages were not to be found; those here are Adam's, with the bias corrected as Adafactor does.

    References
    ----------
    Z. Liu, F. Bian, J.-F. Cai. AdaPreLoRA: Adafactor Preconditioned Low-Rank Adaptation.
    arXiv:2605.08734, 2026.

    Examples
    --------
    >>> import rlora
    >>> method = rlora.adapre_lora(b2=0.99)
    """
    adapre = scale_by_adapre(
        b2, eps, damping=damping, damping_mode=damping_mode, compute_dtype=compute_dtype
    )
    check_unit("b1", b1)
    chained = [adapre] if is_zero(b1) else [adapre, momentum(b1, dampening=b1)]
    return chain(*chained, add_decayed_weights(weight_decay))

"""Scaled Prodigy: scaled AdamW at a learning rate that each pair finds by itself.

K. Mishchenko, A. Defazio. Prodigy: An Expeditiously Adaptive Parameter-Free Learner.
arXiv:2306.06101, 2023.
"""

from typing import NamedTuple, cast

from rlora.core.checks import check_nonnegative, check_positive, default_rate, hyperparameters
from rlora.core.dispatch import get_backend
from rlora.core.factors import (
    Array,
    Factors,
    Tree,
    counterparts,
    leaves_of,
    map_leaves,
    pairs_of,
    rebuild,
    where_moving,
)
from rlora.core.metric import DampingMode, check_damping
from rlora.core.moments import AdamState, each, per_pair, scale_by_adam, zeros
from rlora.core.placement import precondition, preconditioners
from rlora.core.transform import State, Transform, chain


class DistanceState(NamedTuple):
    """Sums by which each pair bounds its distance to the solution."""

    start: Tree
    """The parameters before the first step."""

    total: Tree
    """Sum of the weighted preconditioned gradients, like the parameters."""

    gain: Tree
    """Sum of the weighted products of gradient and way back to the start, one number a pair."""

    noise: Tree
    """Sum of the squared entries of these products, one number a pair."""

    size: Tree
    """d, the learning rate found so far, one number a pair."""


class ProdigyState(NamedTuple):
    """State of scaled Prodigy: moments of the preconditioned gradients, and the distance."""

    adam: AdamState
    distance: DistanceState


@default_rate(1.0)
@hyperparameters
def scaled_prodigy(
    *,
    b1: float = 0.7,
    b2: float = 0.8,
    eps: float = 1e-8,
    weight_decay: float = 0.01,
    d0: float = 1e-4,
    damping: float = 1e-2,
    damping_mode: DampingMode = "covariant",
    compute_dtype: str | None = None,
) -> Transform:
    """Scaled AdamW whose learning rate need not be tuned: leave ``lr`` at 1.

    With P the half power of `rlora.scaled_adamw` and D its direction with ``placement="both"``,
    each pair keeps, from zero, ::

        q <- q + (d / d0)² (<G_A, A_0 - A> + <G_B, B_0 - B>)
        v <- v + (d / d0)⁴ (|G_A ∘ (A_0 - A)|² + |G_B ∘ (B_0 - B)|²)
        S <- S + (d / d0)² (P_A G_A, G_B P_Bᵀ)
        d <- max(d, (q - 2 v^½) / |S|_1)
        A <- A - lr d (D_A + λ A),    B <- B - lr d (D_B + λ B)

    with the start ``(A_0, B_0)`` and the sum ``|S|_1`` of the entries' absolute values.

    Parameters
    ----------
    b1, b2, eps, damping, damping_mode, compute_dtype
        As in `rlora.scaled_adamw`.
    weight_decay : float
        λ, at least 0; decoupled, with the rate that was found.
    d0 : float
        Positive: the first d, below every learning rate that might be right. d never falls; far
        below the right rate it grows tenfold in some ten steps.

    Returns
    -------
    Transform
        State: four arrays a factor and its step count, three numbers a pair.

    Raises
    ------
    ValueError, TypeError
        When a hyperparameter is out of its range or of the wrong type.

    Notes
    -----
    For a convex loss with the solution X*, ``<G_k, X_k - X*>`` is not negative, so that q is at
    most ``<S, P⁻¹ (X_0 - X*)>``, and ``q / |S|_1`` at most the distance to the solution in the
    largest entry, in the coordinates in which Adam steps by d in each entry; P counts as constant.
    Of gradients that are noise alone q has the variance v: less than two standard deviations count
    as nothing, or d of small layers runs away. A schedule belongs in ``lr``, and should end near 0.
    q, and S under triangular changes of basis, do not depend on how the product is split; v does,
    but for other scales of the directions of rank.

    d is found for each pair alone. In Prodigy one d serves all parameters, the sums forget with
    ``b2^½``, d is in the moments too, its first value is 1e-6, and nothing is taken off q.

    References
    ----------
    K. Mishchenko, A. Defazio. Prodigy: An Expeditiously Adaptive Parameter-Free Learner.
    arXiv:2306.06101, 2023.

    Examples
    --------
    >>> import rlora
    >>> method = rlora.scaled_prodigy()
    """
    adam = scale_by_adam(b1, b2, eps)
    check_nonnegative("weight_decay", weight_decay)
    check_positive("d0", d0)
    check_damping(damping, damping_mode, compute_dtype)

    def init(params: Tree, scaling: float = 1.0) -> ProdigyState:
        start = map_leaves(lambda x: x + 0, params)  # memory of its own: parameters may be donated
        numbers = [per_pair(params, x) for x in (0.0, 0.0, d0)]
        distance = DistanceState(start, zeros(params), *numbers)
        return ProdigyState(adam.init(params, scaling), distance)

    def update(grads: Tree, state: State, params: Tree) -> tuple[Tree, ProdigyState]:
        leaves = leaves_of(params)
        backend = get_backend(*leaves)
        with backend.exact(leaves[0]):
            P = preconditioners(
                backend,
                pairs_of(params),
                damping=damping,
                damping_mode=damping_mode,
                placement="both",  # so neither is None
                compute_dtype=compute_dtype,
            )
            first, second = cast("tuple[list[Factors], list[Factors]]", P)
            G = rebuild(params, precondition(backend, first, pairs_of(grads)))
            D, moments = adam.update(G, state.adam, params)
            D = rebuild(params, precondition(backend, second, pairs_of(D)))

        trees = counterparts(params, grads, G, params, *state.distance)
        found = [
            distance(g, h, pair, DistanceState(*before), d0)
            for g, h, pair, *before in zip(*trees, strict=True)
        ]

        def move(d: Factors, pair: Factors, now: DistanceState) -> Factors:
            rate = each(now.size)
            moved: Factors = map_leaves(lambda x, p: rate * (x + weight_decay * p), d, pair)
            return moved

        D = rebuild(params, map(move, *counterparts(params, D, params), found))
        fields = (rebuild(params, field) for field in zip(*found, strict=True))
        return D, ProdigyState(moments, DistanceState(*fields))

    return chain(Transform(init, update))


def distance(
    grads: Factors, G: Factors, pair: Factors, state: DistanceState, d0: float
) -> DistanceState:
    """The state of one pair after a gradient, which is `G` when preconditioned."""
    xp, weight = get_backend(pair.A).xp, (state.size / d0) ** 2

    def over_sides(x: Factors) -> Array:
        return sum(xp.sum(leaf, axis=(-2, -1)) for leaf in x if leaf is not None)

    way = map_leaves(lambda g, x, x0: each(weight) * g * (x0 - x), grads, pair, state.start)
    gain = state.gain + over_sides(way)
    noise = state.noise + over_sides(map_leaves(lambda x: x * x, way))
    added = map_leaves(lambda g, s: s + each(weight) * g, G, state.total)
    total = where_moving(grads, added, state.total)
    norm = over_sides(map_leaves(xp.abs, total))
    found = (gain - 2 * noise**0.5) / xp.where(norm == 0, xp.ones_like(norm), norm)
    return DistanceState(state.start, total, gain, noise, xp.maximum(state.size, found))

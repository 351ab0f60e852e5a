"""AltLoRA: one factor at a time, each with a momentum that follows the turns of the other.

X. Yu, Y. Wang, J. Chen, L. Xue. AltLoRA: Towards Better Gradient Approximation in Low-Rank
Adaptation with Alternating Projections. arXiv:2505.12455, 2025.
"""

from typing import NamedTuple

from rlora.core.checks import check_choice, check_nonnegative, check_unit, hyperparameters
from rlora.core.factors import Array, Factors, Tree
from rlora.core.linalg import no_overlap, record_overlap, to_new_coordinates
from rlora.core.metric import DampingMode, check_damping, inverse_metric
from rlora.core.moments import each, per_pair, small_zeros, zeros
from rlora.core.rank_group import RankGroup, by_rank
from rlora.core.transform import State, Transform, chain
from rlora.core.turns import First, decay_in_turn, next_turn, turns_of


class AltState(NamedTuple):
    """State of AltLoRA."""

    mu: Tree
    """Momentum, like the parameters."""

    overlap: Tree
    """The partner's new rows times its old ones, (..., r, r)."""

    count: Tree
    """Half-steps taken, their remainder by 2, one number a pair: whose turn it is."""

    scaling: Tree
    """The s of each pair."""


class AltPlusState(NamedTuple):
    """State of AltLoRA+: that of AltLoRA, and an entrywise second moment."""

    mu: Tree
    overlap: Tree
    count: Tree
    scaling: Tree
    nu: Tree


def alternate(
    *,
    b1: float,
    b2: float | None,
    eps: float,
    weight_decay: float,
    first: First,
    damping: float,
    damping_mode: DampingMode,
    compute_dtype: str | None,
) -> Transform:
    """`alt_lora`, or with a b2 `alt_lora_plus`, as a transformation."""
    check_unit("b1", b1)
    check_unit("b2", 0.0 if b2 is None else b2)
    check_nonnegative("eps", eps)
    check_choice("first", first, First)
    check_damping(damping, damping_mode)

    def init(params: Tree, scaling: float = 1.0) -> State:
        steps, scales = per_pair(params, 0.0), per_pair(params, scaling)
        common = zeros(params), small_zeros(params, 2), steps, scales
        return AltState(*common) if b2 is None else AltPlusState(*common, zeros(params))

    def rule(group: RankGroup, G: list[Factors], state: State) -> tuple[list[Factors], State]:
        xp = group.xp
        S = group.partner_gram(group.params)
        T = to_new_coordinates(group, S, state.overlap)
        mu = group.apply(T, state.mu)
        g = group.apply(inverse_metric(group, S, damping, damping_mode), G)
        turns = [turns_of(first, *k) for k in zip(state.count, group.moving, strict=True)]

        def move(k: int, letter: str) -> tuple[Array, Array, Array | None]:
            """Direction and moments; what has not its turn rests, its momentum carried along."""
            old, g_k = getattr(mu[k], letter), getattr(g[k], letter) / each(state.scaling[k]) ** 2
            m = b1 * old + (1 - b1) * g_k
            turn = each(getattr(turns[k], letter))
            if b2 is None:
                return xp.where(turn, m, xp.zeros_like(m)), xp.where(turn, m, old), None
            nu = getattr(state.nu[k], letter)
            v = b2 * nu + (1 - b2) * g_k * g_k
            d = xp.where(turn, m / (xp.sqrt(v) + eps), xp.zeros_like(m))
            return d, xp.where(turn, m, old), xp.where(turn, v, nu)

        moves = [(move(k, "A"), move(k, "B")) for k in range(len(group.params))]
        D, mu, nu = ([Factors(a[i], b[i]) for a, b in moves] for i in range(3))
        count = list(map(next_turn, state.count))
        moved = state._replace(mu=mu, overlap=no_overlap(group, T), count=count)
        return D, moved if b2 is None else moved._replace(nu=nu)

    plain = b2 is None  # Adam's direction does not shrink with the gradient
    transform = by_rank(
        init,
        rule,
        transport=record_overlap,
        compute_dtype=compute_dtype,
        rescaled=plain,
        sharded=True,
    )
    return decay_in_turn(transform, weight_decay, first, "count")


@hyperparameters
def alt_lora(
    *,
    b1: float = 0.9,
    weight_decay: float = 0.0,
    first: First = "B",
    damping: float = 1e-6,
    damping_mode: DampingMode = "relative",
    compute_dtype: str | None = None,
) -> Transform:
    """AltLoRA, alternating projections.

    In turns, one of the factors moves and the other rests::

        M_A = b1 S_B⁻¹ Bᵀ B_old M_A + (1 - b1) (S_B + ..)⁻¹ G_A / s²,   A = A - lr (M_A + λ A)
        M_B = b1 M_B A_old Aᵀ S_A⁻¹ + (1 - b1) G_B (S_A + ..)⁻¹ / s²,   B = B - lr (M_B + λ B)

    with ``S_A = A Aᵀ``, ``S_B = Bᵀ B`` and the damping in place of the dots. The weight moves by
    the projection of the full gradient on one of the factors' spaces: nothing is counted twice, and
    no product of two moves is left.

    Parameters
    ----------
    b1 : float
        Momentum, in [0, 1).
    weight_decay : float
        λ, at least 0; decoupled, of the factor whose turn it is.
    first : {"A", "B"}
        Who begins. The paper's algorithm begins with A and its ablation finds B better, which also
        is the one that can move from B = 0.
    damping, damping_mode, compute_dtype
        As in `rlora.scaled_adamw`.

    Returns
    -------
    Transform
        State: one array a factor, and for each r² numbers; two numbers a pair.

    Raises
    ------
    ValueError, TypeError
        When a hyperparameter is out of its range or of the wrong type.

    Notes
    -----
    A step moves one factor: two gradients make one round. Where a factor is frozen the other one
    moves every time. Undamped, the product follows the same path however it is split, where r is at
    most m and n. There is no bias correction. The old factors are not stored, only ``B_oldᵀ B``,
    which `transport` writes down. The paper's damping is 1e-6, absolute; the authors' code corrects
    the first moment's bias, and in AltLoRA+ stores that moment without carrying it along.

    References
    ----------
    X. Yu, Y. Wang, J. Chen, L. Xue. AltLoRA: Towards Better Gradient Approximation in Low-Rank
    Adaptation with Alternating Projections. arXiv:2505.12455, 2025.

    Examples
    --------
    >>> import rlora
    >>> method = rlora.alt_lora(b1=0.9)
    """
    transform = alternate(
        b1=b1,
        b2=None,
        eps=0.0,
        weight_decay=weight_decay,
        first=first,
        damping=damping,
        damping_mode=damping_mode,
        compute_dtype=compute_dtype,
    )
    return chain(transform)


@hyperparameters
def alt_lora_plus(
    *,
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    first: First = "B",
    damping: float = 1e-6,
    damping_mode: DampingMode = "relative",
    compute_dtype: str | None = None,
) -> Transform:
    """AltLoRA+, AltLoRA with an entrywise second moment.

    As `alt_lora`, with ``V = b2 V + (1 - b2) g∘g`` of the preconditioned gradient g and the move
    ``M / (sqrt(V) + eps)``, without bias correction, as in the paper.

    Parameters
    ----------
    b1, b2 : float
        Decay rates, in [0, 1).
    eps : float
        At least 0.
    weight_decay, first, damping, damping_mode, compute_dtype
        As in `alt_lora`.

    Returns
    -------
    Transform
        State: two arrays a factor, and for each r² numbers; two numbers a pair.

    Raises
    ------
    ValueError, TypeError
        When a hyperparameter is out of its range or of the wrong type.

    Notes
    -----
    The entrywise moment breaks the invariance that AltLoRA has, down to signed permutations.

    References
    ----------
    X. Yu, Y. Wang, J. Chen, L. Xue. AltLoRA: Towards Better Gradient Approximation in Low-Rank
    Adaptation with Alternating Projections. arXiv:2505.12455, 2025.

    Examples
    --------
    >>> import rlora
    >>> method = rlora.alt_lora_plus(b2=0.99)
    """
    check_unit("b2", b2)  # None would leave the momentum alone
    transform = alternate(
        b1=b1,
        b2=b2,
        eps=eps,
        weight_decay=weight_decay,
        first=first,
        damping=damping,
        damping_mode=damping_mode,
        compute_dtype=compute_dtype,
    )
    return chain(transform)

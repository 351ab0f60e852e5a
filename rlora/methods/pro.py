"""LoRA-Pro: moves of the factors whose joint effect on the weight is nearest to full fine-tuning.

Z. Wang, J. Liang, R. He, Z. Wang, T. Tan. LoRA-Pro: Are Low-Rank Adapters Properly Optimized?
arXiv:2407.18242, 2024.
"""

from typing import Literal, NamedTuple

from rlora.core.checks import check_choice, check_nonnegative, check_unit, hyperparameters, is_zero
from rlora.core.decay import add_decayed_weights, decay_product
from rlora.core.dispatch import get_backend
from rlora.core.factors import Array, Factors, Tree, device_of, map_pairs
from rlora.core.linalg import sylvester_spd, tangent
from rlora.core.metric import DampingMode, check_damping, inverse_metric
from rlora.core.moments import (
    adam_step,
    each,
    keep_scaling,
    momentum as add_momentum,
    per_pair,
    scale_by_adam,
)
from rlora.core.rank_group import RankGroup, Stack, by_rank
from rlora.core.transform import State, Transform, chain

Gauge = Literal["sylvester", "balanced", "zero"]
Mode = Literal["efficient", "full"]


@hyperparameters
def scale_by_pro(
    gauge: Gauge = "sylvester",
    *,
    damping: float = 1e-6,
    damping_mode: DampingMode = "relative",
    compute_dtype: str | None = None,
) -> Transform:
    """The direction of `lora_pro_sgd`, as a transformation."""
    check_choice("gauge", gauge, Gauge)
    check_damping(damping, damping_mode)

    def rule(group: RankGroup, G: list[Factors], state: State) -> tuple[list[Factors], State]:
        S = group.partner_gram(group.params)
        P = inverse_metric(group, S, damping, damping_mode)
        cross = group.cross(group.params, G)
        X = gauge_of(gauge, group, S, P, cross)
        s = group.per_layer([Factors(s, s) for s in state.scaling])
        return tangent(group, P, G, X, cross=cross, scale=1 / s**2), state

    return by_rank(keep_scaling, rule, compute_dtype=compute_dtype, sharded=True)


def gauge_of(gauge: Gauge, group: RankGroup, S: Stack, P: Stack, cross: Stack) -> Array | None:
    """The X of the solution family, (K, r, r), in units in which s is 1.

    `cross` has ``A G_Aᵀ`` and ``Bᵀ G_B``.
    """
    if gauge == "zero":
        return None
    backend, matmul = group.backend, group.backend.matmul
    P_A, P_B = group.halves(P)  # S_B⁻¹, S_A⁻¹
    C_A, C_B = group.halves(cross)
    if gauge == "balanced":
        return -0.5 * matmul(matmul(P_A, C_B), P_B)
    S_B, S_A = group.halves(S)  # those of the partners
    C = -matmul(P_A, C_A.mT)
    if group.numbers is not None:  # huge factors: c_B² S_B to c_A² S_A, neither enlarged
        c_A, c_B = group.halves(group.stack(group.numbers))
        most = group.xp.maximum(c_A, c_B)
        by_A, by_B = (c_A / most) ** 2, (c_B / most) ** 2
        S_A, S_B, C = by_A * S_A, by_B * S_B, by_A * C
    return sylvester_spd(backend, S_B, S_A, C)


class FullState(NamedTuple):
    """Adam's moments of the equivalent gradient, and the s of each pair."""

    mu: Tree
    """(..., m, n)."""

    nu: Tree
    """(..., m, n)."""

    count: Tree
    """Steps taken, one number a pair."""

    scaling: Tree
    """The s of each pair."""


@hyperparameters
def scale_by_full_adam(
    gauge: Gauge = "sylvester",
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-8,
    *,
    damping: float = 1e-6,
    damping_mode: DampingMode = "relative",
    compute_dtype: str | None = None,
) -> Transform:
    """The direction of `lora_pro_adamw` in the mode "full", as a transformation."""
    check_choice("gauge", gauge, Gauge)
    check_damping(damping, damping_mode)
    check_unit("b1", b1)
    check_unit("b2", b2)
    check_nonnegative("eps", eps)

    def init(params: Tree, scaling: float = 1.0) -> FullState:
        def moment(pair: Factors) -> Array:
            A, shape = pair.A, (*pair.B.shape[:-1], pair.A.shape[-1])  # (..., m, n)
            return get_backend(A).xp.zeros(shape, dtype=A.dtype, device=device_of(A))

        mu, nu = map_pairs(moment, params), map_pairs(moment, params)
        return FullState(mu, nu, per_pair(params, 0.0), per_pair(params, scaling))

    def rule(group: RankGroup, G: list[Factors], state: State) -> tuple[list[Factors], FullState]:
        matmul = group.backend.matmul
        S = group.partner_gram(group.params)
        P = inverse_metric(group, S, damping, damping_mode)
        g = tangent(group, P, G)  # times s²: the equivalent gradient is the same in every gauge

        moments: list[list[Array]] = []
        G = []
        for k, (pair, move, s) in enumerate(zip(group.params, g, state.scaling, strict=True)):
            equivalent = (matmul(pair.B, move.A) + matmul(move.B, pair.A)) / each(s)  # (..., m, n)
            # One pair at a time: beside the states only one pair's m x n numbers are kept.
            own = [state.mu[k]], [state.nu[k]], [state.count[k]], [equivalent]
            *new, (d,) = adam_step(*own, b1, b2, eps)
            moments.append([x for (x,) in new])
            G.append(Factors(matmul(pair.B.mT, d), matmul(d, pair.A.mT)))
        mu, nu, count = (list(column) for column in zip(*moments, strict=True))
        cross = group.cross(group.params, G)
        X = gauge_of(gauge, group, S, P, cross)
        s = group.per_layer([Factors(s, s) for s in state.scaling])
        D = tangent(group, P, G, X, cross=cross, scale=1 / s)
        return D, FullState(mu, nu, count, state.scaling)

    return by_rank(init, rule, compute_dtype=compute_dtype)


@hyperparameters
def lora_pro_sgd(
    *,
    gauge: Gauge = "sylvester",
    momentum: float = 0.0,
    weight_decay: float = 0.0,
    damping: float = 1e-6,
    damping_mode: DampingMode = "relative",
    compute_dtype: str | None = None,
) -> Transform:
    """LoRA-Pro with gradient descent.

    ``A <- A - lr g_A`` and ``B <- B - lr g_B`` with, for ``S_A = A Aᵀ`` and ``S_B = Bᵀ B``::

        g_A = S_B⁻¹ G_A / s² + X A
        g_B = (I - B S_B⁻¹ Bᵀ) G_B S_A⁻¹ / s² - B X

    Whatever the gauge X, the equivalent gradient ``s B g_A + s g_B A`` is the same: the projection
    of the full gradient on what a rank-r product can do to first order.

    Parameters
    ----------
    gauge : {"sylvester", "balanced", "zero"}
        The X with ``S_B X + X S_A = -S_B⁻¹ G_A Aᵀ / s²``, which brings g_A and g_B nearest to G_A
        and G_B; ``X = -½ S_B⁻¹ Bᵀ G_B S_A⁻¹ / s²``, which shares what both could do; or 0.
    momentum : float
        In [0, 1); of the direction. The authors' code takes one and ignores it.
    weight_decay : float
        At least 0; decoupled, of each factor.
    damping, damping_mode, compute_dtype
        As in `rlora.scaled_adamw`.

    Returns
    -------
    Transform
        State: one number a pair; with momentum one array a factor and its step count more.

    Raises
    ------
    ValueError, TypeError
        When a hyperparameter is out of its range or of the wrong type.

    Notes
    -----
    With X zero or balanced, no damping and r at most m and n, also with momentum, the product
    follows the same path however it is split; with the Sylvester gauge it does not, as ``δB δA``
    depends on X. The inverses are damped, the S_A and S_B beside X are not. Of a pair with a frozen
    factor the other one gets the nearest move it can do alone.

    References
    ----------
    Z. Wang, J. Liang, R. He, Z. Wang, T. Tan. LoRA-Pro: Are Low-Rank Adapters Properly Optimized?
    arXiv:2407.18242, 2024.

    Examples
    --------
    >>> import rlora
    >>> method = rlora.lora_pro_sgd(gauge="balanced", momentum=0.9)
    """
    pro = scale_by_pro(
        gauge, damping=damping, damping_mode=damping_mode, compute_dtype=compute_dtype
    )
    chained = [pro] if is_zero(momentum) else [pro, add_momentum(momentum)]
    return chain(*chained, add_decayed_weights(weight_decay))


@hyperparameters
def lora_pro_adamw(
    *,
    mode: Mode = "efficient",
    gauge: Gauge = "sylvester",
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    damping: float = 1e-6,
    damping_mode: DampingMode = "relative",
    compute_dtype: str | None = None,
) -> Transform:
    """LoRA-Pro with AdamW.

    "efficient" gives the g_A and g_B of `lora_pro_sgd` to Adam, entry by entry. "full" keeps Adam's
    moments of the equivalent gradient ``s B g_A + s g_B A``, (m, n), and takes the g_A and g_B that
    come nearest to Adam's direction.

    Parameters
    ----------
    mode : {"efficient", "full"}
        Where the moments live: in the factors, or in the weight.
    gauge : {"sylvester", "balanced", "zero"}
        See `lora_pro_sgd`.
    b1, b2 : float
        Decay rates of the moments, in [0, 1).
    eps : float
        At least 0.
    weight_decay : float
        λ, at least 0; decoupled. "efficient" shrinks each factor by ``1 - lr λ``; "full" by its
        square root, so that B A shrinks by ``1 - lr λ``. (The authors shrink the base weight as
        well, which an optimizer of factors does not own.)
    damping, damping_mode, compute_dtype
        As in `rlora.scaled_adamw`.

    Returns
    -------
    Transform
        State: "efficient" two arrays a factor; "full" two arrays (m, n) a pair, as much as full
        fine-tuning.

    Raises
    ------
    ValueError, TypeError
        When a hyperparameter is out of its range or of the wrong type.

    Notes
    -----
    "full" with X zero or balanced and no damping keeps to one path of the product however it is
    split; "efficient" only under signed permutations of the rank axis. "balanced" has the inverse
    of S_A where the published "symmetry" has S_A; the bias correction begins with t = 1.

    References
    ----------
    Z. Wang, J. Liang, R. He, Z. Wang, T. Tan. LoRA-Pro: Are Low-Rank Adapters Properly Optimized?
    arXiv:2407.18242, 2024.

    Examples
    --------
    >>> import rlora
    >>> method = rlora.lora_pro_adamw(gauge="zero", weight_decay=0.01)
    """
    check_choice("mode", mode, Mode)
    check_nonnegative("weight_decay", weight_decay)
    if mode == "efficient":
        pro = scale_by_pro(
            gauge, damping=damping, damping_mode=damping_mode, compute_dtype=compute_dtype
        )
        return chain(pro, scale_by_adam(b1, b2, eps), add_decayed_weights(weight_decay))
    full = scale_by_full_adam(
        gauge, b1, b2, eps, damping=damping, damping_mode=damping_mode, compute_dtype=compute_dtype
    )
    return chain(full, decay_product(weight_decay))

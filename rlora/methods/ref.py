"""RefLoRA: each step is taken from the balanced one of all ways to split the product.

Y. Zhang, B. Li, G. B. Giannakis. RefLoRA: Refactored Low-Rank Adaptation for Efficient Fine-Tuning
of Large Models. arXiv:2505.18877, 2025.
"""

from typing import Literal

from rlora.core.algebra import eye_like, traces
from rlora.core.checks import check_choice, hyperparameters, is_zero
from rlora.core.decay import add_decayed_weights
from rlora.core.factors import Factors
from rlora.core.linalg import geometric_mean
from rlora.core.moments import momentum as add_momentum
from rlora.core.rank_group import RankGroup, Stack, by_rank
from rlora.core.transform import State, Transform, chain, no_state

Form = Literal["matrix", "scalar"]


def scale_by_refactor(form: Form = "matrix", *, compute_dtype: str | None = None) -> Transform:
    """The direction ``K G_A`` and ``G_B K⁻¹`` of `ref_lora`, as a transformation."""
    check_choice("form", form, Form)

    def rule(group: RankGroup, G: list[Factors], state: State) -> tuple[list[Factors], State]:
        S = group.gram(group.params)
        return group.apply(balancing(group, S, form), G), state

    return by_rank(no_state, rule, compute_dtype=compute_dtype, rescaled=False, sharded=True)


def balancing(group: RankGroup, S: Stack, form: Form) -> Stack:
    """``K = S_B⁻¹ # S_A`` for A and its inverse for B; the identity where a factor is zero."""
    backend, xp = group.backend, group.xp
    partner = group.swap_sides(S)
    own_trace, its_trace = traces(xp, S), traces(xp, partner)
    eye = eye_like(xp, S)
    zero = (own_trace == 0) | (its_trace == 0)
    if form == "scalar":
        # Each root by itself: a ratio of traces may be out of range where that of norms is not.
        K = own_trace**0.5 / xp.where(zero, xp.ones_like(its_trace), its_trace) ** 0.5 * eye
    else:
        K = geometric_mean(backend, partner, S)
    if group.numbers is not None:
        c = group.stack(group.numbers)
        K = K * (c / group.swap_sides(c))
    return xp.where(zero, eye, K)


@hyperparameters
def ref_lora(
    *,
    form: Form = "matrix",
    momentum: float = 0.0,
    weight_decay: float = 0.0,
    compute_dtype: str | None = None,
) -> Transform:
    """RefLoRA, refactored low-rank adaptation, with gradient descent.

    ``A <- A - lr K G_A`` and ``B <- B - lr G_B K⁻¹`` with the matrix geometric mean ``K = S_B⁻¹ #
    S_A`` of the inverse ``(Bᵀ B)⁻¹`` and ``A Aᵀ``: what plain gradient descent does from the split
    in which ``A Aᵀ = Bᵀ B``. The scalar form has ``K = |A|_F / |B|_F``.

    Parameters
    ----------
    form : {"matrix", "scalar"}
        The best split of all, or the best up to a scale.
    momentum : float
        In [0, 1); of the direction.
    weight_decay : float
        At least 0; decoupled, of each factor.
    compute_dtype : {None, "float32", "float64"}
        Precision of the r x r algebra; None is the parameters' own, at least float32.

    Returns
    -------
    Transform
        State: with momentum one array a factor and its step count; else none.

    Raises
    ------
    ValueError, TypeError
        When a hyperparameter is out of its range or of the wrong type.

    Notes
    -----
    Where r is at most m and n, the product follows the same path however it is split (the scalar
    form: up to scalings and rotations). There is no balanced split of a zero product: from B = 0
    the first step is a plain one, and those after it are short, as K⁻¹ grows with B. Start from
    `rlora.initializers.pissa` or `lora_one`. The paper also has Adam: `scale_by_refactor` chains
    with `rlora.core.moments.scale_by_adam`, without the invariance.

    References
    ----------
    Y. Zhang, B. Li, G. B. Giannakis. RefLoRA: Refactored Low-Rank Adaptation for Efficient
    Fine-Tuning of Large Models. arXiv:2505.18877, 2025.

    Examples
    --------
    >>> import rlora
    >>> method = rlora.ref_lora(momentum=0.9)
    """
    refactor = scale_by_refactor(form, compute_dtype=compute_dtype)
    chained = [refactor] if is_zero(momentum) else [refactor, add_momentum(momentum)]
    return chain(*chained, add_decayed_weights(weight_decay))

"""Muon on each factor by itself, a baseline for those that look at the product.

X. Qu, P. Huang, S. Horváth. Can Muon Fine-tune Adam-Pretrained Models? arXiv:2605.10468, 2026.
K. Jordan et al. Muon: An optimizer for hidden layers in neural networks. 2024. The size of the step
is that of J. Liu et al. Muon is Scalable for LLM Training. arXiv:2502.16982, 2025.
"""

from rlora.core.checks import check_unit, hyperparameters, is_zero
from rlora.core.decay import add_decayed_weights
from rlora.core.factors import Factors
from rlora.core.moments import momentum as add_momentum
from rlora.core.rank_group import RankGroup, by_rank
from rlora.core.transform import State, Transform, chain, no_state

RMS = 0.2
"""Root mean square of the entries of a step, as AdamW's have it."""


def scale_by_sign(*, compute_dtype: str | None = None) -> Transform:
    """``0.2 sqrt(max(r, N)) msign(M)`` of each factor, without momentum, as a transformation."""

    def rule(group: RankGroup, M: list[Factors], state: State) -> tuple[list[Factors], State]:
        M, _ = group.in_range(M)  # of which msign knows the direction alone
        r = float(group.rank)
        sides = [(pair.A.shape[-1], pair.B.shape[-2]) for pair in group.params]
        size = group.constant([(RMS * max(r, n) ** 0.5, RMS * max(r, m) ** 0.5) for n, m in sides])
        sign = group.backend.pseudo_power(group.gram(M), -0.5, group.lost)
        return group.apply(size * sign, M), state

    return by_rank(no_state, rule, compute_dtype=compute_dtype, rescaled=False, sharded=True)


@hyperparameters
def factor_muon(
    *,
    b1: float = 0.95,
    nesterov: bool = True,
    weight_decay: float = 0.0,
    compute_dtype: str | None = None,
) -> Transform:
    """Muon for A and B as if they had nothing to do with each other.

    With the momentum ``M <- b1 M + G`` of each factor, A (r, n) and B (m, r), and msign(X) the
    nearest matrix with orthonormal rows or columns::

        A <- A - lr (0.2 sqrt(max(r, n)) msign(G_A + b1 M_A) + λ A)
        B <- B - lr (0.2 sqrt(max(m, r)) msign(G_B + b1 M_B) + λ B)

    so that a step's entries have the root mean square 0.2 of AdamW's.

    Parameters
    ----------
    b1 : float
        Momentum, in [0, 1).
    nesterov : bool
        Look ahead, as above; otherwise msign(M). Without effect when b1 is 0.
    weight_decay : float
        λ, at least 0; decoupled.
    compute_dtype : {None, "float32", "float64"}
        Precision of the r x r algebra; None is the parameters' own, at least float32.

    Returns
    -------
    Transform
        State: one array a factor and its step count.

    Raises
    ------
    ValueError, TypeError
        When a hyperparameter is out of its range or of the wrong type.

    Notes
    -----
    How far the product moves depends on how it is split; only rotations of the rank leave its path.
    `lora_muon` is Muon for the product. msign is exact here, on CUDA as in `lora_muon`; the five
    Newton-Schulz steps of the authors leave singular values above 3e-3 of the largest between 0.68
    and 1.2. Directions of M that are weaker than the share of `lora_muon` do not move.

    References
    ----------
    X. Qu, P. Huang, S. Horváth. Can Muon Fine-tune Adam-Pretrained Models? arXiv:2605.10468, 2026.

    Examples
    --------
    >>> import rlora
    >>> method = rlora.factor_muon(weight_decay=0.01)
    """
    check_unit("b1", b1)
    moment = [] if is_zero(b1) else [add_momentum(b1, nesterov=nesterov)]
    sign = scale_by_sign(compute_dtype=compute_dtype)
    return chain(*moment, sign, add_decayed_weights(weight_decay))

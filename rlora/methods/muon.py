"""LoRA-Muon: steepest descent of the product in the spectral norm, half of it by each factor.

F. L. Cesista, K. Crowson, C. Simal, S. Biderman. LoRA-Muon: Spectral Steepest Descent on the
Low-Rank Manifold. arXiv:2606.12921, 2026. The same step without decay is iMuon's for the metric of
a product: Intrinsic Muon: Spectral Optimization on Riemannian Matrix Manifolds. arXiv:2605.09238,
2026.
"""

from rlora.core.checks import check_unit, hyperparameters, is_zero
from rlora.core.decay import decay_product_around
from rlora.core.factors import Factors
from rlora.core.linalg import congruence
from rlora.core.moments import keep_scaling, momentum as add_momentum, over
from rlora.core.rank_group import RankGroup, by_rank
from rlora.core.transform import State, Transform, chain


def scale_by_spectral_norm(*, compute_dtype: str | None = None) -> Transform:
    """The direction of `lora_muon` without momentum, as a transformation.

    ``S_B^-½ msign(S_B^-½ M_A) = Wᵀ (W M_A M_Aᵀ Wᵀ)^-½ W M_A`` for any W with ``Wᵀ W = S_B⁻¹``: one
    product of the tall matrix.
    """

    def rule(group: RankGroup, M: list[Factors], state: State) -> tuple[list[Factors], State]:
        backend = group.backend
        W = backend.pseudo_half(group.partner_gram(group.params), group.lost)
        M, _ = group.in_range(M)  # of which msign knows the direction alone
        sign = backend.pseudo_power(congruence(backend, W, group.gram(M)), -0.5, group.lost)
        D = group.apply(congruence(backend, W.mT, sign), M)
        return [over(d, 2 * s) for d, s in zip(D, state.scaling, strict=True)], state

    return by_rank(keep_scaling, rule, compute_dtype=compute_dtype, sharded=True)


@hyperparameters
def lora_muon(
    *,
    b1: float = 0.95,
    nesterov: bool = False,
    weight_decay: float = 0.0,
    compute_dtype: str | None = None,
) -> Transform:
    """LoRA-Muon, spectral steepest descent on the product.

    With the momentum ``M <- b1 M + G`` of each factor, ``c = sqrt(1 - lr λ)`` and msign(X) the
    nearest matrix with orthonormal rows or columns::

        A <- c A - lr / (2 s c) S_B^-½ msign(S_B^-½ M_A)
        B <- c B - lr / (2 s c) msign(M_B S_A^-½) S_A^-½

    Each half moves the weight by ``lr / 2`` in the spectral norm, whatever the factors are.

    Parameters
    ----------
    b1 : float
        Momentum, in [0, 1).
    nesterov : bool
        Look ahead, ``G + b1 M`` in place of M.
    weight_decay : float
        λ, at least 0; the product shrinks by ``1 - lr λ``.
    compute_dtype : {None, "float32", "float64"}
        Precision of the r x r algebra; None is the parameters' own, at least float32.

    Returns
    -------
    Transform
        State: one array a factor and its step count, and one number a pair.

    Raises
    ------
    ValueError, TypeError
        When a hyperparameter is out of its range or of the wrong type.

    Notes
    -----
    Where r is at most m and n, the product follows the same path however it is split. The move has
    the size of the learning rate in every direction in which ``S_B^-½ M_A`` has a singular value
    above ``sqrt(10 r eps)`` of their root mean square, eps that of the factors' dtype, or float32's
    for narrower ones (0.2 % at r = 4, 0.9 % at r = 64), and at least 1.2e-4 of it; weaker ones do
    not move. As the factors shrink their moves grow: right after B = 0, A moves by as much as it is
    large. Roots and signs are exact, by factorisations; the paper has Newton-Schulz iterations. On
    a CUDA device, where an eigendecomposition would wait, they are those of matrices with a
    relative damping of sqrt(eps): in float32 a direction of 5 % of the root mean square moves by
    0.9, one of 2.5 % by 0.4, one of 1 % hardly.

    References
    ----------
    F. L. Cesista, K. Crowson, C. Simal, S. Biderman. LoRA-Muon: Spectral Steepest Descent on the
    Low-Rank Manifold. arXiv:2606.12921, 2026.

    Examples
    --------
    >>> import rlora
    >>> method = rlora.lora_muon(b1=0.95, weight_decay=0.01)
    """
    check_unit("b1", b1)
    spectral_norm = scale_by_spectral_norm(compute_dtype=compute_dtype)
    moment = [] if is_zero(b1) else [add_momentum(b1, nesterov=nesterov)]
    return chain(*moment, spectral_norm, decay_product_around(weight_decay))

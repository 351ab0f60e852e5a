"""Scaled gradient descent and scaled AdamW: each gradient times the inverse Gram of the partner.

F. Zhang, M. Pilanci. Riemannian Preconditioned LoRA for Fine-Tuning Foundation Models.
arXiv:2402.02347, 2024.
"""

from typing import Any, Final

from rlora.core.checks import check_choice, hyperparameters, is_zero
from rlora.core.decay import Decay, add_decayed_weights, decayed_weights
from rlora.core.dispatch import get_backend
from rlora.core.errors import PairingError
from rlora.core.factors import Factors, Tree, leaves_of, pairs_of, rebuild
from rlora.core.metric import DampingMode, Placement, check_damping
from rlora.core.moments import EpsForm, momentum as add_momentum, scale_by_adam
from rlora.core.placement import precondition, preconditioners
from rlora.core.transform import Order, State, Transform, chain, no_state, pass_on

PEFT: Final[dict[str, Any]] = {
    "b1": 0.9,
    "b2": 0.999,
    "damping": 1e-2,
    "damping_mode": "absolute",
    "placement": "before",
}
"""`scaled_adamw` as PEFT's ``create_riemannian_optimizer`` over AdamW. Over SGD it is
``scaled_sgd(damping=1e-2, damping_mode="absolute")``."""

OFFICIAL: Final[dict[str, Any]] = {
    "b1": 0.9,
    "b2": 0.98,
    "eps": 1e-6,
    "damping": 1e-6,
    "damping_mode": "absolute",
    "placement": "before",
    "order": "gauss_seidel",
    "eps_form": "hf",
    "decay": "after",
}
"""`scaled_adamw` as the authors' GPT-2 code has it. Their Mistral code: ``b2=0.999`` and
``bias_correction=False`` on top."""


@hyperparameters
def scale_by_gram(
    inner: Transform | None = None,
    *,
    damping: float = 1e-4,
    damping_mode: DampingMode = "covariant",
    placement: Placement = "before",
    order: Order = "jacobi",
    compute_dtype: str | None = None,
) -> Transform:
    """Precondition each factor by the damped Gram of its partner, around another transform.

    With ``H_A`` the damped ``Bᵀ B`` and ``H_B`` the damped ``A Aᵀ``::

        before   inner(H_A⁻¹ G_A),                 inner(G_B H_B⁻¹)
        after    c H_A⁻¹ (S_B H_A⁻¹)⁴ inner(G_A),  inner(G_B) (H_B⁻¹ S_A)⁴ H_B⁻¹ / c
        both     c P_Aᵀ F_A⁴ inner(P_A G_A),       inner(G_B P_Bᵀ) F_B⁴ P_B / c

    with ``S_A = A Aᵀ``, ``S_B = Bᵀ B``, triangular P, ``Pᵀ P = H⁻¹``, and ``F = P S Pᵀ``, which
    leaves out what the partner has no mass in; c evens out the sides of the weight: see
    `rlora.core.metric.split_power`.

    Parameters
    ----------
    inner : Transform, optional
        What stands in the middle, such as `scale_by_adam`; nothing by default, and then the three
        placements agree.
    damping, damping_mode
        See `scaled_adamw`.
    placement : {"before", "after", "both"}
        Where the preconditioner stands with respect to `inner`.
    order : {"jacobi", "gauss_seidel"}
        See `rlora.step`.
    compute_dtype : {None, "float32", "float64"}
        Precision of the Gram matrices and their inverses; None is the parameters' own, at least
        float32.

    Returns
    -------
    Transform
        Its state is that of `inner`.
    """
    check_damping(damping, damping_mode, compute_dtype)
    check_choice("placement", placement, Placement)
    check_choice("order", order, Order)
    if inner is None:  # nothing entrywise that a second half would have to filter
        inner, placement = Transform(no_state, pass_on, sharded=True), "before"

    def update(grads: Tree, state: State, params: Tree) -> tuple[Tree, State]:
        if order == "gauss_seidel":
            _check_one_sided(grads)
        leaves = leaves_of(params)
        backend = get_backend(*leaves)
        with backend.exact(leaves[0]):
            P = preconditioners(
                backend,
                pairs_of(params),
                damping=damping,
                damping_mode=damping_mode,
                placement=placement,
                compute_dtype=compute_dtype,
            )

            def times(matrices: list[Factors] | None, tree: Tree) -> Tree:
                if matrices is None:
                    return tree
                return rebuild(tree, precondition(backend, matrices, pairs_of(tree)))

            direction, state = inner.update(times(P.first, grads), state, params)
            return times(P.second, direction), state

    return inner._replace(update=update, order=order)


def _check_one_sided(grads: Tree) -> None:
    if any(G.A is not None and G.B is not None for G in pairs_of(grads)):
        msg = (
            "with order='gauss_seidel' B's direction needs the new A, but both gradients came; "
            "use rlora.step, or call update twice with the other gradient set to None"
        )
        raise PairingError(msg)


@hyperparameters
def scaled_sgd(
    *,
    momentum: float = 0.0,
    nesterov: bool = False,
    weight_decay: float = 0.0,
    damping: float = 1e-4,
    damping_mode: DampingMode = "covariant",
    order: Order = "jacobi",
    compute_dtype: str | None = None,
) -> Transform:
    """Scaled gradient descent (Riemannian preconditioned SGD).

    ``A <- A - lr H_A⁻¹ G_A`` and ``B <- B - lr G_B H_B⁻¹``, where ``H_A`` is the damped ``Bᵀ B``
    and ``H_B`` the damped ``A Aᵀ``. Undamped or with covariant damping, also with momentum, the
    product B A follows the same path however it is split between the factors, where r is at most m
    and n.

    Parameters
    ----------
    momentum : float
        In [0, 1); 0 for none. Acts on the preconditioned gradient.
    nesterov : bool
        Look ahead; needs a positive momentum.
    weight_decay : float
        At least 0. Decoupled: each factor shrinks by ``1 - lr weight_decay``. In
        `rlora.torch.ScaledSGD` it goes through the momentum, as in torch's SGD.
    damping, damping_mode, order, compute_dtype
        See `scaled_adamw`.

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
    The direction is not divided by the square of the scaling s = alpha / r, as the paper does not:
    a good learning rate depends on s. From B = 0 relative damping does not hold back the second
    step of A, at any learning rate; the other two do. Singular values of BA below the root of a
    covariant δ, 0.01 by default, are learnt more slowly the smaller they are.

    References
    ----------
    F. Zhang, M. Pilanci. Riemannian Preconditioned LoRA for Fine-Tuning Foundation Models.
    arXiv:2402.02347, 2024.

    Examples
    --------
    >>> import rlora
    >>> method = rlora.scaled_sgd(momentum=0.9)
    """
    plain = is_zero(momentum) and not nesterov
    inner = None if plain else add_momentum(momentum, nesterov=nesterov)
    gram = scale_by_gram(
        inner,
        damping=damping,
        damping_mode=damping_mode,
        order=order,
        compute_dtype=compute_dtype,
    )
    return chain(gram, add_decayed_weights(weight_decay))


@hyperparameters
def scaled_adamw(
    *,
    b1: float = 0.7,
    b2: float = 0.8,
    eps: float = 1e-8,
    weight_decay: float = 0.01,
    damping: float = 1e-2,
    damping_mode: DampingMode = "covariant",
    placement: Placement = "both",
    order: Order = "jacobi",
    compute_dtype: str | None = None,
    eps_form: EpsForm = "torch",
    bias_correction: bool = True,
    decay: Decay = "before",
) -> Transform:
    """Scaled AdamW (Riemannian preconditioned AdamW).

    ``A <- A - lr (c P_Aᵀ F_A⁴ Adam(P_A G_A) + λ A)`` and
    ``B <- B - lr (Adam(G_B P_Bᵀ) F_B⁴ P_B / c + λ B)``, where ``Pᵀ P = H⁻¹`` with triangular P,
    ``H_A`` is the damped ``Bᵀ B``, ``H_B`` the damped ``A Aᵀ``, ``F = P S Pᵀ`` with the undamped S,
    and ``c = (m / n)^¼``.

    Parameters
    ----------
    b1, b2 : float
        Decay rates of the moments, in [0, 1). The authors' own GPT-2 runs use (0.7, 0.8).
    eps : float
        At least 0; see `rlora.core.moments.scale_by_adam`.
    weight_decay : float
        λ, at least 0; decoupled.
    damping : float
        δ, at least 0. Never less in effect than what the rounding of the Gram can carry. With
        placements "after" and "both" the shift of a Gram is at least 1e-6 of its mean eigenvalue:
        under covariant damping that of S_A, and then that of ``S_B + δ S_A⁻¹``.
    damping_mode : {"relative", "absolute", "covariant"}
        ``S + δ tr(S)/r I``, ``S + δ I``, or ``S_B + δ S_A⁻¹`` for A and S_A as it is for B, which
        compares δ with the squared singular values of BA and keeps the invariance. Covariant
        damping is made for factors of which B starts at zero.
    placement : {"before", "after", "both"}
        The preconditioner before Adam, ``Adam(H⁻¹ G)`` (published code), after it,
        ``c H⁻¹ (S H⁻¹)⁴ Adam(G)`` (the paper's theorem), or half powers of it on both sides.
    order : {"jacobi", "gauss_seidel"}
        Both factors from the old pair, or B from the new A, as the authors' Adam code does.
    compute_dtype : {None, "float32", "float64"}
        Precision of the Gram matrices and their inverses; None is the parameters' own, at least
        float32. float64 serves factors with a condition number of 1e3 and more.
    eps_form, bias_correction
        See `rlora.core.moments.scale_by_adam`.
    decay : {"before", "after"}
        Decay with the step, as torch's AdamW, or of its result, as the authors' code.

    Returns
    -------
    Transform
        State: two arrays a factor and its step count.

    Raises
    ------
    ValueError, TypeError
        When a hyperparameter is out of its range or of the wrong type.

    Notes
    -----
    The defaults are those of the project's study, docs/reference/study.md: betas of (0.7, 0.8) had
    a lower loss than (0.9, 0.999) in runs of 160 to 300 steps (AdamW's: up to 3,000), and half
    powers mostly the widest range of good learning rates. F leaves out directions of rank
    space in which the partner has no mass, which Adam fills, and c keeps one factor from growing at
    the cost of the other: docs/decisions/0010. `rlora.methods.scaled.OFFICIAL` and
    `rlora.methods.scaled.PEFT` are the published methods. A zero factor moves its partner only with
    ``placement="before"``: under absolute damping, and A also under covariant damping; the official
    code takes the identity for its Gram.

    Adam's entrywise normalisation breaks the invariance of scaled gradient descent: only signed
    permutations of the rank axis are left. With ``placement="both"`` and covariant damping or none
    it is, instead, lower triangular changes of basis, such as other scales of the directions of
    rank, up to the least damping of 1e-6: docs/decisions/0011. Before
    Adam a scalar preconditioner has no effect, so a large absolute δ turns the method into plain
    AdamW without a word.

    References
    ----------
    F. Zhang, M. Pilanci. Riemannian Preconditioned LoRA for Fine-Tuning Foundation Models.
    arXiv:2402.02347, 2024.

    Examples
    --------
    >>> import rlora
    >>> method = rlora.scaled_adamw(weight_decay=0.1)
    >>> from rlora.methods.scaled import PEFT
    >>> same_as_peft = rlora.scaled_adamw(**PEFT)
    """
    adam = scale_by_adam(b1, b2, eps, eps_form=eps_form, bias_correction=bias_correction)
    gram = scale_by_gram(
        adam,
        damping=damping,
        damping_mode=damping_mode,
        placement=placement,
        order=order,
        compute_dtype=compute_dtype,
    )
    return chain(gram, decayed_weights(decay, weight_decay))

"""Scaled SGD and scaled AdamW: torch's own optimizers on preconditioned gradients."""

from typing import Any

import torch
from torch import Tensor

from rlora.core.checks import check_betas
from rlora.core.metric import DampingMode, Placement
from rlora.core.transform import Order
from rlora.torch.optimizers.preconditioned import GramPreconditioned
from rlora.torch.pairing.discovery import Pairs


class ScaledAdamW(GramPreconditioned, torch.optim.AdamW):
    """AdamW, for LoRA pairs in the metric of the partner's damped Gram.

    ``A <- A - lr (c P_Aᵀ F_A⁴ Adam(P_A G_A) + λ A)`` and
    ``B <- B - lr (Adam(G_B P_Bᵀ) F_B⁴ P_B / c + λ B)``, where ``Pᵀ P = H⁻¹`` with triangular P,
    ``H_A`` is the damped ``Bᵀ B``, ``H_B`` the damped ``A Aᵀ``, ``F = P S Pᵀ`` with the undamped S,
    and ``c = (m / n)^¼``; parameters in no pair get AdamW's plain update.

    Parameters
    ----------
    params : Module, iterable of (str, Tensor), of groups, or of Tensor
        A model, its ``named_parameters()``, groups with names, or tensors along with `pairs`.
    lr : float or Tensor
        Learning rate, at least 0.
    betas : tuple of float
        Decay rates of the moments, each in [0, 1), of parameters in no pair too. The authors' own
        GPT-2 runs use (0.7, 0.8).
    eps : float
        At least 0; added to the root of the corrected second moment.
    weight_decay : float
        λ, at least 0; decoupled, with the step.
    amsgrad, maximize, foreach, capturable, fused
        As in torch's AdamW. Pairs have its fused kernel by default, on CUDA those of dense factors
        in one group; for parameters in no pair ``fused=True`` is on a CPU several times faster.
    damping : float
        δ, at least 0. Never less in effect than what the rounding of the Gram can carry.
    damping_mode : {"relative", "absolute", "covariant"}
        ``S + δ tr(S)/r I``, ``S + δ I``, or ``S_B + δ S_A⁻¹`` for A and S_A as it is for B. From
        B = 0 a relative δ does not hold back A's second step; the other two do.
    placement : {"before", "after", "both"}
        The preconditioner before Adam (published code), after it (what the paper's theorem
        proves), or half powers of it on both sides.
    order : {"jacobi", "gauss_seidel"}
        Both factors from the old pair, or B from the new A, as the authors' Adam code does.
    compute_dtype : {None, "float32", "float64"}
        Precision of the Gram matrices and their inverses; None is the parameters' own, at least
        float32.
    stochastic_rounding : bool
        Round bfloat16 factors up or down at random, so that steps smaller than their last bit
        count in the mean; False for the nearest. The same run gives the same numbers.
    pairs : iterable of (Tensor, Tensor), optional
        The pairs (A, B) by hand, A (r, n) and B (m, r), instead of by name; (A, B, Layout) where
        they lie otherwise. Or a `rlora.pairing.Convention`, names of pairs, or a callable that
        gives names: see `rlora.find_pairs`. Or "by_order", for factors without names: see
        `rlora.pairing.pairs_by_order`.
    adapter : str, optional
        Pair only this adapter of a model with several.

    Raises
    ------
    PairingError
        When nothing can be paired; it shows the names that were seen.
    ShapeError, NamespaceError
        When a pair given by hand does not fit together.
    ShardingError
        When factors have been flattened or cut by a sharding scheme.
    ValueError, TypeError
        When a hyperparameter, of a group too, is out of its range or of the wrong type.

    Notes
    -----
    The defaults of `betas`, `damping` and `placement` are those of the project's study,
    docs/reference/study.md: betas of (0.7, 0.8) had a lower loss than (0.9, 0.999) in runs of
    160 to 300 steps (AdamW's: up to 3,000), and half powers mostly the widest range of good
    learning rates.
    ``rlora.torch.precondition(torch.optim.AdamW)`` has AdamW's betas and the preconditioner before
    Adam, as published code has it.

    ``.grad`` is after a step what it was before. Moments of pairs are float32 or wider and stay so
    through ``load_state_dict``. A pair with NaN or inf in it does not touch the others. A frozen
    factor stays, and its Gram still preconditions the other. ``optimizer.report`` says what was
    paired.

    References
    ----------
    F. Zhang, M. Pilanci. Riemannian Preconditioned LoRA for Fine-Tuning Foundation Models.
    arXiv:2402.02347, 2024.

    Examples
    --------
    >>> import torch, rlora.torch
    >>> layer = torch.nn.Module()
    >>> layer.lora_A = torch.nn.Parameter(torch.randn(4, 16) / 4)
    >>> layer.lora_B = torch.nn.Parameter(torch.zeros(32, 4))
    >>> optimizer = rlora.torch.ScaledAdamW(layer, lr=1e-3)
    >>> print(optimizer.report)
    1 pair, 0 unpaired parameters, 0 refused
      pair 32 x 16, rank 4: 1 time, lora_A
    """

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.7, 0.8),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        amsgrad: bool = False,
        *,
        damping: float = 1e-2,
        damping_mode: DampingMode = "covariant",
        placement: Placement = "both",
        order: Order = "jacobi",
        compute_dtype: str | None = None,
        stochastic_rounding: bool = True,
        pairs: Pairs = None,
        adapter: str | None = None,
        maximize: bool = False,
        foreach: bool | None = None,
        capturable: bool = False,
        fused: bool | None = None,
    ) -> None:
        check_betas(betas)
        super().__init__(
            params,
            lr=lr,
            betas=betas,
            eps=eps,
            weight_decay=weight_decay,
            amsgrad=amsgrad,
            damping=damping,
            damping_mode=damping_mode,
            placement=placement,
            order=order,
            compute_dtype=compute_dtype,
            stochastic_rounding=stochastic_rounding,
            pairs=pairs,
            adapter=adapter,
            maximize=maximize,
            foreach=foreach,
            capturable=capturable,
            fused=fused,
        )


class ScaledSGD(GramPreconditioned, torch.optim.SGD):
    """SGD, for LoRA pairs on gradients that the partner's damped Gram has preconditioned.

    ``A <- A - lr (Bᵀ B + ..)⁻¹ G_A`` and ``B <- B - lr G_B (A Aᵀ + ..)⁻¹``, with torch's momentum
    on the preconditioned gradient; parameters in no pair get SGD's plain update.

    Parameters
    ----------
    params : Module, iterable of (str, Tensor), of groups, or of Tensor
        A model, its ``named_parameters()``, groups with names, or tensors along with `pairs`.
    lr : float or Tensor
        Learning rate, at least 0.
    momentum, dampening, weight_decay, nesterov, maximize, foreach, fused
        As in torch's SGD; the decay is added to the preconditioned gradient.
    damping, damping_mode, order, compute_dtype, stochastic_rounding, pairs, adapter
        As in `ScaledAdamW`.

    Raises
    ------
    PairingError, ShapeError, NamespaceError, ShardingError, ValueError, TypeError
        As `ScaledAdamW`.

    Notes
    -----
    Undamped or with covariant damping, the default, also with momentum, the product B A follows the
    same path however it is split between the factors, where r is at most m and n. From B = 0
    relative damping does not hold back the second step of A, at any learning rate; the other two
    do.

    References
    ----------
    F. Zhang, M. Pilanci. Riemannian Preconditioned LoRA for Fine-Tuning Foundation Models.
    arXiv:2402.02347, 2024.

    Examples
    --------
    >>> import torch, rlora.torch
    >>> A, B = torch.randn(4, 16, requires_grad=True), torch.zeros(32, 4, requires_grad=True)
    >>> optimizer = rlora.torch.ScaledSGD([A, B], lr=0.1, momentum=0.9, pairs=[(A, B)])
    """

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 1e-3,
        momentum: float = 0.0,
        dampening: float = 0.0,
        weight_decay: float = 0.0,
        nesterov: bool = False,
        *,
        damping: float = 1e-4,
        damping_mode: DampingMode = "covariant",
        order: Order = "jacobi",
        compute_dtype: str | None = None,
        stochastic_rounding: bool = True,
        pairs: Pairs = None,
        adapter: str | None = None,
        maximize: bool = False,
        foreach: bool | None = None,
        fused: bool | None = None,
    ) -> None:
        super().__init__(
            params,
            lr=lr,
            momentum=momentum,
            dampening=dampening,
            weight_decay=weight_decay,
            nesterov=nesterov,
            damping=damping,
            damping_mode=damping_mode,
            order=order,
            compute_dtype=compute_dtype,
            stochastic_rounding=stochastic_rounding,
            pairs=pairs,
            adapter=adapter,
            maximize=maximize,
            foreach=foreach,
            fused=fused,
        )

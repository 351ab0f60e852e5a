"""LoRA-FA: A stays frozen, and B moves by the full gradient's projection on the row space of A.

L. Zhang, L. Zhang, S. Shi, X. Chu, B. Li. LoRA-FA: Memory-efficient Low-rank Adaptation for Large
Language Models Fine-tuning. arXiv:2308.03303, 2023.
"""

from typing import Any, Final, NamedTuple

from rlora.core.checks import hyperparameters, keeps
from rlora.core.decay import Decay, decayed_weights
from rlora.core.dispatch import get_backend
from rlora.core.factors import Factors, Tree, counterparts, leaves_of, pairs_of, rebuild
from rlora.core.inner import only
from rlora.core.metric import DampingMode, check_damping, frozen_powers
from rlora.core.moments import EpsForm, over, per_pair, scale_by_adam
from rlora.core.placement import precondition
from rlora.core.transform import State, Transform, chain, one_side

PEFT: Final[dict[str, Any]] = {
    "eps": 1e-6,
    "eps_form": "hf",
    "decay": "after",
    "damping": 1e-8,
    "damping_mode": "absolute",
}
"""`lora_fa` as PEFT's ``create_lorafa_optimizer`` has it."""


class FrozenState(NamedTuple):
    """Constants of a frozen A."""

    inverse: Tree
    """``S_A⁻¹``, (..., r, r), one a pair."""
    scaling: Tree
    """s, one for each layer of a pair."""


@hyperparameters
def scale_by_frozen_gram(
    damping: float = 1e-6,
    damping_mode: DampingMode = "relative",
    compute_dtype: str | None = None,
) -> Transform:
    """The direction ``G_B S_A⁻¹ / s²`` for B and none for A, with an inverse made once."""
    check_damping(damping, damping_mode, compute_dtype)

    def init(params: Tree, scaling: float = 1.0) -> FrozenState:
        leaves = leaves_of(params)
        backend = get_backend(*leaves)
        with backend.exact(leaves[0]):
            inverses = frozen_powers(
                backend,
                pairs_of(params),
                "A",
                damping=damping,
                damping_mode=damping_mode,
                compute_dtype=compute_dtype,
            )
        return FrozenState(rebuild(params, inverses), per_pair(params, scaling))

    def update(grads: Tree, state: State, params: Tree) -> tuple[Tree, State]:
        leaves = leaves_of(params)
        backend = get_backend(*leaves)
        inverses, scalings = counterparts(params, state.inverse, state.scaling)
        P = [Factors(None, inverse) for inverse in inverses]
        with backend.exact(leaves[0]):
            D = precondition(backend, P, pairs_of(one_side(grads, "B")))
        return rebuild(params, [over(d, s**2) for d, s in zip(D, scalings, strict=True)]), state

    return Transform(init, update, sharded=True)


@hyperparameters
@keeps("A")
def lora_fa(
    *,
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    damping: float = 1e-6,
    damping_mode: DampingMode = "relative",
    compute_dtype: str | None = None,
    eps_form: EpsForm = "torch",
    decay: Decay = "before",
) -> Transform:
    """LoRA-FA, frozen A.

    ``B <- B - lr (Adam(G_B S_A⁻¹ / s²) + λ B)`` with the damped ``S_A = A Aᵀ``; A never moves, so
    that a layer need not keep its input for A's gradient. Without Adam the move of the weight would
    be ``-lr G A⁺ A``, the best there is within the row space of A.

    Parameters
    ----------
    b1, b2 : float
        Decay rates of the moments, in [0, 1).
    eps : float
        At least 0.
    weight_decay : float
        λ, at least 0; decoupled, of B.
    damping, damping_mode, compute_dtype
        As in `rlora.scaled_adamw`. The inverse is made once, when the state is: A must not change.
    eps_form : {"torch", "hf"}
        See `rlora.core.moments.scale_by_adam`.
    decay : {"before", "after"}
        Decay with the step, as torch's AdamW, or of its result, as PEFT's code.

    Returns
    -------
    Transform
        State: two arrays like B, its step count, and r² + 1 numbers a pair.

    Raises
    ------
    ValueError, TypeError
        When a hyperparameter is out of its range or of the wrong type.

    Notes
    -----
    PEFT inverts S_A in each step, multiplies by the inverse under bfloat16 autocast if there is
    one, and pairs parameters by their order.

    References
    ----------
    L. Zhang, L. Zhang, S. Shi, X. Chu, B. Li. LoRA-FA: Memory-efficient Low-rank Adaptation for
    Large Language Models Fine-tuning. arXiv:2308.03303, 2023.

    Examples
    --------
    >>> import rlora
    >>> from rlora.methods.fa import PEFT
    >>> same_as_peft = rlora.lora_fa(**PEFT)
    """
    return chain(
        scale_by_frozen_gram(damping, damping_mode, compute_dtype),
        only("B", scale_by_adam(b1, b2, eps, eps_form=eps_form)),
        decayed_weights(decay, weight_decay),
    )

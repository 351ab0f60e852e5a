"""LoRA-SB: an r x r core between fixed factors, moved by its optimal gradient.

K. Ponkshe, R. Singhal, E. Gorbunov, A. Tumanov, S. Horvath, P. Vepakomma. Initialization using
Update Approximation is a Silver Bullet for Extremely Efficient Low-Rank Fine-Tuning.
arXiv:2411.19557, 2024.
"""

from typing import NamedTuple

from rlora.core.checks import hyperparameters, keeps
from rlora.core.decay import add_decayed_weights
from rlora.core.dispatch import get_backend
from rlora.core.factors import Array, Factors, Tree, counterparts, leaves_of, pairs_of, rebuild
from rlora.core.metric import DampingMode, check_damping, frozen_powers
from rlora.core.moments import over, per_pair, scale_by_adam
from rlora.core.placement import preconditioners
from rlora.core.transform import State, Transform, chain, no_state, pass_on


class CoreState(NamedTuple):
    """Constants of the frozen frame, and the state of the core's optimizer."""

    frame: Tree
    """A₀: orthonormal rows that span those of A, (..., r, n), one array a pair."""

    inverse: Tree
    """``S_B⁻¹``, (..., r, r), one a pair."""

    scaling: Tree
    """s, one for each layer of a pair."""

    inner: State
    """State over the cores, (..., r, r), which are the A factors of pairs without a B."""


@hyperparameters
def scale_by_core(
    inner: Transform | None = None,
    *,
    damping: float = 1e-6,
    damping_mode: DampingMode = "relative",
    compute_dtype: str | None = None,
) -> Transform:
    """The direction ``inner(S_B⁻¹ G_R / s²) A₀`` for ``A = R A₀``, and none for B.

    Without an `inner`, gradient descent on the core by its optimal gradient. See `lora_sb`.
    """
    check_damping(damping, damping_mode, compute_dtype)
    core_method = inner or Transform(no_state, pass_on)

    def init(params: Tree, scaling: float = 1.0) -> CoreState:
        leaves, pairs = leaves_of(params), pairs_of(params)
        backend = get_backend(*leaves)

        with backend.exact(leaves[0]):
            roots = frozen_powers(  # S_A^-½
                backend,
                pairs,
                "A",
                damping=0.0,
                damping_mode="relative",
                exponent=-0.5,
                compute_dtype=compute_dtype,
            )
            frames = backend.apply_left(roots, [pair.A for pair in pairs])
            P = preconditioners(
                backend,
                pairs,
                damping=damping,
                damping_mode=damping_mode,
                compute_dtype=compute_dtype,
            ).first
            inverses = [pair.A for pair in P or ()]
        cores = rebuild(params, [Factors(inverse, None) for inverse in inverses])
        return CoreState(
            rebuild(params, frames),
            rebuild(params, inverses),
            per_pair(params, scaling),
            core_method.init(cores, scaling),
        )

    def update(grads: Tree, state: State, params: Tree) -> tuple[Tree, CoreState]:
        leaves = leaves_of(params)
        backend = get_backend(*leaves)
        constants = counterparts(params, state.frame, state.inverse, state.scaling)

        def matmul(X: Array, Y: Array) -> Array:
            return None if X is None or Y is None else backend.matmul(X, Y)

        def of_core(G: Factors, A0: Array, P: Array, s: Array) -> Factors:
            return over(Factors(matmul(P, matmul(G.A, A0.mT)), None), s**2)

        with backend.exact(leaves[0]):
            cores = rebuild(params, map(of_core, pairs_of(grads), *constants))
            moves, inner_state = core_method.update(cores, state.inner, cores)
            D = [matmul(d.A, A0) for d, A0 in zip(pairs_of(moves), constants[0], strict=True)]
        direction = rebuild(params, [Factors(x, None) for x in D])
        return direction, state._replace(inner=inner_state)

    return Transform(init, update, together=core_method.together)


@hyperparameters
@keeps("B", "begin with rlora.torch.initialize(model, ..., method='lora_sb')")
def lora_sb(
    *,
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    damping: float = 1e-6,
    damping_mode: DampingMode = "relative",
    compute_dtype: str | None = None,
) -> Transform:
    """LoRA-SB, ``W0 + s B R A₀`` of which only the core R (r, r) is trained.

    ``R <- R - lr (Adam(S_B⁻¹ G_R S_A₀⁻¹ / s²) + λ R)`` with ``G_R = s Bᵀ G A₀ᵀ``: of all moves of
    the core the one whose effect on the weight is nearest to full fine-tuning. The pair stays an
    ordinary one, with ``A = R A₀`` and B fixed, so that it is saved and merged like any other.

    Parameters
    ----------
    b1, b2 : float
        Decay rates of the core's moments, in [0, 1).
    eps : float
        At least 0.
    weight_decay : float
        λ, at least 0; decoupled.
    damping, damping_mode, compute_dtype
        As in `rlora.scaled_adamw`, for the inverse of S_B, which is made once; covariant damping
        takes the A at `init`.

    Returns
    -------
    Transform
        State: 2 r² moments, r² + 1 constants and the frame A₀, (r, n), a pair.

    Raises
    ------
    ValueError, TypeError
        When a hyperparameter is out of its range or of the wrong type.

    Notes
    -----
    Meant for a start with `rlora.initializers.lora_sb`; from B = 0 nothing can move. A₀ is made
    orthonormal, ``(A Aᵀ)^-½ A`` of the A at `init`, so that its Gram needs no inverse. The authors
    store R by itself, in bfloat16, and so need no frame: 2 r² numbers of state, at the price of
    another model.

    References
    ----------
    K. Ponkshe, R. Singhal, E. Gorbunov, A. Tumanov, S. Horvath, P. Vepakomma. Initialization using
    Update Approximation is a Silver Bullet for Extremely Efficient Low-Rank Fine-Tuning.
    arXiv:2411.19557, 2024.

    Examples
    --------
    >>> import rlora
    >>> method = rlora.lora_sb(b2=0.99)
    """
    adam = scale_by_adam(b1, b2, eps)
    core = scale_by_core(
        adam, damping=damping, damping_mode=damping_mode, compute_dtype=compute_dtype
    )
    return chain(core, add_decayed_weights(weight_decay))

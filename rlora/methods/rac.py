"""RAC-LoRA: a chain of blocks, each with one random factor that stays and one that is trained.

G. Malinovsky, U. Michieli, H. A. A. K. Hammoud, T. Ceritli, H. Elesedy, M. Ozay, P. Richtárik.
Randomized Asymmetric Chain of LoRA: The First Meaningful Theoretical Framework for Low-Rank
Adaptation. arXiv:2410.08305, 2024.
"""

import numpy as np

from rlora.core.checks import check_choice, hyperparameters, keeps
from rlora.core.decay import add_decayed_weights
from rlora.core.dispatch import get_backend
from rlora.core.factors import (
    Array,
    Factors,
    Tree,
    counterparts,
    leaves_of,
    pairs_of,
    rebuild,
)
from rlora.core.inner import only
from rlora.core.metric import DampingMode, Side, check_damping, frozen_powers
from rlora.core.moments import keep_scaling, over, scale_by_adam
from rlora.core.placement import precondition
from rlora.core.transform import State, Transform, chain, one_side


def scale_by_sketch(
    frozen: Side = "A",
    *,
    damping: float = 1e-6,
    damping_mode: DampingMode = "relative",
    compute_dtype: str | None = None,
) -> Transform:
    """The analysed step: ``G_B S_A⁻¹ / s²`` for B with A frozen, or the mirror image.

    It moves the weight by ``-lr G H`` with the projector ``H = Aᵀ S_A⁻¹ A``.
    """
    check_choice("frozen", frozen, Side)
    check_damping(damping, damping_mode, compute_dtype)
    moving: Side = "B" if frozen == "A" else "A"

    def update(grads: Tree, state: State, params: Tree) -> tuple[Tree, State]:
        leaves = leaves_of(params)
        backend = get_backend(*leaves)
        (scalings,) = counterparts(params, state.scaling)
        with backend.exact(leaves[0]):
            inverses = frozen_powers(
                backend,
                pairs_of(params),
                frozen,
                damping=damping,
                damping_mode=damping_mode,
                compute_dtype=compute_dtype,
            )
            P = [Factors(inverse, inverse) for inverse in inverses]
            D = precondition(backend, P, pairs_of(one_side(grads, moving)))
        D = [over(d, s**2) for d, s in zip(D, scalings, strict=True)]
        return rebuild(params, D), state

    return Transform(keep_scaling, update, sharded=True)


@hyperparameters
@keeps("A")
def rac_lora(
    *,
    frozen: Side = "A",
    adam: bool = False,
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    damping: float = 1e-6,
    damping_mode: DampingMode = "relative",
    compute_dtype: str | None = None,
) -> Transform:
    """RAC-LoRA, one block of the chain.

    ``B <- B - lr G_B S_A⁻¹ / s²`` with a random A that stays, so that the weight moves by
    ``-lr G H``, H the projector on the row space of A; or the mirror image with a random B. After
    a while `restart` merges the product and draws the next sketch.

    Parameters
    ----------
    frozen : {"A", "B"}
        The sketch. The other factor starts at zero.
    adam : bool
        Adam on the direction, as the authors train large models; the theory is for False.
    b1, b2, eps
        Of Adam; without effect otherwise.
    weight_decay : float
        At least 0; decoupled, of the factor that moves.
    damping, damping_mode, compute_dtype
        As in `rlora.scaled_adamw`; "covariant" leaves the Gram of the sketch as it is.

    Returns
    -------
    Transform
        State: one number a pair; with Adam two arrays like the moving factor and its step count.

    Raises
    ------
    ValueError, TypeError
        When a hyperparameter is out of its range or of the wrong type.

    Notes
    -----
    With ``lr <= 1 / L`` and an isotropic sketch that is drawn anew each step, an L-smooth loss with
    the PL constant μ falls by ``1 - lr μ r / m`` a step (``r / n`` with A frozen). One sketch for
    ever leaves what lies outside of its space.

    References
    ----------
    G. Malinovsky, U. Michieli, H. A. A. K. Hammoud, T. Ceritli, H. Elesedy, M. Ozay, P. Richtárik.
    Randomized Asymmetric Chain of LoRA: The First Meaningful Theoretical Framework for Low-Rank
    Adaptation. arXiv:2410.08305, 2024.

    Examples
    --------
    >>> import numpy as np
    >>> import rlora
    >>> from rlora.methods.rac import restart
    >>> W, pair = np.zeros((6, 5)), rlora.Factors(np.zeros((2, 5)), np.zeros((6, 2)))
    >>> W, pair = restart(W, pair, seed=0)
    >>> state = rlora.rac_lora().init(pair)
    """
    sketch = scale_by_sketch(
        frozen, damping=damping, damping_mode=damping_mode, compute_dtype=compute_dtype
    )
    moving: Side = "B" if frozen == "A" else "A"
    scaled = only(moving, scale_by_adam(b1, b2, eps))  # whose numbers are checked in any case
    chained = [sketch, scaled] if adam else [sketch]
    return chain(*chained, add_decayed_weights(weight_decay))


def restart(
    weight: Array, pair: Factors, *, frozen: Side = "A", scaling: float = 1.0, seed: int = 0
) -> tuple[Array, Factors]:
    """The end of a block: merge the product, draw a new sketch, start from zero.

    Parameters
    ----------
    weight : array of shape (..., m, n)
        W0; kept in float32 or wider, or small products are lost in the sum.
    pair : Factors
        A (..., r, n) and B (..., m, r) at the end of the block.
    frozen : {"A", "B"}
        The factor that is drawn, with variance 1 / n or 1 / m.
    scaling : float
        The s of ``W0 + s B A``.
    seed : int
        Another one for each block and layer.

    Returns
    -------
    weight, pair
        ``W0 + s B A`` and the pair of the next block; its optimizer's state starts anew too.
    """
    check_choice("frozen", frozen, Side)
    backend = get_backend(weight, *pair)
    with backend.exact(weight):
        product = backend.matmul(*(backend.cast(x, weight.dtype) for x in (pair.B, pair.A)))
    old, axis = (pair.A, -1) if frozen == "A" else (pair.B, -2)
    draw = np.random.default_rng(seed).normal(size=tuple(old.shape)) / old.shape[axis] ** 0.5
    fresh = Factors(*map(backend.xp.zeros_like, pair))
    fresh = fresh._replace(**{frozen: backend.asarray_like(draw, old)})
    return weight + scaling * product, fresh

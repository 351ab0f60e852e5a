"""Learning rates that carry over from AdamW: the direction of one method, the size of another.

N. Agarwal, R. Anil, E. Hazan, T. Koren, C. Zhang. Disentangling Adaptive Gradient Methods from
Learning Rates. arXiv:2002.11803, 2020.
"""

from typing import NamedTuple

from rlora.core.algebra import traces
from rlora.core.checks import hyperparameters
from rlora.core.decay import add_decayed_weights
from rlora.core.factors import Factors, Tree
from rlora.core.metric import inverse_metric
from rlora.core.moments import keep_scaling, scale_by_adam
from rlora.core.rank_group import RankGroup, Stack, by_rank
from rlora.core.transform import State, Transform, chain, check_transform, no_state

DAMPING = 1e-4
"""Covariant damping of the default direction."""


class GraftState(NamedTuple):
    """The state of the method that gives the direction, and Adam's, which give the size."""

    inner: State
    adam: State


class Wanted(NamedTuple):
    """AdamW's direction, from which the size is taken."""

    U: Tree


@hyperparameters
def graft_adamw(
    inner: Transform | None = None,
    *,
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-8,
    weight_decay: float = 0.0,
) -> Transform:
    """The direction of any method, in the size that AdamW's has in the product B A.

    With D the direction of `inner` and U that of Adam on the plain gradients::

        A <- A - lr (|B U_A| / |B D_A| D_A + λ A)
        B <- B - lr (|U_B A| / |D_B A| D_B + λ B)

    in Frobenius norms, so that each factor moves the product as far as AdamW moves it at the same
    learning rate: one that was tuned for AdamW is a fair first guess for every method.

    Parameters
    ----------
    inner : Transform, optional
        Any method, without weight decay; scaled gradients with covariant damping by default.
    b1, b2, eps : float
        Of the AdamW whose size is taken: those with which the learning rate was tuned.
    weight_decay : float
        λ, at least 0; decoupled.

    Returns
    -------
    Transform
        State: that of `inner`, and two arrays a factor with its step count.

    Raises
    ------
    ValueError, TypeError
        When a hyperparameter is out of its range or of the wrong type.

    Notes
    -----
    AdamW's size depends on how the product is split between the factors, so the invariance of
    `inner` is lost. Where B is zero A does not move, as with AdamW.

    References
    ----------
    N. Agarwal, R. Anil, E. Hazan, T. Koren, C. Zhang. Disentangling Adaptive Gradient Methods from
    Learning Rates. arXiv:2002.11803, 2020. They graft layer by layer in the norm of the parameters;
    the norm of the product is ours.

    Examples
    --------
    >>> import rlora
    >>> method = rlora.graft_adamw(rlora.lora_rite(), weight_decay=0.01)
    """
    if inner is None:
        inner = by_rank(keep_scaling, scaled_gradient, sharded=True)
    check_transform(inner)
    adam = scale_by_adam(b1, b2, eps)
    direction, transport = inner.update, inner.transport
    resize = by_rank(no_state, to_size, rescaled=False).update

    def init(params: Tree, scaling: float = 1.0) -> GraftState:
        return GraftState(inner.init(params, scaling), adam.init(params, scaling))

    def update(grads: Tree, state: State, params: Tree) -> tuple[Tree, GraftState]:
        D, inner_state = direction(grads, state.inner, params)
        U, adam_state = adam.update(grads, state.adam, params)
        D, _ = resize(D, Wanted(U), params)
        return D, GraftState(inner_state, adam_state)

    def carry(state: State, old: Tree, new: Tree) -> GraftState:
        return GraftState(transport(state.inner, old, new), state.adam)

    grafted = inner._replace(init=init, update=update, transport=carry)
    return chain(grafted, add_decayed_weights(weight_decay))


def scaled_gradient(
    group: RankGroup, G: list[Factors], state: State
) -> tuple[list[Factors], State]:
    """``(S_B + δ S_A⁻¹)⁻¹ G_A`` and ``G_B S_A⁻¹``."""
    P = inverse_metric(group, group.partner_gram(group.params), DAMPING, "covariant")
    return group.apply(P, G), state


def to_size(group: RankGroup, D: list[Factors], state: State) -> tuple[list[Factors], State]:
    """D, each factor in the size of its U."""
    xp = group.xp
    S = group.partner_gram(group.params)
    # Of trace 1, which no ratio of sizes sees: products with tiny Grams would be subnormal.
    S = S / xp.clip(traces(xp, S), min=float(xp.finfo(S.dtype).smallest_normal))

    def size(X: list[Factors]) -> Stack:
        """``|B X_A|`` and ``|X_B A|``, over the norm of B and of A, (2K, 1, 1)."""
        squares = xp.sum(S * group.gram(X), axis=(-2, -1), keepdims=True)
        return xp.sqrt(xp.clip(squares, min=0.0))  # rounding may leave less

    (D, _), (U, number) = group.in_range(D), group.in_range(group.filled(state.U))
    has, wanted = size(D), size(U) / number
    ratio = wanted / xp.where(has > 0, has, xp.ones_like(has))
    scales = group.unstack(ratio)
    return [Factors(c.A * d.A, c.B * d.B) for c, d in zip(scales, D, strict=True)], state

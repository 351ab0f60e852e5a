"""Methods and transformations that stand inside of another one."""

from typing import Literal

from rlora.core.decay import add_decayed_weights
from rlora.core.factors import Tree
from rlora.core.moments import scale_by_adam
from rlora.core.transform import State, Transform, chain, check_transform, one_side


def inner_or_adamw(
    inner: Transform | None, b1: float, b2: float, eps: float, weight_decay: float
) -> Transform:
    """The method that a wrapper is given, or AdamW; TypeError if it is no `Transform`."""
    adamw = chain(scale_by_adam(b1, b2, eps), add_decayed_weights(weight_decay))
    if inner is None:
        return adamw  # whose numbers are checked in any case
    check_transform(inner)
    return inner


def check_jacobi(method: str, inner: Transform) -> None:
    """ValueError for an inner method that moves one factor after the other."""
    if inner.order != "jacobi":
        msg = f"{method} expected a method of order='jacobi', got {inner.order!r}; give it that"
        raise ValueError(msg)


def only(side: Literal["A", "B"], inner: Transform) -> Transform:
    """A transform for one factor of each pair; the other one gets no direction and has no state.

    Parameters
    ----------
    side : {"A", "B"}
        The factor that is updated.
    inner : Transform
        A transformation, such as `scale_by_adam`.
    """

    def init(params: Tree, scaling: float = 1.0) -> State:
        return inner.init(one_side(params, side), scaling)

    def update(grads: Tree, state: State, params: Tree) -> tuple[Tree, State]:
        return inner.update(one_side(grads, side), state, one_side(params, side))

    return inner._replace(init=init, update=update)

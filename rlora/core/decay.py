"""Decoupled weight decay: with the step, after it, or once for the product."""

from collections.abc import Callable
from numbers import Real
from typing import Any, Literal

from rlora.core.backend import dtype_name
from rlora.core.checks import check_choice, check_nonnegative, hyperparameters, is_zero
from rlora.core.dispatch import get_backend
from rlora.core.factors import Array, Tree, map_moving
from rlora.core.transform import State, Transform, no_state, pass_on

Decay = Literal["before", "after"]

Split = Callable[[Array | float], tuple[Array | float, Array | float]]
"""From what one step keeps, ``1 - lr λ``, to what a factor keeps and what multiplies its update."""


@hyperparameters
def add_decayed_weights(weight_decay: float) -> Transform:
    """Decay with the step: the direction gets ``+ weight_decay * params``.

    Parameters
    ----------
    weight_decay : float
        λ, at least 0. Each factor shrinks by ``1 - lr λ``, so BA shrinks by its square.

    Returns
    -------
    Transform
        Without state.

    References
    ----------
    I. Loshchilov, F. Hutter. Decoupled Weight Decay Regularization. arXiv:1711.05101, 2017.
    """
    check_nonnegative("weight_decay", weight_decay)

    def update(grads: Tree, state: State, params: Tree) -> tuple[Tree, State]:
        def decayed(P: list[Array], D: list[Array]) -> tuple[list[Array], list[Array]]:
            return P, get_backend(*P, *D).add_scaled(D, P, weight_decay)

        _, direction = map_moving(decayed, params, grads)
        return direction, state

    return Transform(no_state, pass_on if is_zero(weight_decay) else update, sharded=True)


@hyperparameters
def decay_weights_after(weight_decay: float) -> Transform:
    """Decay after the step: ``params <- (1 - lr λ) (params - lr direction)``."""
    return _decay(weight_decay, lambda keep: (keep, keep))


@hyperparameters
def decay_product(weight_decay: float) -> Transform:
    """Decay of the product: ``params <- sqrt(1 - lr λ) params - lr direction``.

    BA shrinks by ``1 - lr λ``.
    """
    return _decay(weight_decay, lambda keep: (keep**0.5, 1.0))


@hyperparameters
def decay_product_around(weight_decay: float) -> Transform:
    """Decay of the product and not of its change, which one factor's update makes to first order.

    ``params <- sqrt(1 - lr λ) params - lr direction / sqrt(1 - lr λ)``.
    """
    return _decay(weight_decay, lambda keep: (keep**0.5, keep**-0.5))


def decayed_weights(decay: Decay, weight_decay: float) -> Transform:
    """`add_decayed_weights`, or with "after" `decay_weights_after`."""
    check_choice("decay", decay, Decay)
    return (add_decayed_weights if decay == "before" else decay_weights_after)(weight_decay)


def remaining(lr: Any, weight_decay: float, dtype: Any) -> Array | float:
    """``1 - lr λ``; with an array as lr in at least the dtype of what is to be multiplied.

    In the 16 bits that an lr may have it is 1, and there is no decay.
    """
    if not isinstance(lr, Real) and dtype_name(lr.dtype) != "float64":
        backend = get_backend(lr)  # which may be another one: NumPy's beside arrays of JAX
        lr = backend.cast(lr, getattr(backend.xp, dtype_name(dtype)))
    return 1 - lr * weight_decay


def _decay(weight_decay: float, split: Split) -> Transform:
    check_nonnegative("weight_decay", weight_decay)
    if is_zero(weight_decay):  # then the step may be made in place
        return Transform(no_state, pass_on, sharded=True)

    def apply(params: Tree, direction: Tree, lr: Array | float) -> Tree:
        def move(old: list[Array], D: list[Array]) -> tuple[list[Array]]:
            backend, new = get_backend(*old, *D), []
            by_dtype = {
                dtype: split(remaining(lr, weight_decay, dtype)) for dtype in {d.dtype for d in D}
            }
            for p, d in zip(backend.cast_like(old, D), D, strict=True):
                keep, reach = by_dtype[d.dtype]
                new.append(keep * p - lr * reach * d)
            return (backend.cast_like(new, old),)

        moved, _ = map_moving(move, params, direction)
        return moved

    return Transform(no_state, pass_on, apply, sharded=True)

"""Methods that move one factor of a pair at a time, in turns."""

from typing import Literal

from rlora.core.checks import check_nonnegative, is_zero
from rlora.core.dispatch import get_backend
from rlora.core.factors import Array, Factors, Tree, counterparts, rebuild
from rlora.core.moments import each
from rlora.core.transform import State, Transform

First = Literal["A", "B"]


def has_turn(letter: str, first: First, steps: Array, moving: tuple[bool, bool]) -> Array:
    """Return whether a factor has its turn, (...); one whose partner is frozen has every turn."""
    if not all(moving):
        return steps == steps if moving["AB".index(letter)] else steps != steps
    return steps % 2 == (0 if letter == first else 1)


def decay_in_turn(transform: Transform, weight_decay: float, first: First, steps: str) -> Transform:
    """The transformation with decay of the factor that has its turn.

    `steps` is the field of its state that counts the steps of each pair.
    """
    check_nonnegative("weight_decay", weight_decay)

    def update(grads: Tree, state: State, params: Tree) -> tuple[Tree, State]:
        D, new = transform.update(grads, state, params)

        def decayed(d: Factors, p: Factors, count: Array) -> Factors:
            moving = d.A is not None, d.B is not None

            def factor(letter: str, x: Array, y: Array) -> Array:
                if x is None:
                    return None
                turn = each(has_turn(letter, first, count, moving))
                return get_backend(x).xp.where(turn, x + weight_decay * y, x)

            return Factors(*map(factor, "AB", d, p))

        sides = zip(*counterparts(params, D, params, getattr(state, steps)), strict=True)
        return rebuild(params, [decayed(*side) for side in sides]), new

    return transform if is_zero(weight_decay) else transform._replace(update=update)

"""Methods that move one factor of a pair at a time, in turns."""

from typing import Literal

from rlora.core.checks import check_nonnegative, is_zero
from rlora.core.dispatch import get_backend
from rlora.core.factors import Array, Factors, Tree, counterparts, map_leaves, rebuild
from rlora.core.moments import each
from rlora.core.transform import State, Transform

First = Literal["A", "B"]


def turns_of(first: First, steps: Array, moving: tuple[bool, bool]) -> Factors:
    """For each factor whether it has its turn, (...); one whose partner is frozen has every turn.

    `steps` are those taken, of each layer, or their remainder by 2.
    """
    if not all(moving):
        return Factors(*(steps >= 0 if moves else steps < 0 for moves in moving))
    even = steps % 2 == 0
    return Factors(even, ~even) if first == "A" else Factors(~even, even)


def next_turn(steps: Array) -> Array:
    """0 or 1 after an odd or an even number of steps: in float32 a count ends at 2^24."""
    return (steps + 1) % 2


def decay_in_turn(transform: Transform, weight_decay: float, first: First, steps: str) -> Transform:
    """The transformation with decay of the factor that has its turn.

    `steps` is the field of its state that says whose turn it is in each pair.
    """
    check_nonnegative("weight_decay", weight_decay)

    def update(grads: Tree, state: State, params: Tree) -> tuple[Tree, State]:
        D, new = transform.update(grads, state, params)

        def decayed(d: Factors, pair: Factors, count: Array) -> Tree:
            def factor(x: Array, y: Array, turn: Array) -> Array:
                return get_backend(x).xp.where(each(turn), x + weight_decay * y, x)

            turns = turns_of(first, count, (d.A is not None, d.B is not None))
            return map_leaves(factor, d, pair, turns)

        sides = counterparts(params, D, params, getattr(state, steps))
        return rebuild(params, map(decayed, *sides)), new

    return transform if is_zero(weight_decay) else transform._replace(update=update)

"""The entries that a parameter's state may have, and checks of those that were saved."""

import functools
from collections.abc import Iterator, Mapping, Set
from typing import Any, NamedTuple

import torch
from torch import Size, Tensor

from rlora import methods
from rlora.core.errors import ShapeError
from rlora.core.factors import Factors
from rlora.core.state import flatten_state
from rlora.torch.pairing.sharding_checks import check_kind

ELEMENTWISE = ("exp_avg", "exp_avg_sq", "max_exp_avg_sq", "momentum_buffer", "state1", "state2")
"""State of torch's own optimizers, and of bitsandbytes', that has the shape of its parameter."""

OF_METHODS = {"mu", "count", "scaling", "inverse", "frame", "overlap"}
"""Words in the names of the state of method classes, each of which has one."""


@functools.cache
def words_of_methods() -> frozenset[str]:
    """Words in the names of the state that methods of the library have for a pair."""
    pair = Factors(torch.ones(1, 1, device="cpu"), torch.ones(1, 1, device="cpu"))
    made = (getattr(methods, name)() for name in methods.__all__)
    names = (name for method in made for name in flatten_state(method.init(pair)))
    words = {word for name in names for word in name.split(".")} - {"A", "B"}
    return frozenset(word for word in words if not word.isdigit())


class Shapes(NamedTuple):
    """Shapes of the saved state of a parameter."""

    known: Mapping[str, Size | None]
    """By name; None is a state that it may not have."""
    words: Set[str] = frozenset(OF_METHODS)
    """Words in names of the state of other optimizers; whatever else there is, is left alone."""
    needed: Set[str] = frozenset()
    """Names that every state has."""
    of_method: bool = False
    """True for the state of a method: a ``step``, as every optimizer of torch but SGD counts it, is
    then that of another optimizer."""


def check_saved(i: Any, state: Mapping[str, Any], p: Tensor, shapes: Shapes) -> None:
    """ShapeError or ShardingError unless the saved tensors of a parameter are as they should be."""
    tensors = dict(_tensors(state))
    for key, value in tensors.items():
        if key not in shapes.known and not _of_method(key, value, shapes.words):
            continue
        shape = shapes.known.get(key)
        if shape is None:
            wanted = ", ".join(name for name, known in shapes.known.items() if known is not None)
            msg = (
                f"saved {key} of parameter {i} is the state of another optimizer; this one "
                f"keeps {wanted or 'nothing'} for it: begin without the saved state"
            )
            raise ShapeError(msg)
        if key in ELEMENTWISE:  # that of a method is cut, or put together, at the next step
            check_kind(f"{key} of parameter {i}", value, p)
        if value.shape != shape:
            msg = (
                f"saved {key} of parameter {i} has shape {tuple(value.shape)}, expected "
                f"{tuple(shape)}; was the rank changed, or is it the state of another optimizer?"
            )
            raise ShapeError(msg)
    kept = {name for name, shape in shapes.known.items() if shape is not None}
    lacks = shapes.needed - state.keys() if state else set()
    if "step" in state and shapes.of_method and not kept & tensors.keys():
        lacks = kept
    if lacks:
        msg = (
            f"the saved state of parameter {i} has {', '.join(map(str, state))} and no "
            f"{min(lacks)}, which this optimizer keeps: it is that of another optimizer; begin "
            f"without it"
        )
        raise ShapeError(msg)


def in_use(state: Mapping[str, Any], shapes: Shapes) -> dict[str, Any]:
    """The state of a method without what it had before an option was changed, such as momentum."""
    if not shapes.of_method:
        return dict(state)
    return {
        key: x
        for key, x in state.items()
        if shapes.known.get(key) is not None or not _of_method(key, x, shapes.words)
    }


def _of_method(key: str, value: Any, words: Set[str]) -> bool:
    found = words & {*key.split(".")}
    is_number = getattr(value, "ndim", 0) < 2
    return bool(found) and not (found == {"mu"} and is_number)  # torch's ASGD has such a one


def _tensors(state: Mapping[str, Any]) -> Iterator[tuple[str, Tensor]]:
    """By name, also those that bitsandbytes wraps in a dict of its own."""
    for key, value in state.items():
        if isinstance(value, Mapping):
            yield from _tensors(value)
        elif isinstance(value, Tensor):
            yield key, value

"""What a saved state must look like, before any of it is loaded."""

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from torch import Size, Tensor

from rlora.core.errors import ShapeError

Shapes = Mapping[str, Size | None]

ELEMENTWISE = ("exp_avg", "exp_avg_sq", "max_exp_avg_sq", "momentum_buffer", "state1", "state2")
"""State of torch's own optimizers, and of bitsandbytes', that has the shape of its parameter."""


def check_saved(saved: Iterable[tuple[Any, Mapping[str, Any], Shapes]]) -> None:
    """ShapeError for the first (id, state, shapes) whose tensors are not of these shapes.

    None is a tensor that may not be there: it is of an optimizer that keeps others.
    """
    for i, state, shapes in saved:
        for key, value in _tensors(state):
            if key not in shapes or value.shape == shapes[key]:
                continue
            shape = shapes[key]
            if shape is None:
                wanted = ", ".join(name for name in shapes if shapes[name] is not None)
                msg = (
                    f"saved {key} of parameter {i} is the state of another optimizer; this one "
                    f"keeps {wanted or 'nothing'} for it: begin without the saved state"
                )
            else:
                msg = (
                    f"saved {key} of parameter {i} has shape {tuple(value.shape)}, expected "
                    f"{tuple(shape)}; was the rank changed?"
                )
            raise ShapeError(msg)


def _tensors(state: Mapping[str, Any]) -> Iterator[tuple[str, Tensor]]:
    """By name, also those that bitsandbytes wraps in a dict of its own."""
    for key, value in state.items():
        if isinstance(value, Mapping):
            yield from _tensors(value)
        elif isinstance(value, Tensor):
            yield key, value

"""Refusals that every step shares."""

from typing import Any

from torch import Tensor

from rlora.core.errors import ShapeError


def misshapen(key: str, known: Any, view: Tensor) -> ShapeError:
    """The error for an entry of the optimizer's state that is no tensor of a view's shape."""
    found = tuple(known.shape) if isinstance(known, Tensor) else repr(known)
    msg = (
        f"optimizer.state has {found} as {key!r} of a LoRA factor, expected a tensor of shape "
        f"{tuple(view.shape)}; remove the entry for a fresh start"
    )
    return ShapeError(msg)

"""Differences between a compiled step and an eager one."""

from typing import Any

import torch
from torch import Tensor


def inherited(kind: type, name: str, front: type) -> Any:
    """A function of the first class behind `front` and its subclasses that defines it.

    Its hooks run around our own step already. While a step is compiled the rest goes too: torch
    breaks the graph around its own steps, and keeps what they call out of it.
    """
    behind = (parent for parent in kind.__mro__ if not issubclass(parent, front))
    parent: Any = next(parent for parent in behind if name in vars(parent))
    function = getattr(parent, name)
    if torch.compiler.is_compiling():
        while hasattr(function, "__wrapped__"):
            function = function.__wrapped__
        return function
    return function.__wrapped__ if hasattr(function, "hooked") else function


def keep(held: dict[str, Any], name: str, value: Tensor) -> None:
    """Put a tensor into a parameter's state; a graph writes into the one that is there."""
    if torch.compiler.is_compiling() and name in held:
        # Torch 2.13 loses a compiled `copy_` to a float64 number.
        torch._foreach_copy_([held[name]], [value])
    else:
        held[name] = value

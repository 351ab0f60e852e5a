"""What a sharding scheme may have done to the factors, and what can be stepped of it."""

import re
import sys
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from rlora.core.errors import ShardingError


def is_distributed(p: Any) -> bool:
    """Whether a tensor is a DTensor, without importing the distributed package."""
    return hasattr(p, "device_mesh")


def local(p: Any) -> Tensor:
    """The piece of a DTensor that this process has; another tensor itself."""
    with torch.no_grad():
        piece: Tensor = p.to_local() if is_distributed(p) else p
    return piece


def cut_dims(p: Any, axis: int) -> list[int]:
    """The dimensions of the mesh along which an axis of a DTensor is cut."""
    return [d for d, place in enumerate(p.placements) if getattr(place, "dim", None) == axis]

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


def shard_placement(model: nn.Module, mesh: Any = None) -> Callable[[nn.Parameter], Any]:
    """For ``fully_shard``: cut the A factors of a model along n, so that each keeps its rank axis.

    Then the only thing that a step of `ScaledAdamW` or `ScaledSGD` sends are r x r matrices.

    Parameters
    ----------
    model : Module
        Before it is sharded.
    mesh : DeviceMesh, optional
        The one that ``fully_shard`` is given; all processes by default.

    Returns
    -------
    callable
        Of a parameter the placement, None for the default, which is to cut the first axis. FSDP2
        cuts other axes into equal parts only: where n is not a multiple of the number of parts, A
        stays with the default, which is right too, but sends pieces of A.

    Examples
    --------
    >>> from torch.distributed.fsdp import fully_shard
    >>> def wrap(model):
    ...     placement = rlora.torch.shard_placement(model)
    ...     for block in model.blocks:
    ...         fully_shard(block, shard_placement_fn=placement)
    ...     fully_shard(model, shard_placement_fn=placement)
    """
    from torch.distributed import get_world_size
    from torch.distributed.tensor import Shard  # half a second

    from rlora.torch.params import find_pairs

    parts = get_world_size() if mesh is None else mesh.size(-1)
    named = dict(model.named_parameters())
    wide = {id(named[pair.a]) for pair in find_pairs(model)}

    def placement(param: nn.Parameter) -> Any:
        return Shard(1) if id(param) in wide and param.shape[1] % parts == 0 else None

    return placement

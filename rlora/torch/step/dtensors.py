"""Tensors as DTensors that are laid out as others are; DTensors take half a second to import."""

from typing import Any

from torch import Tensor
from torch.utils.dlpack import from_dlpack

from rlora.core.errors import ShardingError
from rlora.torch.pairing.pairs import is_distributed, local


def like_param(p: Any, piece: Tensor) -> Tensor:
    """The tensor itself, or for a piece of a DTensor a DTensor that is laid out as `p`."""
    if not is_distributed(p):
        return piece
    from torch.distributed.tensor import DTensor

    whole: Tensor = DTensor.from_local(
        piece, p.device_mesh, p.placements, run_check=False, shape=p.shape, stride=p.stride()
    )
    return whole


def cut_as(x: Any, like: Any) -> Tensor:
    """A tensor cut as `like` is, gathered if that is whole.

    A whole one is taken to be the same on every process: nothing is sent for it.
    """
    whole: Tensor = x
    if not is_distributed(like):
        return x.full_tensor() if is_distributed(x) else whole
    from torch.distributed.tensor import DTensor, Replicate

    if not is_distributed(x):
        everywhere = [Replicate()] * like.device_mesh.ndim
        x = DTensor.from_local(whole, like.device_mesh, everywhere, run_check=False)
    cut: Tensor = x.redistribute(placements=like.placements)
    return cut


def layer_of(stack: Tensor, k: int) -> Tensor:
    """One layer of a stack, in its memory; of a DTensor with a storage of its own.

    Torch can neither copy nor save a DTensor that begins within a storage.
    """
    layer = stack[k]
    return like_param(layer, from_dlpack(local(stack)[k])) if is_distributed(stack) else layer


def check_cut(stack: Any, p: Any) -> None:
    """ShardingError unless a stack is cut as one of its members is."""
    cut = [getattr(place, "dim", None) for place in p.placements]
    wanted = [None if dim is None else dim + 1 for dim in cut]
    placements = getattr(stack, "placements", None)
    found = [getattr(place, "dim", None) for place in placements or ()]
    if found != wanted or any(place.is_partial() for place in placements or ()):
        msg = (
            f"a method that steps pieces has given a direction with placements {placements} for "
            f"factors with {p.placements}: leave out its sharded=True"
        )
        raise ShardingError(msg)

"""Tensors as DTensors that are laid out as others are; DTensors take half a second to import."""

from typing import Any

from torch import Tensor

from rlora.torch.pairing.pairs import is_distributed


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
    """A tensor cut as `like` is; nothing is sent if it is whole, the same on every process."""
    whole: Tensor = x
    if not is_distributed(like):
        return whole
    from torch.distributed.tensor import DTensor, Replicate

    if not is_distributed(x):
        everywhere = [Replicate()] * like.device_mesh.ndim
        x = DTensor.from_local(whole, like.device_mesh, everywhere, run_check=False)
    cut: Tensor = x.redistribute(placements=like.placements)
    return cut

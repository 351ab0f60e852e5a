"""Pieces of many DTensors sent in one message: rows for columns, and pieces for wholes."""

from collections.abc import Sequence
from math import prod
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from rlora.torch.pairing.pairs import cut_dims, local


class Exchange:
    """Pieces of rows for pieces of columns and back, in one all-to-all for many matrices.

    Parameters
    ----------
    factors : sequence of (DTensor, int)
        Each with 0 for an A or 1 for a B. Only those that are cut along their rank axis are
        exchanged, and all of these along the same dimension of the mesh.
    """

    def __init__(self, factors: Sequence[tuple[Any, int]]) -> None:
        cut = [(k, p, side) for k, (p, side) in enumerate(factors) if cut_dims(p, side)]
        self.places = [(k, side) for k, _, side in cut]
        if not cut:
            return
        _, p, side = cut[0]
        self.group = p.device_mesh.get_group(cut_dims(p, side)[0])
        self.me, parts = dist.get_rank(self.group), dist.get_world_size(self.group)
        self.rows = [chunks(p.shape[side], parts) for _, p, side in cut]
        self.columns = [chunks(local(p).flatten(1).shape[1 - side], parts) for _, p, side in cut]

    def to_columns(self, pieces: list[Tensor]) -> list[Tensor]:
        """From (r_i, N), the rows that this process has, to (r, N_i); a B the other way round."""
        return self._exchanged(pieces, self.columns, self.rows, axis=1) if self.places else pieces

    def to_rows(self, pieces: list[Tensor]) -> list[Tensor]:
        """The way back."""
        return self._exchanged(pieces, self.rows, self.columns, axis=0) if self.places else pieces

    def _exchanged(
        self, pieces: list[Tensor], cut: list[list[int]], joined: list[list[int]], axis: int
    ) -> list[Tensor]:
        """Each matrix cut along `axis`, sent, and what came joined along the other one."""
        turned: list[Any] = [pieces[k].mT if side else pieces[k] for k, side in self.places]
        blocks = [x.split(sizes, axis) for x, sizes in zip(turned, cut, strict=True)]
        to_each = [torch.cat([b.reshape(-1) for b in row]) for row in zip(*blocks, strict=True)]
        shapes = [
            [(size, mine[self.me]) if axis else (mine[self.me], size) for size in sizes]
            for sizes, mine in zip(joined, cut, strict=True)
        ]
        from_each = [[prod(shape) for shape in row] for row in zip(*shapes, strict=True)]
        inbox: Any = to_each[0].new_empty(sum(map(sum, from_each)))
        dist.all_to_all_single(
            inbox,
            torch.cat(to_each),
            [sum(sizes) for sizes in from_each],
            [len(x) for x in to_each],
            group=self.group,
        )
        came = iter(inbox.split([size for sizes in from_each for size in sizes]))
        parts = zip(*([next(came) for _ in shapes] for _ in from_each), strict=True)
        result = list(pieces)
        for (k, side), each, sizes in zip(self.places, parts, shapes, strict=True):
            x = torch.cat(
                [part.view(size) for part, size in zip(each, sizes, strict=True)], 1 - axis
            )
            result[k] = x.mT if side else x
        return result


def chunks(size: int, parts: int) -> list[int]:
    """Sizes of the pieces as DTensor cuts, the last ones smaller or empty."""
    step = -(-size // parts)
    return [max(0, min(step, size - i * step)) for i in range(parts)]


def gathered(tensors: Sequence[Any]) -> list[Tensor]:
    """The whole of each DTensor; those cut along one dimension of a mesh come in one message."""
    wholes: list[Any] = [None] * len(tensors)
    together: dict[Any, list[int]] = {}
    for i, x in enumerate(tensors):
        cut = [d for d, place in enumerate(x.placements) if not place.is_replicate()]
        if len(cut) == 1 and x.placements[cut[0]].is_shard():
            together.setdefault((x.device_mesh, *cut, x.dtype), []).append(i)
        else:
            wholes[i] = x.full_tensor()
    for (_, d, _), members in together.items():
        found = _all_gathered([tensors[i] for i in members], d)
        for i, whole in zip(members, found, strict=True):
            wholes[i] = whole
    return wholes


def _all_gathered(tensors: list[Any], d: int) -> list[Tensor]:
    mesh, axes = tensors[0].device_mesh, [x.placements[d].dim for x in tensors]
    sizes = [chunks(x.shape[axis], mesh.size(d)) for x, axis in zip(tensors, axes, strict=True)]
    mine = torch.cat([local(x).reshape(-1) for x in tensors])
    numbers = [
        [x.numel() // max(x.shape[axis], 1) * k for k in each]
        for x, axis, each in zip(tensors, axes, sizes, strict=True)
    ]
    longest = max(map(sum, zip(*numbers, strict=True)))
    inbox = mine.new_empty(mesh.size(d) * longest)
    padded = torch.nn.functional.pad(mine, (0, longest - len(mine)))
    dist.all_gather_into_tensor(inbox, padded, group=mesh.get_group(d))
    wholes, starts = [], [0] * mesh.size(d)
    for x, axis, each, counts in zip(tensors, axes, sizes, numbers, strict=True):
        pieces = []
        for part, (size, count) in enumerate(zip(each, counts, strict=True)):
            piece = inbox[part * longest + starts[part] :][:count]
            pieces.append(piece.view(*x.shape[:axis], size, *x.shape[axis + 1 :]))
            starts[part] += count
        wholes.append(torch.cat(pieces, axis))
    return wholes


def piece_of_grad(p: Any) -> Tensor:
    """The gradient of this process's piece of the parameter; zeros for none."""
    if p.grad is None:
        return torch.zeros_like(local(p))
    grad = p.grad
    return local(
        grad if grad.placements == p.placements else grad.redistribute(placements=p.placements)
    )

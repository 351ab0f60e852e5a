"""DTensors whose processes have whole columns of A and whole rows of B: sums go over all of them.

Everything else, entrywise work and products with r x r matrices, stays on the pieces. The r x r
matrices are plain tensors, the same on every process.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor

from rlora.core.backend import AdamNumbers, Backend, Tall, Workspace
from rlora.core.factors import Array


class OnPieces(Backend):
    """A backend's operations on the pieces, with sums and maxima over all of them."""

    on_pieces = True

    def gram_rows(self, tall: Tall, dtype: Any, workspace: Workspace | None = None) -> Array:
        return _reduced(super().gram_rows(_pieces(tall), dtype, workspace), tall)

    def gram_columns(self, tall: Tall, dtype: Any, workspace: Workspace | None = None) -> Array:
        return _reduced(super().gram_columns(_pieces(tall), dtype, workspace), tall)

    def grams(
        self, A: Tall, B: Tall, dtype: Any, workspace: Workspace | None = None
    ) -> tuple[Array, Array]:
        """Both in one message."""
        rows = super().gram_rows(_pieces(A), dtype, workspace)
        columns = super().gram_columns(_pieces(B), dtype, workspace)
        both = _reduced(torch.cat([rows, columns]), [*A, *B])
        return both[: len(rows)], both[len(rows) :]

    def cross_rows(self, X: Tall, Y: Tall, dtype: Any) -> Array:
        return _reduced(super().cross_rows(_pieces(X), _pieces(Y), dtype), X)

    def peaks(self, X: Tall) -> Array:
        pieces = [x if x.numel() else x.new_zeros((*x.shape[:-2], 1, 1)) for x in _pieces(X)]
        peak = super().peaks(pieces)
        # What the largest of a NaN and a number is differs between libraries of collectives.
        return _reduced(peak.nan_to_num(torch.inf), X, dist.ReduceOp.MAX)

    def within(self, X: Tall, low: float, high: float) -> bool:
        return False  # a process that sees its own pieces alone must not decide

    def adam(self, M: Tall, V: Tall, G: Tall, numbers: AdamNumbers) -> tuple[list[Array], ...]:
        found = super().adam(_pieces(M), _pieces(V), _pieces(G), numbers)
        return tuple(_laid_out(x, G) for x in found)

    def descend(self, X: Tall, D: Tall, lr: Array | float, donate: bool = False) -> list[Array]:
        return _laid_out(super().descend(_pieces(X), _pieces(D), lr, donate), X)

    def apply_left(
        self,
        P: Tall,
        tall: Tall,
        workspace: Workspace | None = None,
        onto: Tall | None = None,
        keep: float = 1.0,
    ) -> list[Array]:
        to = None if onto is None else _pieces(onto)
        return _laid_out(super().apply_left(P, _pieces(tall), workspace, to, keep), tall)

    def apply_right(
        self,
        tall: Tall,
        P: Tall,
        workspace: Workspace | None = None,
        onto: Tall | None = None,
        keep: float = 1.0,
    ) -> list[Array]:
        to = None if onto is None else _pieces(onto)
        return _laid_out(super().apply_right(_pieces(tall), P, workspace, to, keep), tall)


def _pieces(tall: Tall) -> list[Array]:
    return [x.to_local() for x in tall]


def _laid_out(pieces: Sequence[Array], like: Tall) -> list[Array]:
    """Pieces as DTensors that are cut as their counterparts are."""
    return [
        DTensor.from_local(
            piece, x.device_mesh, x.placements, run_check=False, shape=x.shape, stride=x.stride()
        )
        for piece, x in zip(pieces, like, strict=True)
    ]


def _reduced(S: Array, tall: Tall, op: Any = dist.ReduceOp.SUM) -> Array:
    """A stack (K, ., .) of what each process found in its pieces, put together, in one message."""
    mesh = tall[0].device_mesh
    cut = [{d for d, place in enumerate(x.placements) if place.is_shard()} for x in tall]
    along = sorted(set().union(*cut))
    start = 0
    for x, mine in zip(tall, cut, strict=True):
        stop = start + x.shape[:-2].numel()
        # What several processes have whole counts once, where their coordinates are 0.
        if any(mesh.get_local_rank(d) for d in along if d not in mine):
            S[start:stop] = 0.0
        start = stop
    for d in along:
        dist.all_reduce(S, op, group=mesh.get_group(d))
    return S

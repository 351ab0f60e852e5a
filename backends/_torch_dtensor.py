"""DTensors whose processes have whole columns of A and whole rows of B: sums go over all of them.

Everything else, entrywise work and products with r x r matrices, stays on the pieces. The r x r
matrices are plain tensors, the same on every process.
"""

from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor

from rlora.core.backend import AdamNumbers, Arrays, Backend, Workspace
from rlora.core.factors import Array


class OnPieces(Backend):
    """A backend's operations on the pieces, with sums and maxima over all of them."""

    on_pieces = True

    def gram_rows(self, X: Arrays, dtype: Any, workspace: Workspace | None = None) -> Array:
        return _reduced(super().gram_rows(_pieces(X), dtype, workspace), X)

    def gram_columns(self, X: Arrays, dtype: Any, workspace: Workspace | None = None) -> Array:
        return _reduced(super().gram_columns(_pieces(X), dtype, workspace), X)

    def grams(
        self, A: Arrays, B: Arrays, dtype: Any, workspace: Workspace | None = None
    ) -> tuple[Array, Array]:
        """Both in one message."""
        rows = super().gram_rows(_pieces(A), dtype, workspace)
        columns = super().gram_columns(_pieces(B), dtype, workspace)
        both = _reduced(torch.cat([rows, columns]), [*A, *B])
        return both[: len(rows)], both[len(rows) :]

    def cross_rows(self, X: Arrays, Y: Arrays, dtype: Any) -> Array:
        return _reduced(super().cross_rows(_pieces(X), _pieces(Y), dtype), X)

    def peaks(self, X: Arrays) -> Array:
        pieces = [x if x.numel() else x.new_zeros((*x.shape[:-2], 1, 1)) for x in _pieces(X)]
        peak = super().peaks(pieces)
        # What the largest of a NaN and a number is differs between libraries of collectives.
        return _reduced(peak.nan_to_num(torch.inf), X, dist.ReduceOp.MAX)

    def within(self, X: Arrays, low: float, high: float) -> bool:
        return False  # a process that sees its own pieces alone must not decide

    def adam(
        self, M: Arrays, V: Arrays, G: Arrays, numbers: AdamNumbers
    ) -> tuple[list[Array], ...]:
        found = super().adam(_pieces(M), _pieces(V), _pieces(G), numbers)
        return tuple(_laid_out(x, G) for x in found)

    def add_scaled(
        self, X: Arrays, D: Arrays, c: Array | float, donate: bool = False
    ) -> list[Array]:
        return _laid_out(super().add_scaled(_pieces(X), _pieces(D), c, donate), X)

    def apply_left(
        self,
        P: Arrays,
        X: Arrays,
        workspace: Workspace | None = None,
        accumulate: Arrays | None = None,
        keep: float = 1.0,
    ) -> list[Array]:
        to = None if accumulate is None else _pieces(accumulate)
        return _laid_out(super().apply_left(P, _pieces(X), workspace, to, keep), X)

    def apply_right(
        self,
        X: Arrays,
        P: Arrays,
        workspace: Workspace | None = None,
        accumulate: Arrays | None = None,
        keep: float = 1.0,
    ) -> list[Array]:
        to = None if accumulate is None else _pieces(accumulate)
        return _laid_out(super().apply_right(_pieces(X), P, workspace, to, keep), X)


def _pieces(X: Arrays) -> list[Array]:
    return [x.to_local() for x in X]


def _laid_out(pieces: Arrays, like: Arrays) -> list[Array]:
    """Pieces as DTensors that are cut as their counterparts are."""
    return [
        DTensor.from_local(
            piece, x.device_mesh, x.placements, run_check=False, shape=x.shape, stride=x.stride()
        )
        for piece, x in zip(pieces, like, strict=True)
    ]


def _reduced(S: Array, X: Arrays, op: Any = dist.ReduceOp.SUM) -> Array:
    """A stack (K, ., .) of what each process found in its pieces, put together, in one message."""
    mesh = X[0].device_mesh
    cut = [{d for d, place in enumerate(x.placements) if place.is_shard()} for x in X]
    along = sorted(set().union(*cut))
    start = 0
    for x, mine in zip(X, cut, strict=True):
        stop = start + x.shape[:-2].numel()
        # What several processes have whole counts once, where their coordinates are 0.
        if any(mesh.get_local_rank(d) for d in along if d not in mine):
            S[start:stop] = 0.0
        start = stop
    for d in along:
        dist.all_reduce(S, op, group=mesh.get_group(d))
    return S

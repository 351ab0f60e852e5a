"""The steps of methods on pairs of DTensors: on pieces of the factors, or on whole ones.

A method that sees its factors by Grams, by products with r x r matrices and entrywise alone
(`rlora.Transform.sharded`) steps the pieces, and each process keeps the moments of its own. One
that normalises, rotates or cuts off as it likes sees whole factors, as on one process: every
process does all of the work and keeps all of the state. Scaled AdamW and SGD have a step of their
own (`rlora.torch.step.dtensor_group`).
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor, Shard
from torch.distributed.tensor.experimental import implicit_replication

from rlora.core.dispatch import get_backend
from rlora.core.errors import ShardingError
from rlora.core.layout import View
from rlora.torch.pairing.pairs import TensorPair, cut_dims, local, mesh_of
from rlora.torch.step.dtensor_exchange import Exchange, chunks, gathered, piece_of_grad
from rlora.torch.step.dtensors import cut_as, like_param
from rlora.torch.step.method_batch import MethodBatch, batches_of


class DTensorStep(ABC):
    """The pairs of one group of which every process has pieces, stepped on copies of them.

    Which collectives run depends on the layouts alone: a factor without a gradient on this process
    takes part with zeros, and is updated if another process has a gradient of it.

    Parameters
    ----------
    optimizer, group
        The optimizer and the place of the group.
    pairs : list of TensorPair
        Of DTensors.
    copies : list of TensorPair
        What is stepped in their places.
    """

    def __init__(
        self, optimizer: Any, group: int, pairs: list[TensorPair], copies: list[TensorPair]
    ) -> None:
        self._optimizer, self._group, self._pairs = optimizer, group, copies
        self.params: list[Any] = [p for pair in pairs for p in (pair.A, pair.B)]
        self.copies: list[Tensor] = [x for pair in copies for x in (pair.A, pair.B)]
        self._moving: list[bool] = []
        self._batches: list[MethodBatch] = []

    @abstractmethod
    def fetch(self, moving: Sequence[bool]) -> None:
        """Bring the copies and, where they move, their gradients up to date."""

    @abstractmethod
    def put_back(self, moving: Sequence[bool]) -> None:
        """Write this process's pieces of the copies that have moved into the parameters."""

    def prepare(self) -> list[bool]:
        """Fetch the copies and take over the state; return for each factor whether it moves."""
        moving, new = _anywhere(self.params, new=not self._moving)
        self.fetch(moving)
        if new or moving != self._moving:  # on all processes: a state may begin with a sum
            self._batches = batches_of(self._optimizer, self._group, self._pairs)
            self._moving = moving
        for batch in self._batches:
            batch.prepare()
        return moving

    def finish(self, moving: list[bool]) -> None:
        """Step the copies."""
        for batch in self._batches:
            batch.finish(None)
        self.put_back(moving)
        for x in self.copies:
            x.grad = None


class Gathered(DTensorStep):
    """The step on whole factors, the same on every process."""

    def __init__(self, optimizer: Any, group: int, pairs: list[TensorPair]) -> None:
        super().__init__(optimizer, group, pairs, [pair.whole() for pair in pairs])

    def fetch(self, moving: Sequence[bool]) -> None:
        grads = [like_param(p, piece_of_grad(p)) for p in self.params]
        wholes = gathered([*(p.detach() for p in self.params), *grads])
        count = len(self.params)
        for x, whole, grad, moves in zip(
            self.copies, wholes[:count], wholes[count:], moving, strict=True
        ):
            x.copy_(whole)
            x.grad = grad if moves else None

    def put_back(self, moving: Sequence[bool]) -> None:
        for p, whole, moves in zip(self.params, self.copies, moving, strict=True):
            if moves:
                local(p).copy_(local(cut_as(whole, p)))


class InPieces(DTensorStep):
    """The step on whole columns of A and whole rows of B, of which each process has a part.

    Where a factor is cut along its rank axis, rows are exchanged for columns and back, for all such
    factors together: pairs of one dtype, with the rank axis cut in one dimension of one mesh.
    """

    def __init__(self, optimizer: Any, group: int, pairs: list[TensorPair]) -> None:
        factors: list[tuple[Any, int]] = [(pair[side], side) for pair in pairs for side in (0, 1)]
        self._come, self._go = Exchange(factors + factors), Exchange(factors)
        copies = [
            TensorPair(
                columns_of(pair.A, 0),
                columns_of(pair.B, 1),
                ((_matrix(pair.A, 0), _matrix(pair.B, 1)),),
                owners=(pair.A, pair.B),
                scaling=pair.scaling,
            )
            for pair in pairs
        ]
        super().__init__(optimizer, group, pairs, copies)

    def fetch(self, moving: Sequence[bool]) -> None:
        both = [*(local(p.detach()) for p in self.params), *map(piece_of_grad, self.params)]
        pieces = self._come.to_columns([x.flatten(1) for x in both])
        count = len(self.params)
        for x, piece, grad, moves in zip(
            self.copies, pieces[:count], pieces[count:], moving, strict=True
        ):
            if local(x).data_ptr() != piece.data_ptr():
                local(x).copy_(piece)
            x.grad = like_param(x, grad) if moves else None

    def prepare(self) -> list[bool]:
        """As `DTensorStep.prepare`; plain tensors, such as step counts, are on every process."""
        with implicit_replication():
            return super().prepare()

    def finish(self, moving: list[bool]) -> None:
        """As `DTensorStep.finish`, likewise."""
        with implicit_replication():
            super().finish(moving)

    def put_back(self, moving: Sequence[bool]) -> None:
        rows = self._go.to_rows([local(x) for x in self.copies])
        for p, piece, moves in zip(self.params, rows, moving, strict=True):
            if moves and piece.data_ptr() != local(p).data_ptr():
                local(p).copy_(piece.reshape(local(p).shape))


def steps_on_dtensors(optimizer: Any, group: int, pairs: Sequence[TensorPair]) -> list[DTensorStep]:
    """The steps of the pairs of a group, in pieces where the method and the layout have it.

    A method whose pairs depend on one another has one step; ShardingError on several meshes.
    """
    method = optimizer._transform(optimizer.param_groups[group])
    whole: dict[Any, list[TensorPair]] = {}
    cut: dict[Any, list[TensorPair]] = {}
    for pair in pairs:
        dims = [[cut_dims(p, axis) for axis in (0, 1)] for p in pair[:2]]
        once = all(len(x) + len(y) < 2 for x, y in dims)
        # DTensor takes a cut axis of length 1 for one that a number may be spread over.
        wide = pair.A.shape[1:].numel() > 1 and pair.B.shape[0] > 1
        if method.sharded and once and wide and get_backend(pair.A).on_pieces:
            along = [d for side in (0, 1) for d in dims[side][side]]  # the rank axis
            key = (mesh_of(pair.A), pair.A.dtype, pair.B.dtype, *along[:1])
            cut.setdefault(key, []).append(pair)
        else:
            whole.setdefault(mesh_of(pair.A), []).append(pair)
    if method.together and len(cut) + len(whole) > 1:
        cut, whole = {}, {mesh_of(pair.A): list(pairs) for pair in pairs}
        if len(whole) > 1:
            msg = (
                f"{optimizer.__class__.__name__} with these options ties the pairs of a group "
                f"together, as a norm over all of them does, and they are on {len(whole)} device "
                f"meshes; give those of each mesh a group of their own"
            )
            raise ShardingError(msg)
    steps: list[DTensorStep] = [InPieces(optimizer, group, some) for some in cut.values()]
    return steps + [Gathered(optimizer, group, some) for some in whole.values()]


def columns_of(p: Any, side: int) -> Tensor:
    """The matrix of a factor, with its rank axis whole; of the same memory where it is already."""
    piece, placements = local(p.detach()).flatten(1), list(p.placements)
    shape = _matrix(p, side).shape
    for d in cut_dims(p, side):
        placements[d] = Shard(1 - side)
        mine = list(shape)
        mine[1 - side] = chunks(shape[1 - side], p.device_mesh.size(d))[
            p.device_mesh.get_local_rank(d)
        ]
        piece = piece.new_empty(mine)
    whole: Tensor = DTensor.from_local(
        piece,
        p.device_mesh,
        placements,
        run_check=False,
        shape=torch.Size(shape),
        stride=(shape[1], 1),
    )
    return whole


def _matrix(p: Tensor, side: int) -> View:
    """A view of a factor's matrix: a kernel's input axes are one."""
    shape = (p.shape[0], p.shape[1:].numel())
    return View(shape, shape, (0, 1), rank_axis=side)


def _anywhere(factors: list[Any], *, new: bool) -> tuple[list[bool], bool]:
    """Return for each factor whether any process has a gradient of it, and whether any is `new`."""
    here = [*(p.grad is not None for p in factors), new]
    flags: Any = torch.tensor(here, dtype=torch.int32)
    for mesh in dict.fromkeys(p.device_mesh for p in factors):
        flags = flags.to(mesh.device_type)
        for dimension in range(mesh.ndim):
            dist.all_reduce(flags, dist.ReduceOp.MAX, group=mesh.get_group(dimension))
    *moving, any_new = map(bool, flags.tolist())
    return moving, any_new

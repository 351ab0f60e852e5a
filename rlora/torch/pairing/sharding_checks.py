"""Checks of sharded factors: the layouts that can be stepped, and those that are refused."""

import sys
from collections.abc import Callable, Iterable
from typing import Any

import torch.distributed as dist
from torch import Tensor, nn

from rlora.core.errors import ShardingError
from rlora.pairing import find_pairs, is_factor
from rlora.torch.pairing.pairs import TensorPair, cut_dims, is_distributed, mesh_of

PARTNERS = (("lora_A", "lora_B"), ("lora_a", "lora_b"), ("linear_in", "linear_out"))


def check_whole(named: Iterable[tuple[str, Tensor]]) -> None:
    """ShardingError when a LoRA factor is a piece of itself without being a DTensor."""
    tensors = dict(named)
    for name, p in tensors.items():
        factor = is_factor(name)
        if why := (factor and _cut(name, p, tensors)) or _flattened(name, p, factor):
            msg = f"{name} {why}"
            raise ShardingError(msg)


def _flattened(name: str, p: Tensor, factor: bool) -> str | None:
    if ("_flat_param" in name and p.requires_grad) or (factor and p.ndim == 1):
        return (
            f"has shape {tuple(p.shape)}: FSDP or ZeRO has flattened what it is made of, and no "
            f"Gram can be taken of that; shard with fully_shard (FSDP2), or use DDP"
        )
    return None


def _cut(name: str, p: Any, tensors: dict[str, Tensor]) -> str | None:
    if hasattr(p, "ds_id"):
        return (
            "is partitioned by DeepSpeed ZeRO; build the optimizer before, in "
            "rlora.integrations.deepspeed.ZeroOptimizer, or use DDP or fully_shard (FSDP2)"
        )
    if getattr(p, "tensor_model_parallel", False) and _tensor_parallel():
        return (
            f"has the rows or columns of one tensor-parallel process only (partition_dim = "
            f"{getattr(p, 'partition_dim', None)}), as a plain tensor; use a tensor-parallel size "
            f"of 1 with DDP or FSDP2, or DTensors (torch.distributed.tensor.parallel)"
        )
    for a, b in PARTNERS:
        partner = tensors.get(name.replace(a, b)) if a in name else None
        if partner is None or not p.ndim == partner.ndim == 2 or is_distributed(p):
            continue
        if p.shape[1] == partner.shape[0] <= min(p.shape[0], partner.shape[1]):
            continue  # whole, (n, r) and (r, m)
        parts, rest = divmod(partner.shape[1], max(p.shape[0], 1))
        if parts > 1 and not rest and _processes() % parts == 0:
            return (
                f"has {p.shape[0]} rows and its partner {partner.shape[1]} columns, with "
                f"{_processes()} processes: it seems cut along the rank by tensor parallelism; "
                f"keep the adapters whole, with DDP or FSDP2"
            )
    return None


def _processes() -> int:
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def _tensor_parallel() -> bool:
    """Return whether Megatron cuts tensors; its attributes are there with a single process too."""
    megatron: Any = sys.modules.get("megatron.core.parallel_state")
    if megatron and megatron.model_parallel_is_initialized():
        return bool(megatron.get_tensor_model_parallel_world_size() > 1)
    return _processes() > 1


def check_layouts(pairs: Iterable[TensorPair]) -> None:
    """ShardingError for pairs that have been cut beyond what can be stepped."""
    for pair in pairs:
        _check_layout(pair)


def check_swap(strangers: int, gone: int) -> None:
    """ShardingError when pairs have vanished as unknown parameters came into the groups."""
    if strangers and gone:
        msg = (
            f"{strangers} parameters of the groups are not those that the optimizer was built "
            f"with, and {gone} pairs are gone: a training library such as DeepSpeed ZeRO has put "
            f"others in their place; use rlora.integrations.deepspeed.ZeroOptimizer, DDP or FSDP2, "
            f"or build the optimizer anew (new parameters are added by add_param_group)"
        )
        raise ShardingError(msg)


def check_kind(what: str, value: Any, p: Tensor) -> None:
    """ShardingError when a saved tensor is whole and its parameter sharded, or the other way.

    Or when both are sharded, on different meshes.
    """
    if not isinstance(value, Tensor):
        return
    kinds = f"a {type(value).__name__}", f"a {type(p).__name__}"
    if is_distributed(value) == is_distributed(p):
        if not is_distributed(p) or _on_one_mesh(value, p):
            return
        kinds = f"on {mesh_of(value)}", f"on {mesh_of(p)}"
    msg = (
        f"saved {what} is {kinds[0]}, the parameter {kinds[1]}; load with "
        f"torch.distributed.checkpoint.state_dict.set_optimizer_state_dict"
    )
    raise ShardingError(msg)


def _on_one_mesh(x: Tensor, p: Tensor) -> bool:
    """Return whether two DTensors are on the same processes, whatever their dimensions' names."""
    mine, theirs = mesh_of(x), mesh_of(p)
    same = mine.device_type == theirs.device_type and mine.shape == theirs.shape
    return bool(same and (mine.mesh == theirs.mesh).all())


def _check_layout(pair: TensorPair) -> None:
    for p, views in zip(pair[:2], zip(*pair.views, strict=True), strict=True):
        stored = views[0].stored
        if len(views) == 1 and tuple(p.shape) != stored:
            msg = (
                f"a factor of shape {stored} has become one of {tuple(p.shape)}: it has been "
                f"flattened or cut after the optimizer was built; shard with fully_shard (FSDP2), "
                f"or use DDP; where it has got another rank, build the optimizer anew"
            )
            raise ShardingError(msg)
    distributed = [is_distributed(p) for p in pair.moved]
    if not any(distributed):
        return
    shapes = f"A {tuple(pair.A.shape)} and B {tuple(pair.B.shape)}"
    if not all(distributed) or len({mesh_of(p) for p in pair.moved}) > 1:
        msg = (
            f"the factors {shapes} are not on one device mesh; shard both by one call of "
            f"fully_shard, or none"
        )
        raise ShardingError(msg)
    matrices = all(view.rows is None and view.order == (0, 1) for v in pair.views for view in v)
    if not matrices or len(pair.views) > 1 or pair.diagonal is not None or any(pair.tied):
        msg = (
            f"the factors {shapes} are sharded, and they are not two matrices (r, n) and (m, r), "
            f"or kernels, of one product; use DDP for such a model"
        )
        raise ShardingError(msg)
    _check_placements(pair, shapes)


def _check_placements(pair: TensorPair, shapes: str) -> None:
    factors: tuple[Any, Any] = pair[:2]
    placements = [p.placements for p in factors]
    ranks = [(side, d) for side, p in enumerate(factors) for d in cut_dims(p, side)]
    strided = any(hasattr(placements[side][d], "split_factor") for side, d in ranks)
    partial = any(place.is_partial() for places in placements for place in places)
    # Only the first axis of a kernel is one of the matrix.
    inside = any(p.ndim > 2 and cut_dims(p, axis) for p in factors for axis in range(1, p.ndim))
    if partial or strided or inside or len({d for _, d in ranks}) > 1:
        msg = (
            f"the factors {shapes} have placements {placements[0]} and {placements[1]}, but the "
            f"rank axis may be cut along one dimension of the mesh, in contiguous pieces, kernels "
            f"along their first axis, and none may be partial; see rlora.torch.shard_placement"
        )
        raise ShardingError(msg)


# --- how to shard ---------------------------------------------------------------------------------


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
        The placement of a parameter, None for the default, which is to cut the first axis. FSDP2
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
    from torch.distributed.tensor import Shard  # half a second

    parts = dist.get_world_size() if mesh is None else mesh.size(-1)
    named = dict(model.named_parameters())
    pairs = [pair for pair in find_pairs(named) if named[pair.a].ndim == 2]
    wide = {id(named[pair.a]) for pair in pairs if all(v.is_plain for v in pair.views[0])}

    def placement(param: nn.Parameter) -> Any:
        return Shard(1) if id(param) in wide and param.shape[1] % parts == 0 else None

    return placement

"""Code for the processes of tests/distributed: layouts that must be refused, and their errors."""

import copy

import torch
import torch.distributed as dist
from sharded_runs import MAKERS, backward, make_model, shard, train
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor

import rlora.torch
from rlora import ShardingError
from rlora.pairing import Layout
from rlora.torch import ScaledAdamW


def refusal(f, *args):
    """The message of the ShardingError of a call; None when there is none."""
    try:
        f(*args)
    except ShardingError as error:
        return str(error)
    return None


def fsdp1(original):
    """Before and after the optimizer is built."""
    model = make_model()
    model.requires_grad_(True)  # one flat parameter has to be all frozen or all trained
    built_before = ScaledAdamW(model)
    wrapped = FullyShardedDataParallel(
        model, use_orig_params=original, device_id=torch.device("cpu")
    )
    said = [refusal(ScaledAdamW, wrapped)]
    if original:
        backward(wrapped, 0)
        said.append(refusal(built_before.step))
    return said


def pair_of(A, B):
    return [("x.lora_A.weight", nn.Parameter(A)), ("x.lora_B.weight", nn.Parameter(B))]


def tensor_parallel():
    """Megatron's attributes; rows of A without them; both are plain tensors."""
    marked = pair_of(torch.ones(4, 8), torch.ones(6, 4))
    for (_, p), axis in zip(marked, (1, 0), strict=True):
        p.tensor_model_parallel, p.partition_dim = True, axis
    cut = pair_of(torch.ones(2, 8), torch.ones(6, 2 * dist.get_world_size()))
    return [refusal(ScaledAdamW, marked), refusal(ScaledAdamW, cut)]


def layouts():
    world = dist.get_world_size()
    mesh = init_device_mesh("cpu", (world,))
    grid = init_device_mesh("cpu", (2, world // 2))
    A, B = torch.ones(4, 8), torch.ones(8, 4)
    cut = {0: [Shard(0)], 1: [Shard(1)]}

    def on(x, mesh, places):
        return distribute_tensor(x, mesh, places)

    pairs = {
        "one whole": (A, on(B, mesh, cut[0])),
        "two meshes": (on(A, grid, [Shard(1), Replicate()]), on(B, mesh, cut[0])),
        "kernels": (on(A.view(4, 2, 2, 2), mesh, cut[0]), on(B.view(8, 4, 1, 1), mesh, cut[0])),
        "inside a kernel": (
            on(A.view(4, 8, 1, 1), mesh, cut[1]),
            on(B.view(8, 4, 1, 1), mesh, cut[0]),
        ),
        "transposed": (on(A.mT.contiguous(), mesh, cut[0]), on(B, mesh, cut[0]), Layout("n r")),
        "partial": (DTensor.from_local(A, mesh, [Partial()]), on(B, mesh, cut[0])),
        "rank cut twice": (on(A, grid, [Shard(0), Shard(0)]), on(B, grid, [Shard(0), Shard(0)])),
        "fine": (on(A, mesh, cut[1]), on(B, mesh, cut[0])),
    }
    said = {}
    for name, (*pair, layout) in ((n, p if len(p) == 3 else (*p, None)) for n, p in pairs.items()):
        named = pair_of(*pair)
        by_hand = layout and [(named[0][1], named[1][1], layout)]
        said[name] = refusal(lambda: ScaledAdamW(named, pairs=by_hand))  # noqa: B023
    return said


def initialize():
    """Starting values of sharded factors."""
    return refusal(rlora.torch.initialize, shard(make_model(), "default"), None, "pissa")


def whole_state():
    """The state of one process for an optimizer of sharded parameters: refused, then spread."""
    model = make_model(torch.float64)
    alone = copy.deepcopy(model)
    whole = MAKERS["adamw"](alone)
    for p in (p for p in alone.parameters() if p.requires_grad):
        p.grad = torch.ones_like(p)  # the same in all processes
    whole.step()
    sharded = shard(model, "default")
    optimizer = MAKERS["adamw"](sharded)
    train(sharded, optimizer, stop=1)
    before = copy.deepcopy(optimizer.state_dict()["state"][0]["step"])
    said = refusal(optimizer.load_state_dict, whole.state_dict())
    untouched = bool(optimizer.state_dict()["state"][0]["step"] == before)
    state = get_optimizer_state_dict(alone, whole)
    as_whole = StateDictOptions(full_state_dict=True)
    set_optimizer_state_dict(sharded, optimizer, state, options=as_whole)
    both = zip(alone.parameters(), sharded.parameters(), strict=True)
    moments = [
        (whole.state[p]["exp_avg_sq"], optimizer.state[q]["exp_avg_sq"].full_tensor())
        for p, q in both
        if p.requires_grad
    ]
    return said, untouched, all(torch.equal(x, y) for x, y in moments)

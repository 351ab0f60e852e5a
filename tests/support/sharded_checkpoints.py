"""Code for the processes of tests/distributed: half of a training, saved and resumed."""

import copy
import io

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from models import METHODS
from sharded_runs import (
    MAKERS,
    STEPS,
    backward,
    make_model,
    shard,
    share_of_batch,
    train,
    values,
    whole,
)
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_state_dict,
    set_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor


def options(flat):
    return StateDictOptions(flatten_optimizer_state_dict=flat)


def save(maker, layout, directory, flat, dtype):
    """Train half of the steps, save, and go on to the end."""
    model = shard(make_model(dtype), layout)
    optimizer = MAKERS[maker](model)
    train(model, optimizer, stop=STEPS // 2)
    model_state, optimizer_state = get_state_dict(model, optimizer, options=options(flat))
    dcp.save({"model": model_state, "optimizer": optimizer_state}, checkpoint_id=directory)
    train(model, optimizer, start=STEPS // 2)
    return values(model)


def resume(maker, layout, directory, flat, dtype):
    """The other half of the steps, from a model that was made otherwise."""
    model = shard(make_model(dtype, seed=1), layout)
    optimizer = MAKERS[maker](model)
    model_state, optimizer_state = get_state_dict(model, optimizer, options=options(flat))
    state = {"model": model_state, "optimizer": optimizer_state}
    dcp.load(state, checkpoint_id=directory)
    set_state_dict(
        model,
        optimizer,
        model_state_dict=state["model"],
        optim_state_dict=state["optimizer"],
        options=options(flat),
    )
    for p in (p for pair in optimizer._pairs for p in pair[:2]):
        assert {x.dtype for k, x in optimizer.state[p].items() if k != "step"} <= {
            torch.promote_types(dtype, torch.float32)
        }
    train(model, optimizer, start=STEPS // 2)
    return values(model)


def resumed_without_gradient(layout, directory):
    """Differences of a resumed training, in which the second layer never has a gradient."""
    result = {}
    for name in ("LoRARite", "LoRAMuon", "GraftAdamW", "AltLoRAPlus"):
        folder = f"{directory}/{name}"

        def go(model, optimizer, start, stop):
            for t in range(start, stop):
                optimizer.zero_grad()
                backward(model, t)
                for p in model[2].parameters():
                    p.grad = None
                optimizer.step()

        model = shard(make_model(torch.float64), layout)
        optimizer = METHODS[name](model, lr=1e-3)
        go(model, optimizer, 0, 3)
        saved = dict(zip("mo", get_state_dict(model, optimizer), strict=True))
        dcp.save(saved, checkpoint_id=folder)
        go(model, optimizer, 3, 6)
        other = shard(make_model(torch.float64, seed=1), layout)
        resumed = METHODS[name](other, lr=1e-3)
        state = dict(zip("mo", get_state_dict(other, resumed), strict=True))
        dcp.load(state, checkpoint_id=folder)
        set_state_dict(other, resumed, model_state_dict=state["m"], optim_state_dict=state["o"])
        go(other, resumed, 3, 6)
        result[name] = max(
            abs(x - y).max()
            for x, y in zip(values(model).values(), values(other).values(), strict=True)
        )
    return result


def moved_to_another_layout(maker):
    """Steps in one layout, its state in an optimizer of each other one, and more steps there.

    The state is then in memory of its own: it can be copied and saved.
    """
    mesh = init_device_mesh("cpu", (2, 2)) if dist.is_initialized() else None
    rows, columns, twice = Shard(0), Shard(1), Replicate()
    by_rows, by_columns = [(twice, rows)] * 2, [(twice, columns), (twice, rows)]
    moves = [(by_rows, by_rows), (by_rows, [(rows, twice)] * 2), (by_rows, by_columns)]
    moves += [(by_rows, [(twice, rows), (rows, columns)]), (by_columns, by_rows)]
    result = {}
    for k, (before, after) in enumerate(moves):
        g = torch.Generator().manual_seed(0)

        def draw(shape, places, g=g):
            x = torch.randn(shape, generator=g, dtype=torch.float64)
            return x if mesh is None else distribute_tensor(x, mesh, places)

        def go(named, optimizer, places):
            for _ in range(3):
                for (_, p), place in zip(named, places, strict=True):
                    p.grad = draw(tuple(p.shape), place)
                optimizer.step()

        shapes = (("x.lora_A.weight", (3, 8)), ("x.lora_B.weight", (3, 3)))
        first = [
            (n, torch.nn.Parameter(draw(s, p))) for (n, s), p in zip(shapes, before, strict=True)
        ]
        optimizer = MAKERS[maker](first)
        go(first, optimizer, before)
        second = [
            (
                n,
                torch.nn.Parameter(
                    p.detach().clone()
                    if mesh is None
                    else p.detach().redistribute(placements=place)
                ),
            )
            for (n, p), place in zip(first, after, strict=True)
        ]
        resumed = MAKERS[maker](second)
        resumed.load_state_dict(optimizer.state_dict())
        for _, p in second if mesh else ():
            held = [x for x in resumed.state[p].values() if isinstance(x, DTensor)]
            assert held
            assert all(x.placements == p.placements for x in held)
        go(second, resumed, after)
        torch.save(copy.deepcopy(resumed.state_dict()), io.BytesIO())
        result |= {f"{k}: {n}": whole(p) for n, p in second}
    return result


def trained_with_accelerate(maker, dtype, directory, loads_on_one):
    """A loop as accelerate has it, interrupted by a checkpoint and another accelerator."""
    from accelerate import Accelerator, FullyShardedDataParallelPlugin, PartialState
    from accelerate.state import AcceleratorState
    from accelerate.utils import DistributedType

    def prepared(seed):
        plugin = FullyShardedDataParallelPlugin(
            fsdp_version=2,
            auto_wrap_policy="transformer_based_wrap",
            transformer_cls_names_to_wrap=["LoRALinear"],
            cpu_ram_efficient_loading=loads_on_one,
        )
        AcceleratorState._reset_state(reset_partial_state=True)
        PartialState(cpu=True)
        # accelerate shards on what it takes for accelerators only; all that follows is its own.
        PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU
        accelerator = Accelerator(fsdp_plugin=plugin)
        assert accelerator.is_fsdp2
        model = make_model(dtype, seed)
        model, optimizer = accelerator.prepare(model, MAKERS[maker](model))
        return accelerator, model, optimizer

    def go_on(start, stop):
        for t in range(start, stop):
            x, y = share_of_batch(t, dtype)
            loss = (model(x) - y).square().mean()
            accelerator.backward(loss)
            optimizer.step()
            optimizer.zero_grad()

    accelerator, model, optimizer = prepared(seed=0)
    go_on(0, STEPS // 2)
    accelerator.save_state(directory)
    accelerator, model, optimizer = prepared(seed=1)
    accelerator.load_state(directory)
    go_on(STEPS // 2, STEPS)
    return values(model)

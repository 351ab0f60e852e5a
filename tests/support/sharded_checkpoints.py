"""Code for the processes of tests/distributed: half of a training, saved and resumed."""

import torch
import torch.distributed.checkpoint as dcp
from sharded_runs import MAKERS, STEPS, make_model, shard, share_of_batch, train, values
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_state_dict,
    set_state_dict,
)


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

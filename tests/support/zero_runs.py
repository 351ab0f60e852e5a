"""Code for the processes of tests/distributed/test_deepspeed.py: one training, by DeepSpeed."""

import copy
import gc
import os

import deepspeed
import torch
import torch.distributed as dist
from accelerate import Accelerator, DeepSpeedPlugin
from accelerate.state import AcceleratorState, GradientState
from accelerate.utils import InitProcessGroupKwargs
from deepspeed.accelerator import get_accelerator
from deepspeed.utils import safe_get_full_fp32_param
from pages import run
from tiny import adapted, batches, sequences, trained
from torch.utils.data import DataLoader

import rlora
import rlora.torch
from rlora.integrations.deepspeed import ZeroOptimizer

# Its shared memory collectives are compiled on first use; gloo does without.
deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False

STEPS = 5


def config_of(stage, bf16=False, **zero):
    return {
        "train_micro_batch_size_per_gpu": 12 // dist.get_world_size(),
        "gradient_clipping": 1.0,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "zero_optimization": {"stage": stage, **zero},
        "bf16": {"enabled": bf16},
    }


def prepared(seed=0, frozen=None, zero_B=True):
    """The adapted model in training, with the factors of one side frozen if asked."""
    model = adapted(seed)
    model.train()
    if not zero_B:
        torch.manual_seed(1)
        for name, p in model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(p, std=0.1)
    for name, p in model.named_parameters():
        p.requires_grad_(p.requires_grad and not (frozen and frozen in name))
    return model


def made(kind, model, groups=None):
    return getattr(rlora.torch, kind)(model if groups is None else groups(model), lr=4e-3)


def by_hand(kind, groups=None, **start):
    """The same run without DeepSpeed; what it trained, and how the losses went."""
    model = prepared(**start)
    optimizer, losses = made(kind, model, groups), []
    for batch in batches(12)[:STEPS]:
        optimizer.zero_grad()
        loss = model(**batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        losses.append(loss.item())
    return trained(model), losses


def whole(engine):
    """The masters of what is trained, by name, without DeepSpeed's marks."""
    named = [(n, p) for n, p in engine.module.named_parameters() if p.requires_grad]
    if engine.zero_optimization_stage() == 0:
        return trained(engine.module)
    return {n: safe_get_full_fp32_param(p).detach().clone() for n, p in named}


def engine_of(kind, stage, groups=None, seed=0, start=None, **options):
    model = prepared(seed, **(start or {}))
    optimizer = ZeroOptimizer(made(kind, model, groups))
    config = config_of(stage, **options)
    return deepspeed.initialize(model=model, optimizer=optimizer, config=config)[0]


def share(batch):
    rows = 12 // dist.get_world_size()
    return {k: v[dist.get_rank() * rows :][:rows] for k, v in batch.items()}


def train(engine, some):
    losses = []
    for batch in some:
        loss = engine(**share(batch)).loss
        engine.backward(loss)
        engine.step()
        total = loss.detach().float().clone()
        dist.all_reduce(total)
        losses.append(float(total) / dist.get_world_size())
    return losses


def trains(kind, stage, start=None, **options):
    """The trained parameters, and the losses."""
    engine = engine_of(kind, stage, start=start, **options)
    losses = train(engine, batches(12)[:STEPS])
    return whole(engine), losses


def trains_offloaded(kind, stage):
    return trains(kind, stage, offload_optimizer={"device": "cpu"})


def two_groups(model):
    """A group for the first layer, one of its own rate for the second."""
    named = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
    return [
        {"params": [x for x in named if ".0." in x[0]]},
        {"params": [x for x in named if ".0." not in x[0]], "lr": 1e-2},
    ]


def trains_two_groups(stage):
    return trains("ScaledAdamW", stage, groups=two_groups)


def by_hand_two_groups():
    return by_hand("ScaledAdamW", two_groups)


def resumes(kind, stage, bf16, folder):
    """Parameters after a whole run, and after one that was saved, and loaded into another model."""
    engine = engine_of(kind, stage, bf16=bf16)
    train(engine, batches(12)[:3])
    engine.save_checkpoint(folder)
    train(engine, batches(12)[3:STEPS])
    expected = whole(engine)
    later = engine_of(kind, stage, bf16=bf16, seed=1)
    later.load_checkpoint(folder)
    train(later, batches(12)[3:STEPS])
    return expected, whole(later)


def refusals():
    said = []
    for wrong in (pair_in_two_groups, tied, cut_groups, partitioned_before):
        try:
            wrong()
        except rlora.ShardingError as error:
            said.append(str(error))
    return said


def pair_in_two_groups():
    named = [(n, p) for n, p in adapted().named_parameters() if p.requires_grad]
    sides = [[x for x in named if side in x[0]] for side in ("lora_A", "lora_B")]
    ZeroOptimizer(rlora.torch.ScaledAdamW([{"params": side} for side in sides]))


def tied():
    model = adapted()
    optimizer = rlora.torch.ScaledAdamW(model)
    params = optimizer.param_groups[0]["params"]
    params[2].data = params[0].data
    ZeroOptimizer(optimizer)


def cut_groups():
    train(engine_of("ScaledAdamW", 3, sub_group_size=100), batches(12)[:1])


def partitioned_before():
    engine = engine_of("ScaledAdamW", 3)
    rlora.torch.ScaledAdamW(engine.module)


def by_hand_in_half(kind):
    """float16 beside float32 masters, where nothing overflows at a scale of 1."""
    masters = prepared(zero_B=False).half().float()  # DeepSpeed makes them of the rounded model
    optimizer, losses = made(kind, masters), []
    model = copy.deepcopy(masters).half()
    pairs = [*zip(masters.parameters(), model.parameters(), strict=True)]
    for batch in batches(12)[:STEPS]:
        model.zero_grad()
        loss = model(**batch).loss
        loss.backward()
        for master, p in pairs:
            master.grad = None if p.grad is None else p.grad.float()
        torch.nn.utils.clip_grad_norm_(masters.parameters(), 1.0)
        optimizer.step()
        for master, p in pairs:
            p.data.copy_(master.data)
        losses.append(loss.item())
    return trained(masters), losses


def trains_in_half(kind, stage, power):
    """The masters before and after, the losses, and the steps that DeepSpeed skipped.

    On CPUs whose libraries have no fast float16 DeepSpeed refuses it; torch computes it anywhere.
    """
    type(get_accelerator()).is_fp16_supported = lambda self: True
    model = prepared(zero_B=False)
    config = config_of(stage) | {"fp16": {"enabled": True, "initial_scale_power": power}}
    optimizer = ZeroOptimizer(made(kind, model))
    engine = deepspeed.initialize(model=model, optimizer=optimizer, config=config)[0]
    start = whole(engine)
    losses = train(engine, batches(12)[:STEPS])
    return start, whole(engine), losses, engine.skipped_steps


def offloaded(forced):
    """An accelerator with the masters on the CPU, stepped by DeepSpeed's own Adam if `forced`."""
    config = config_of(2, offload_optimizer={"device": "cpu"})
    return accelerator_of({**config, "zero_force_ds_cpu_optimizer": forced})


def replaced_by_accelerate():
    """The words of `ZeroOptimizer` where accelerate would offload by an optimizer of DeepSpeed's."""
    offloaded(True)
    try:
        ZeroOptimizer(made("ScaledAdamW", adapted()))
    except rlora.ShardingError as error:
        return str(error)
    finally:
        forget()


def accelerator_of(config=None, **options):
    gloo = InitProcessGroupKwargs(backend="gloo")  # without it there is one process on CPUs
    plugin = DeepSpeedPlugin(hf_ds_config=config, **options)
    return Accelerator(deepspeed_plugin=plugin, kwargs_handlers=[gloo])


def forget():
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    os.environ.pop("ACCELERATE_USE_DEEPSPEED", None)
    gc.collect()  # transformers holds the config of ZeRO-3 by a weak reference


def by_accelerate(kind, stage, offload=False):
    """The page's lines, in a loop."""
    options = {"zero_stage": stage, "gradient_clipping": 1.0}
    accelerator = offloaded(False) if offload else accelerator_of(**options)
    model = adapted()
    model.train()
    rows = [{k: v[0] for k, v in b.items()} for b in batches(1)[: 12 * STEPS]]
    space = {"model": model, "accelerator": accelerator}
    space["loader"] = DataLoader(rows, batch_size=12 // dist.get_world_size())
    title = "With accelerate, or DeepSpeed alone"
    run("deepspeed.md", title, space, kind)
    for batch in space["loader"]:
        accelerator.backward(space["model"](**batch).loss)
        space["optimizer"].step()
        space["optimizer"].zero_grad()
    assert type(space["model"].basic_optimizer) is ZeroOptimizer
    result = whole(space["model"])
    forget()
    return result


def by_trainer(kind, stage, folder):
    """The page's lines: a run, and one from its checkpoint."""
    from transformers import TrainingArguments

    results = []
    for checkpoint in (None, f"{folder}/checkpoint-4"):
        arguments = TrainingArguments(
            folder,
            max_steps=8,
            save_steps=4,
            per_device_train_batch_size=4,
            logging_steps=1,
            ddp_backend="gloo",
            dataloader_pin_memory=False,
            report_to=[],
            disable_tqdm=True,
            deepspeed={
                "zero_optimization": {"stage": stage},
                "gradient_clipping": "auto",
                "train_micro_batch_size_per_gpu": "auto",
            },
        )
        space = {"model": adapted(), "arguments": arguments, "dataset": sequences()}
        space["checkpoint"] = checkpoint
        title = "In transformers' Trainer and those built on it"
        trainer = run("deepspeed.md", title, space, kind)["trainer"]
        losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
        results.append((whole(trainer.model_wrapped), losses))
        del space, trainer, arguments
        forget()
    return results

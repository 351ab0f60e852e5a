"""LoRA with scaled AdamW on a model that FSDP2 has sharded: trained, saved, and resumed.

    torchrun --standalone --nproc-per-node 4 docs/how-to/distributed.py

It also says what a step sends, with A cut along its columns and as FSDP2 cuts it otherwise.
"""

import tempfile
from collections import Counter
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.fsdp import fully_shard
from torch.utils._python_dispatch import TorchDispatchMode

import rlora.torch

BLOCKS, WIDTH, RANK, STEPS = 8, 1024, 16, 30


def build(whole_ranks: bool) -> tuple[nn.Module, torch.optim.Optimizer]:
    """A sharded model with adapters, and its optimizer."""
    torch.manual_seed(0)
    blocks = [nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh()) for _ in range(BLOCKS)]
    model = get_peft_model(nn.Sequential(*blocks), LoraConfig(r=RANK, target_modules=r"\d\.0"))
    placement = rlora.torch.shard_placement(model) if whole_ranks else None
    for block in model.base_model.model:
        fully_shard(block, shard_placement_fn=placement)
    fully_shard(model, shard_placement_fn=placement)
    return model, rlora.torch.ScaledAdamW(model, lr=4e-3)


def train(model: nn.Module, optimizer: torch.optim.Optimizer, start: int, stop: int) -> float:
    """The loss of the last step, on this process's own data."""
    for t in range(start, stop):
        torch.manual_seed(100 * (t % 3) + dist.get_rank())
        x = torch.randn(8, WIDTH)
        loss = (model(x) - x[:, :1].tanh()).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return loss.item()


def save(directory: str, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Each process writes its pieces."""
    model_state, optimizer_state = get_state_dict(model, optimizer)
    dcp.save({"model": model_state, "optimizer": optimizer_state}, checkpoint_id=directory)


def load(directory: str, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """On any number of processes."""
    model_state, optimizer_state = get_state_dict(model, optimizer)
    state = {"model": model_state, "optimizer": optimizer_state}
    dcp.load(state, checkpoint_id=directory)
    set_state_dict(
        model,
        optimizer,
        model_state_dict=state["model"],
        optim_state_dict=state["optimizer"],
    )


class Traffic(TorchDispatchMode):
    """Bytes that this process hands to each kind of collective."""

    def __init__(self) -> None:
        super().__init__()
        self.sent: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Note what goes out, and let it go."""
        if func.namespace == "c10d":
            name = func.__name__.split(".")[0].strip("_")
            given = args[1] if "alltoall" in name else args[0]  # what comes in is first there
            tensors = [given] if isinstance(given, torch.Tensor) else given
            self.sent[name] += sum(x.numel() * x.element_size() for x in tensors)
        return func(*args, **(kwargs or {}))


def main() -> None:
    """Both ways of cutting, and a run that is interrupted."""
    dist.init_process_group("gloo")
    lines = [f"{dist.get_world_size()} processes, {BLOCKS} pairs {WIDTH} x {WIDTH}, rank {RANK}"]
    for whole_ranks in (True, False):
        model, optimizer = build(whole_ranks)
        train(model, optimizer, 0, 1)
        with Traffic() as traffic:
            optimizer.step()
        placement = "with shard_placement" if whole_ranks else "FSDP2's default"
        lines.append(f"{placement}: a step sends {dict(traffic.sent)} bytes a process")

    model, optimizer = build(whole_ranks=True)
    first = train(model, optimizer, 0, 1)
    train(model, optimizer, 1, STEPS // 2)
    shared = [tempfile.mkdtemp() if dist.get_rank() == 0 else None]
    dist.broadcast_object_list(shared)
    directory = str(shared[0])
    save(directory, model, optimizer)
    last = train(model, optimizer, STEPS // 2, STEPS)

    model, optimizer = build(whole_ranks=True)
    load(directory, model, optimizer)
    again = train(model, optimizer, STEPS // 2, STEPS)
    lines.append(f"loss {first:.4f} -> {last:.4f}; resumed half-way {again:.4f}")
    lines.append("the same bits" if again == last else "they differ")
    if dist.get_rank() == 0:
        print("\n".join(lines))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()

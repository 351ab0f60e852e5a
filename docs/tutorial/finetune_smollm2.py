"""Fine-tune a real language model on real text, on a laptop, offline: AdamW beside ScaledAdamW.

SmolLM2-135M-Instruct learns to write docstrings for the signatures of Python's standard library.
Only LoRA adapters in the last layers are trained; the two optimizers get the same initial adapter,
the same batches and the same number of steps, and each its own sweep over learning rates.

    python docs/tutorial/finetune_smollm2.py            # minutes on two cores
    python docs/tutorial/finetune_smollm2.py --quick    # a short version
"""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # before transformers is imported

import argparse
import platform
import random
import time
import warnings
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import mean
from typing import Any

import peft
import torch
import transformers
from docstring_pairs import harvest, sample, split
from finetune_report import plot, save_json, table
from peft.utils import get_peft_model_state_dict, set_peft_model_state_dict
from smollm2 import (
    ADAPTED_LAYERS,
    Batch,
    cache_lower_layers,
    evaluate,
    load_model,
    load_tokenizer,
    loss_of,
    make_batches,
    put_lower_layers,
)
from torch import Tensor, nn
from transformers import PreTrainedModel

import rlora
from rlora.torch import ScaledAdamW

# PEFT asks transformers under an old name: nothing that a reader of the tutorial could mend.
warnings.filterwarnings("ignore", "`is_gradient_checkpointing`", FutureWarning)

BETAS = (0.7, 0.8)  # those of ScaledAdamW: otherwise the betas would be compared


def adamw(model: nn.Module, lr: float) -> torch.optim.Optimizer:
    trained = (p for p in model.parameters() if p.requires_grad)
    return torch.optim.AdamW(trained, lr=lr, betas=BETAS, fused=True)


def scaled_adamw(model: nn.Module, lr: float) -> torch.optim.Optimizer:
    return ScaledAdamW(model, lr=lr, fused=True)  # the one line that changes


OPTIMIZERS = {"AdamW": adamw, "ScaledAdamW": scaled_adamw}


@dataclass
class Run:
    """One training run: the validation loss after some steps, and the adapter it ended with."""

    optimizer: str
    lr: float
    seed: int
    validation: list[tuple[int, float]]  # steps done, loss
    seconds_per_step: float
    pairs: int | None  # how many (A, B) ScaledAdamW found
    adapter: dict[str, Tensor]

    @property
    def final(self) -> float:
        return self.validation[-1][1]


# ---------------------------------------------------------------- training


def with_adapter(base: PreTrainedModel, rank: int, seed: int) -> peft.PeftModel:
    """Put new adapters into the last layers of the base: the same for the same seed."""
    torch.manual_seed(seed)
    layers = base.config.num_hidden_layers
    config = peft.LoraConfig(
        r=rank,
        lora_alpha=2 * rank,
        target_modules=["q_proj", "k_proj", "v_proj", "o_proj"],
        layers_to_transform=list(range(layers - ADAPTED_LAYERS, layers)),
        task_type="CAUSAL_LM",
    )
    return peft.get_peft_model(base, config)


def train(
    base: PreTrainedModel, parts: dict[str, list[Batch]], name: str, lr: float, seed: int,
    options: argparse.Namespace,
) -> Run:  # fmt: skip
    """One run; everything but the optimizer depends on the seed alone."""
    model = with_adapter(base, options.rank, seed)
    optimizer = OPTIMIZERS[name](model, lr)
    shuffler, queue = random.Random(seed), []
    validation, seconds = [], 0.0
    for step in range(1, options.steps + 1):
        queue = queue or shuffler.sample(parts["train"], len(parts["train"]))
        start = time.perf_counter()
        loss_of(base, queue.pop()).backward()
        optimizer.step()
        optimizer.zero_grad()
        seconds += time.perf_counter() - start
        if step % options.every == 0 or step == options.steps:
            validation.append((step, evaluate(base, parts["validation"])))
    losses = "  ".join(f"{step}: {loss:.3f}" for step, loss in validation)
    print(f"{name:11}  lr {lr:<6g}  seed {seed}  validation loss at {losses}", flush=True)
    report = getattr(optimizer, "report", None)  # ScaledAdamW's account of what it paired
    state = get_peft_model_state_dict(model, save_embedding_layers=False)
    adapter = {key: tensor.detach().clone() for key, tensor in state.items()}
    model.unload()
    pairs = None if report is None else len(report)
    return Run(name, lr, seed, validation, seconds / options.steps, pairs, adapter)


def choose(runs: list[Run]) -> list[Run]:
    """Find the learning rate with the lowest mean validation loss; its runs, one a seed."""
    by_lr: dict[float, list[Run]] = {}
    for run in runs:
        by_lr.setdefault(run.lr, []).append(run)
    return min(by_lr.values(), key=lambda same: mean(run.final for run in same))


# ---------------------------------------------------------------- test, save, report


def score_and_save(
    base: PreTrainedModel, run: Run, test: list[Batch], rank: int, folder: Path
) -> float:
    """Test loss of a run's adapter, which is also saved as PEFT saves it."""
    model = with_adapter(base, rank, run.seed)
    set_peft_model_state_dict(model, run.adapter)
    model.save_pretrained(folder, save_embedding_layers=False)
    loss = evaluate(base, test)
    model.unload()
    return loss


def score_saved(base: PreTrainedModel, test: list[Batch], folder: Path) -> float:
    """Test loss with an adapter read back, from token ids through all layers: what a user gets."""
    model = peft.PeftModel.from_pretrained(base, folder)
    loss = evaluate(base, [Batch(batch.ids, batch.targets) for batch in test])
    model.unload()
    return loss


def summarize(
    base: PreTrainedModel, best: list[Run], test: list[Batch], options: argparse.Namespace
) -> dict[str, Any]:
    """Collect the figures of an optimizer's chosen runs, and where their adapters are."""
    name = best[0].optimizer
    folders = [options.output / f"{name}-seed{run.seed}" for run in best]
    return {
        "lr": best[0].lr,
        "validation": [run.final for run in best],
        "test": [
            score_and_save(base, run, test, options.rank, folder)
            for run, folder in zip(best, folders, strict=True)
        ],
        "seconds_per_step": mean(run.seconds_per_step for run in best),
        "adapters": sum("lora_A" in key for key in best[0].adapter),
        "pairs": best[0].pairs,
        "folders": [str(folder) for folder in folders],
    }


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--every", type=int, default=20, help="steps between evaluations")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--examples", type=int, nargs=2, default=[480, 96], help="train, held out")
    parser.add_argument("--adamw-lr", type=float, nargs="+", default=[1e-3, 2e-3, 4e-3])
    parser.add_argument("--scaled-lr", type=float, nargs="+", default=[1e-3, 2e-3, 4e-3])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--output", type=Path, default=Path("build/finetune"))
    parser.add_argument("--quick", action="store_true", help="one short run of each optimizer")
    options = parser.parse_args()
    if options.quick:
        options.steps, options.every, options.examples, options.seeds = 10, 5, [64, 16], [0]
        options.adamw_lr, options.scaled_lr = [3e-3], [3e-3]
    return options


def main() -> None:
    options = parse()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    tokenizer, base = load_tokenizer(), load_model()
    parts = {}
    for part, pairs in split(harvest()).items():
        count = options.examples[0 if part == "train" else 1]
        parts[part] = make_batches(sample(pairs, count), tokenizer, options.batch)
    lower = cache_lower_layers(base, [batch for part in parts.values() for batch in part])
    before = {part: evaluate(base, parts[part]) for part in ("validation", "test")}
    print(f"validation loss before: {before['validation']:.3f}", flush=True)

    rates = {"AdamW": options.adamw_lr, "ScaledAdamW": options.scaled_lr}
    todo = [(name, lr, seed) for name in rates for lr in rates[name] for seed in options.seeds]
    runs = [train(base, parts, name, lr, seed, options) for name, lr, seed in todo]
    chosen = {}
    for name in rates:
        best = choose([run for run in runs if run.optimizer == name])
        chosen[name] = summarize(base, best, parts["test"], options)
    put_lower_layers(base, lower)
    for row in chosen.values():
        row["test_reloaded"] = score_saved(base, parts["test"], Path(row["folders"][0]))

    libraries = {lib.__name__: lib.__version__ for lib in (rlora, torch, transformers, peft)}
    result = {
        "options": vars(options) | {"output": str(options.output)},
        "versions": {"python": platform.python_version()} | libraries,
        "before": before,
        "chosen": chosen,
        "runs": [{k: v for k, v in asdict(run).items() if k != "adapter"} for run in runs],
    }
    save_json(result, options.output / "finetune.json")
    plot(result, options.output / "finetune.png")
    print(f"\n{table(result)}\n")
    for name, row in chosen.items():
        print(f"{name}: adapter in {row['folders'][0]}, test loss", end=" ")
        print(f"{row['test'][0]:.4f}, read back {row['test_reloaded']:.4f}")
    print(f"Numbers and plot: {options.output / 'finetune.json'}, finetune.png beside it")


if __name__ == "__main__":
    main()

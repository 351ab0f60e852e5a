"""Mistral-7B in 4 bits: the tasks of GLUE as the paper has them, and school mathematics."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import torch
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BitsAndBytesConfig,
)

from .glue import TASKS, GlueWorkload
from .preset import ExperimentPreset
from .sources import Row, columns, from_folder, from_hub, hold_out
from .tasks import Example
from .texts import Recipe, TextWorkload
from .workload import Part, Workload

DATASETS: Final = (*TASKS, "gsm8k")
WEIGHTS: Final = "mistralai/Mistral-7B-v0.1"
GLUE_HUB: Final = "nyu-mll/glue"
GSM8K_HUB: Final = "openai/gsm8k"

HELD_OUT: Final = 1000
"""At most so many rows of the training part choose the learning rate."""

QUICK: Final = 64
"""Rows of a part in a short run."""

HEAD_SEED: Final = 0
"""Seed of the classifier's head, which is random and not trained, as in the paper's code."""

TARGETS: Final = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj")


def preset(
    lr: float,
    scaled_lr: float,
    damping: float,
    scaled_sgd: float,
    sgd_damping: float,
) -> ExperimentPreset:
    """The paper's settings, which differ between tasks in learning rate and damping only."""
    decay = {"weight_decay": 0.01}
    scaled = {**decay, "damping_mode": "absolute"}
    adamw = {"betas": (0.9, 0.999), "placement": "before", "order": "gauss_seidel"}
    return ExperimentPreset(
        rank=16,
        alpha=16,
        dropout=0.05,
        batch=8,
        epochs=5,
        optimizers={
            "AdamW": {"lr": lr, **decay},
            "ScaledAdamW": {"lr": scaled_lr, "damping": damping, **adamw, **scaled},
            "SGD": {"lr": 5e-3, **decay},
            "ScaledSGD": {"lr": scaled_sgd, "damping": sgd_damping, **scaled},
        },
    )


PRESETS: Final[Mapping[str, ExperimentPreset]] = {
    "rte": preset(5e-5, 5e-5, 4.5, 5e-3, 0.5),
    "cola": preset(5e-5, 5e-5, 1.1e-2, 5e-3, 0.1),
    "sst2": preset(5e-5, 5e-5, 0.9, 5e-3, 1e-2),
    "stsb": preset(5e-5, 5e-5, 1e-2, 5e-3, 1e-2),
    "mrpc": preset(5e-5, 5e-5, 100.0, 5e-3, 1e-2),
    "wnli": preset(5e-5, 5e-5, 10.0, 5e-3, 1e-6),
    "qnli": preset(1e-5, 1e-5, 1e-6, 9e-4, 1e-2),
    "mnli": preset(5e-6, 3e-5, 1e-6, 1e-3, 1e-7),
    "qqp": preset(5e-6, 3e-5, 1e-6, 4e-3, 5e-7),
    "gsm8k": preset(1e-5, 1e-5, 1e-6, 9e-4, 1e-2),  # those of QNLI: the paper has no GSM8K
}
"""Zhang, Pilanci, arXiv:2402.02347, 2024, Table 7, and Mistral-7B/README.md of their code."""

ADAPTERS: Final = {**PRESETS["rte"].adapters, "target_modules": list(TARGETS)}
RECIPE: Final = Recipe(
    adapters=ADAPTERS, batch=PRESETS["gsm8k"].batch, decoding={"max_new_tokens": 320}
)


def load(
    dataset: str,
    *,
    weights: str | Path | None = None,
    data: Path | None = None,
    device: str = "cuda",
    quick: bool = False,
) -> Workload[Any]:
    """Mistral in 4 bits, of weights in full precision on the hub or in a folder, and one task.

    A tenth of the published training part, `HELD_OUT` rows at most, is held out as "validation".
    "test" is what published figures are of: GLUE's validation part, whose labels are public, and
    the test part of GSM8K. Data are a folder with these tables as CSV, TSV or JSON lines, with the
    names and columns of the hub; without it the package datasets fetches them from there.
    """
    name = str(weights or WEIGHTS)
    tokenizer = AutoTokenizer.from_pretrained(name)
    tokenizer.pad_token = tokenizer.eos_token
    loading: dict[str, Any] = {"quantization_config": in_four_bits(), "device_map": {"": device}}
    parts = parts_of(dataset, data, quick)
    if dataset == "gsm8k":
        base = AutoModelForCausalLM.from_pretrained(name, **loading)
        stay_as_loaded(base)
        asked = {part: examples(rows) for part, rows in parts.items()}
        return TextWorkload(base, tokenizer, asked, RECIPE, accuracy)
    task = TASKS[dataset]
    torch.manual_seed(HEAD_SEED)
    classifier = AutoModelForSequenceClassification.from_pretrained(
        name, num_labels=max(1, len(task.labels)), pad_token_id=tokenizer.eos_token_id, **loading
    )
    stay_as_loaded(classifier)
    return GlueWorkload(classifier, tokenizer, parts, task, ADAPTERS, PRESETS[dataset].batch)


def stay_as_loaded(base: Any) -> None:
    """Forbid a CPU to store weights otherwise for an evaluation: no gradient would pass them.

    bitsandbytes 0.50 does that where there is AVX512-BF16.
    """
    for module in base.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False


def in_four_bits() -> Any:
    """NormalFloat of 4 bits, multiplied in bfloat16; heads stay as they are."""
    kind: Any = BitsAndBytesConfig  # has no types
    return kind(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_compute_dtype=torch.bfloat16,
        llm_int8_skip_modules=["lm_head", "score"],
    )


def parts_of(dataset: str, data: Path | None, quick: bool) -> dict[Part, list[Row]]:
    """Rows of the three parts."""
    path, name, judged = GLUE_HUB, dataset, "validation"
    if dataset == "mnli":
        judged = "validation_matched"
    if dataset == "gsm8k":
        path, name, judged = GSM8K_HUB, "main", "test"
    if data is not None:
        rows, test = from_folder(data, "train"), from_folder(data, judged)
    else:
        rows, test = from_hub(path, name, "train"), from_hub(path, name, judged)
    train, validation = hold_out(rows, HELD_OUT)
    parts: dict[Part, list[Row]] = {"train": train, "validation": validation, "test": test}
    return {part: some[:QUICK] for part, some in parts.items()} if quick else parts


def examples(rows: list[Row]) -> list[Example]:
    """Questions of GSM8K, and answers that reason and end in "#### number"."""
    return [
        Example(f"Question: {question}\nAnswer:", f" {answer}")
        for question, answer in columns(rows, "question", "answer")
    ]


def accuracy(answers: list[str], references: list[list[str]]) -> dict[str, float]:
    """Share of answers with the final number of the reference."""
    right = [
        number(said) is not None and number(said) == number(wanted[0])
        for said, wanted in zip(answers, references, strict=True)
    ]
    return {"accuracy": sum(right) / len(right)}


def number(answer: str) -> float | None:
    """Return the number behind "####", without commas and currency; None where no number does."""
    found = re.search(r"####\s*[$£€]?\s*(-?[\d,]*\.?\d+)", answer)
    return float(found[1].replace(",", "")) if found else None

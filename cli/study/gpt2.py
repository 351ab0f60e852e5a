"""GPT-2 medium on the E2E restaurants: Table 1 of the paper on Riemannian preconditioned LoRA."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from .preset import ExperimentPreset
from .sources import Row, columns, from_folder, from_hub, need
from .tasks import Example
from .texts import Recipe, TextWorkload
from .workload import Part

DATASETS: Final = ("e2e",)
WEIGHTS: Final = "openai-community/gpt2-medium"

STEMS: Final[Mapping[Part, str]] = {
    "train": "trainset",
    "validation": "devset",
    "test": "testset_w_refs",
}
"""Names of the files of the E2E challenge; their columns are ``mr`` and ``ref``."""

ORIGIN: Final = "https://raw.githubusercontent.com/tuetschek/e2e-dataset/master"

QUICK: Final[Mapping[Part, int]] = {"train": 64, "validation": 16, "test": 16}
"""Rows of a part in a short run."""

ATTRIBUTE: Final = re.compile(r"([^,\[\]]+)\[([^\]]*)\]")
NAMES: Final = {"eatType": "Type", "priceRange": "price", "familyFriendly": "family friendly"}
"""Attributes that the LoRA paper's files spell otherwise."""

DECAY: Final = {"weight_decay": 0.01}
SCALED: Final = {"damping": 1e-6, "damping_mode": "absolute", **DECAY}
PRESETS: Final[Mapping[str, ExperimentPreset]] = {
    "e2e": ExperimentPreset(
        rank=4,
        alpha=32,
        dropout=0.1,
        batch=8,
        epochs=5,
        optimizers={
            "AdamW": {"lr": 2e-4, "betas": (0.9, 0.999), "eps": 1e-6, **DECAY},
            "ScaledAdamW": {
                "lr": 8e-4,
                "betas": (0.7, 0.8),
                "eps": 1e-6,
                "placement": "before",
                "order": "gauss_seidel",
                **SCALED,
            },
            "SGD": {"lr": 9e-2, **DECAY},
            "ScaledSGD": {"lr": 2e-2, **SCALED},
        },
    )
}
"""Zhang, Pilanci, arXiv:2402.02347, 2024, and GPT2/README.md of their code."""

RECIPE: Final = Recipe(
    adapters={**PRESETS["e2e"].adapters, "target_modules": ["q_proj", "v_proj"]},
    batch=PRESETS["e2e"].batch,
    decoding={"num_beams": 10, "length_penalty": 0.8, "max_new_tokens": 64},
    smoothing=0.1,
    separator=True,
    no_repeat=4,
)


def load(
    dataset: str,
    *,
    weights: str | Path | None = None,
    data: Path | None = None,
    device: str = "cuda",
    quick: bool = False,
) -> TextWorkload:
    """GPT-2 in float32, a model of the hub or a folder, and the E2E data.

    Data are a folder with the challenge's three CSV files, or tables of the same names and columns
    as TSV or JSON lines; without it the package datasets fetches them from `ORIGIN`.
    """
    parts = {part: examples(rows_of(part, data)) for part in STEMS}
    if quick:
        parts = {part: some[: QUICK[part]] for part, some in parts.items()}
    name = str(weights or WEIGHTS)
    # The code of the LoRA paper knows no dropout but the adapters' own.
    base: Any = AutoModelForCausalLM.from_pretrained(
        name, attn_pdrop=0.0, resid_pdrop=0.0, embd_pdrop=0.0
    )
    separate(base)
    return TextWorkload(
        base.float().to(device), AutoTokenizer.from_pretrained(name), parts, RECIPE, overlap
    )


def rows_of(part: Part, data: Path | None) -> list[Row]:
    """Rows with ``mr``, as "name[The Eagle], food[French]", and ``ref``."""
    if data is not None:
        return from_folder(data, STEMS[part])
    return from_hub("csv", None, "train", data_files=f"{ORIGIN}/{STEMS[part]}.csv")


def examples(rows: list[Row]) -> list[Example]:
    """Prompts as in the LoRA paper's files; the answer begins with a space, as a word does."""
    return [Example(prompt(mr), f" {ref}") for mr, ref in columns(rows, "mr", "ref")]


def prompt(mr: str) -> str:
    """``name[The Eagle], eatType[pub]`` -> ``name : The Eagle | Type : pub``."""
    said = [(name.strip(), value) for name, value in ATTRIBUTE.findall(mr)]
    return " | ".join(f"{NAMES.get(name, name)} : {value}" for name, value in said)


def overlap(answers: list[str], references: list[list[str]]) -> dict[str, float]:
    """BLEU of lower-cased words and punctuation, as the challenge measures it, and chrF."""
    metrics = need("sacrebleu.metrics")
    most = max(map(len, references))
    streams = [[r[i].strip() if i < len(r) else None for r in references] for i in range(most)]
    return {
        "bleu": metrics.BLEU(lowercase=True).corpus_score(answers, streams).score,
        "chrf": metrics.CHRF().corpus_score(answers, streams).score,
    }


class Apart(nn.Module):
    """Queries, keys and values from a projection each, in a row as GPT-2 wants them."""

    def __init__(self, merged: Any) -> None:
        super().__init__()
        q, k, v = merged.weight.data.T.contiguous().chunk(3)
        b_q, b_k, b_v = merged.bias.data.chunk(3)
        self.q_proj, self.k_proj, self.v_proj = linear(q, b_q), linear(k, b_k), linear(v, b_v)

    def forward(self, x: Tensor) -> Tensor:
        """Give the same as the merged projection."""
        return torch.cat([self.q_proj(x), self.k_proj(x), self.v_proj(x)], dim=-1)


def linear(weight: Tensor, bias: Tensor) -> nn.Linear:
    """A layer with these parameters."""
    layer = nn.Linear(weight.shape[1], weight.shape[0])
    layer.weight, layer.bias = nn.Parameter(weight), nn.Parameter(bias)
    return layer


def separate(base: Any) -> None:
    """Let queries and values have adapters of their own, as in the LoRA paper's code.

    One adapter on GPT-2's merged projection would share its A between queries, keys and values.
    """
    for block in base.transformer.h:
        block.attn.c_attn = Apart(block.attn.c_attn)

"""The files for PEFT's method comparison, read as its code reads them.

method_comparison/MetaMathQA of huggingface/peft at 5d602fdbff04c33c1c4de55cda9d4ae1d7cb7e40:
`validate_experiment_path`, `get_train_config`, `TrainConfig` and `get_optimizer_and_scheduler` in
utils.py, `PeftConfig.from_pretrained` in run.py, and default_training_params.json. The suite itself
wants a CUDA device and the weights of Llama-3.2-3B.
"""

import json
import runpy
from dataclasses import dataclass, fields
from typing import Any

import pytest
import torch
from pages import HOW_TO
from tiny import PAIRS, base, batches, loss_on_all

import rlora.torch

peft = pytest.importorskip("peft")
pytestmark = pytest.mark.filterwarnings(
    "ignore:`is_gradient_checkpointing` is deprecated:FutureWarning",
)

FOLDER = HOW_TO / "method_comparison"
EXPERIMENT = FOLDER / "experiments" / "lora" / "llama-3.2-3B-rank32-graft-adamw"
DEFAULTS = {"optimizer_type": "AdamW", "optimizer_kwargs": {"lr": 1e-4, "weight_decay": 0.1}}


@dataclass
class TrainConfig:
    """The fields of the suite's dataclass."""

    model_id: str
    dtype: str
    max_seq_length: int
    batch_size: int
    batch_size_eval: int
    max_steps: int
    eval_steps: int
    compile: bool
    use_gc: bool
    query_template: str
    seed: int
    grad_norm_clip: float
    optimizer_type: str
    optimizer_kwargs: dict[str, Any]
    lr_scheduler: str | None
    use_amp: bool
    autocast_adapter_dtype: bool
    generation_kwargs: dict[str, Any]
    attn_implementation: str | None
    init_kv_cache_prefix: str | None


@pytest.fixture
def registered(monkeypatch):
    """Our classes in torch.optim, for as long as a test runs."""
    script = runpy.run_path(str(FOLDER / "run_rlora.py"), run_name="imported")
    names = script["optimizer_names"]()
    for name in names:
        monkeypatch.setattr(torch.optim, name, getattr(torch.optim, name))
    yield names
    monkeypatch.undo()
    for name in names:
        delattr(torch.optim, name)


def training_params():
    return json.loads((EXPERIMENT / "training_params.json").read_text())


def test_the_path_is_one_of_an_experiment():
    """The suite takes ./experiments/<peft-method>/<experiment-name>."""
    assert EXPERIMENT.relative_to(FOLDER).parts[0] == "experiments"
    assert len(EXPERIMENT.relative_to(FOLDER).parts) == 3


def test_the_parameters_are_those_of_its_dataclass():
    """`TrainConfig(**{**defaults, **ours})` takes no other key; each kwargs replaces the default's."""
    ours = training_params()
    assert ours.keys() <= {field.name for field in fields(TrainConfig)}
    assert ours["optimizer_kwargs"].keys() >= DEFAULTS["optimizer_kwargs"].keys()
    assert ours["optimizer_kwargs"]["lr"] == DEFAULTS["optimizer_kwargs"]["lr"]
    assert (ours["optimizer_type"], ours["optimizer_kwargs"]["pairs"]) == ("GraftAdamW", "by_order")


@pytest.mark.works("PEFT's method comparison", "a config, by what the suite reads")
def test_the_suite_makes_the_optimizer(registered):
    """`getattr(torch.optim, type)(model.parameters(), **kwargs)`, over all of them, frozen too."""
    ours = training_params()
    assert ours["optimizer_type"] in registered
    config = peft.PeftConfig.from_pretrained(str(EXPERIMENT))
    assert (config.peft_type, config.r, config.lora_alpha) == (peft.PeftType.LORA, 32, 64)
    # A rank that the tiny model has room for: A is no longer than wide, B no wider than long.
    config.r, config.lora_alpha = 4, 8
    config.target_modules = "all-linear"
    model = peft.get_peft_model(base(), config, autocast_adapter_dtype=True)
    cls = getattr(torch.optim, ours["optimizer_type"])
    optimizer = cls(model.parameters(), **ours["optimizer_kwargs"])
    assert type(optimizer) is rlora.torch.GraftAdamW
    assert len(optimizer.report) == PAIRS
    start, frozen = (
        loss_on_all(model),
        [p.clone() for p in model.parameters() if not p.requires_grad],
    )
    for batch in batches():
        optimizer.zero_grad()
        model(**batch).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    assert loss_on_all(model) < start
    now = [p for p in model.parameters() if not p.requires_grad]
    assert all(torch.equal(p, q) for p, q in zip(frozen, now, strict=True))

"""The figures in the log of a real transformers Trainer."""

import json
from functools import partial

import pytest
import torch

transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")

from rlora.torch import LoRARite, ScaledAdamW, log_diagnostics  # noqa: E402
from rlora.torch.monitor.diagnostics import MARKS, MEASURES  # noqa: E402

# What peft 0.21 asks of transformers 5.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated")


def make_model():
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=32,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
    )
    lora = peft.LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"])
    return peft.get_peft_model(transformers.LlamaForCausalLM(config), lora)


def make_trainer(model, folder, make=ScaledAdamW, **options):
    g = torch.Generator().manual_seed(0)
    rows = [{"input_ids": row, "labels": row} for row in torch.randint(32, (16, 8), generator=g)]
    arguments = {"max_steps": 6, "logging_steps": 2, "learning_rate": 1e-2, **options}
    return transformers.Trainer(
        model,
        transformers.TrainingArguments(
            output_dir=str(folder),
            per_device_train_batch_size=4,
            report_to=[],
            use_cpu=True,
            disable_tqdm=True,
            dataloader_pin_memory=False,
            **arguments,
        ),
        train_dataset=rows,
        eval_dataset=rows[:4],
        optimizers=(make(model, lr=1e-2), None),
    )


class Seen(transformers.TrainerCallback):
    """Record of the logs that a reporting callback is given."""

    def __init__(self):
        self.logs = []

    def on_log(self, args, state, control, logs=None, **kwargs):
        self.logs.append((state.global_step, dict(logs)))


@pytest.mark.parametrize("make", [ScaledAdamW, LoRARite])
@pytest.mark.works("transformers Trainer", "diagnostics in its log")
def test_the_summary_stands_beside_every_loss(tmp_path, make):
    model = make_model()
    trainer = make_trainer(model, tmp_path, make, eval_strategy="steps", eval_steps=3)
    trainer.add_callback(seen := Seen())
    log_diagnostics(trainer)
    trainer.train()
    history = trainer.state.log_history
    losses = {entry["step"] for entry in history if "loss" in entry}
    figures = {entry["step"]: entry for entry in history if "rlora/pairs" in entry}
    assert losses == figures.keys() == {2, 4, 6}
    assert len([entry for entry in history if "rlora/pairs" in entry]) == 3
    for entry in figures.values():
        assert entry["rlora/pairs"] == 4
        figures_of_float32 = {key for key in MEASURES if not key.startswith("lost")}
        assert {key.split("/")[1] for key in entry if "/" in key} == {
            "pairs",
            *figures_of_float32,
            *MARKS,
        }
        assert 0 < entry["rlora/step_in_weight/max"] < 1
    assert {step for step, logs in seen.logs if "rlora/step/max" in logs} == {2, 4, 6}
    trainer.save_state()
    saved = json.loads((tmp_path / "trainer_state.json").read_text())
    assert saved["log_history"][0]["loss"] > 0
    assert not trainer.optimizer.optimizer._watching  # when training has ended


def test_it_tells_of_the_step_that_was_logged(tmp_path):
    """The same training by hand gives the same figures, pair by pair."""
    model = make_model()
    relative = partial(ScaledAdamW, damping_mode="relative")  # which skips what is zero
    trainer = make_trainer(model, tmp_path, relative, max_steps=1, logging_steps=1)
    log_diagnostics(trainer, per_pair=True)
    before = [p.detach().clone() for p in model.parameters() if p.requires_grad]
    trainer.train()
    (entry,) = (entry for entry in trainer.state.log_history if "rlora/pairs" in entry)
    names = [n for n, p in model.named_parameters() if p.requires_grad]
    after = [p.detach() for p in model.parameters() if p.requires_grad]
    for name, p0, p in zip(names, before, after, strict=True):
        if "lora_A" in name:
            pair = name.replace(".lora_A.default.weight", " (default)")
            expected = float((p - p0).norm() / p0.norm())
            # Norms of float32 numbers, in float32 on this side.
            assert entry[f"rlora/{pair}/step_A"] == pytest.approx(expected, rel=1e-4)
            assert entry[f"rlora/{pair}/skipped_B"] == 1  # the first step from B = 0


def test_gradient_accumulation_and_logging_by_epoch(tmp_path):
    model = make_model()
    options = {"gradient_accumulation_steps": 2, "logging_strategy": "epoch", "max_steps": 4}
    trainer = make_trainer(model, tmp_path, **options)
    log_diagnostics(trainer)
    trainer.train()
    figures = [entry for entry in trainer.state.log_history if "rlora/pairs" in entry]
    assert [entry["step"] for entry in figures] == [2, 4]


def test_it_trains_as_without(tmp_path):
    weights = []
    for watch in (False, True):
        model = make_model()
        trainer = make_trainer(model, tmp_path)
        if watch:
            log_diagnostics(trainer)
        trainer.train()
        weights.append([p.detach().clone() for p in model.parameters()])
    assert all(torch.equal(p, q) for p, q in zip(*weights, strict=True))


def test_another_optimizer_is_refused(tmp_path):
    model = make_model()
    trainer = make_trainer(model, tmp_path, plain)
    callback = log_diagnostics(trainer)
    with pytest.raises(TypeError, match="AdamW; give it by optimizers="):
        trainer.train()
    trainer.remove_callback(callback)
    trainer.train()


def plain(model, lr):
    return torch.optim.AdamW(model.parameters(), lr=lr)

"""Lightning's Trainer, as docs/how-to/trainers.md shows it, on a tiny Llama."""

from itertools import pairwise

import pytest
import torch
from pages import run
from tiny import PAIRS, adapted, batches, loss_on_all, same, trained
from torch.utils.data import DataLoader

import rlora.torch

lightning = pytest.importorskip("lightning")
pytest.importorskip("peft")

AUTOMATIC, MANUAL = "automatic", "manual"
BY_HAND = """
class ByHand(Adapted):
    automatic_optimization = False

    def training_step(self, batch, _):
        optimizer, scheduler = self.optimizers(), self.lr_schedulers()
        loss = self.model(**batch).loss
        optimizer.zero_grad()
        self.manual_backward(loss)
        self.clip_gradients(optimizer, gradient_clip_val=1.0)
        optimizer.step()
        scheduler.step()
"""
EPOCH = 8  # steps, of eight sequences each
kinds = pytest.mark.parametrize("kind", ["ScaledAdamW", "LoRARite"])

pytestmark = [
    pytest.mark.filterwarnings("ignore:.* is deprecated and will be removed in v6:FutureWarning"),
    pytest.mark.filterwarnings("ignore:.*does not have many workers.*:UserWarning"),
    pytest.mark.filterwarnings("ignore:Checkpoint directory .* is not empty:UserWarning"),
    pytest.mark.filterwarnings("ignore:`isinstance.treespec, LeafSpec:FutureWarning"),
]


def rows(size):
    """A loader of the sequences in their order."""
    return DataLoader([{k: v[0] for k, v in b.items()} for b in batches(1)], batch_size=size)


def fit(way, kind, folder, model=None, checkpoint=None, size=8, **changes):
    """A run of the page; its namespace, with the trainer and the model."""
    keep = lightning.pytorch.callbacks.ModelCheckpoint(
        folder, "{epoch}", every_n_epochs=1, save_top_k=-1, save_on_train_epoch_end=True
    )
    options = {
        "max_epochs": 3,
        "accelerator": "cpu",
        "logger": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "callbacks": [keep],
    }
    if way == AUTOMATIC:
        options["gradient_clip_val"] = 1.0
    space = {
        "model": adapted() if model is None else model,
        "loader": rows(size),
        "options": options | changes,
        "checkpoint": checkpoint,
    }
    run("trainers.md", "Lightning", space, kind)
    exec(BY_HAND, space)
    module = space["ByHand" if way == MANUAL else "Adapted"](space["model"])
    trainer = lightning.Trainer(**space["options"])
    trainer.fit(module, space["loader"], ckpt_path=checkpoint)
    return space | {"module": module, "trainer": trainer}


def by_hand(kind, model, size=8, steps=24):
    """The same run without Lightning."""
    model.train()
    optimizer = getattr(rlora.torch, kind)(model, lr=4e-3)
    scheduler = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.1, total_iters=20)
    for _ in range(steps // EPOCH):
        for batch in rows(size):
            optimizer.zero_grad()
            model(**batch).loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            scheduler.step()
    return trained(model)


@kinds
@pytest.mark.parametrize("way", [AUTOMATIC, MANUAL])
@pytest.mark.works("Lightning", "automatic and manual optimisation; resume bit for bit")
def test_the_loss_falls_on_the_schedule_and_a_checkpoint_resumes_bit_for_bit(way, kind, tmp_path):
    start = loss_on_all(adapted())
    space = fit(way, kind, tmp_path)
    (optimizer,) = space["trainer"].optimizers
    assert type(optimizer) is getattr(rlora.torch, kind)
    assert len(optimizer.report) == PAIRS
    assert loss_on_all(space["model"]) < 0.9 * start
    assert optimizer.param_groups[0]["lr"] == pytest.approx(4e-4)
    assert same(trained(space["model"]), by_hand(kind, adapted()))
    checkpoint = str(tmp_path / "epoch=0.ckpt")
    resumed = fit(way, kind, tmp_path, adapted(seed=1), checkpoint)
    assert resumed["trainer"].global_step == 3 * EPOCH
    assert same(trained(resumed["model"]), trained(space["model"]))


@kinds
def test_accumulated_micro_batches_are_one_batch(kind, tmp_path):
    """In float64: Adam's first steps enlarge the rounding of gradients that are almost zero."""
    options = {"precision": "64-true", "accumulate_grad_batches": 4, "max_epochs": 1}
    parts = trained(fit(AUTOMATIC, kind, tmp_path, adapted().double(), size=2, **options)["model"])
    assert parts.keys() == trained(adapted()).keys()
    for name, p in by_hand(kind, adapted().double(), steps=EPOCH).items():
        torch.testing.assert_close(parts[name], p, rtol=1e-7, atol=1e-9, msg=name)


@kinds
def test_bfloat16(kind, tmp_path):
    space = fit(AUTOMATIC, kind, tmp_path, precision="bf16-mixed")
    assert loss_on_all(space["model"]) < 0.9 * loss_on_all(adapted())
    assert {p.dtype for p in trained(space["model"]).values()} == {torch.float32}


@pytest.mark.works("Lightning", "a checkpoint of plain AdamW goes on (`ScaledAdamW`)")
def test_a_checkpoint_of_plain_adamw_goes_on(tmp_path, monkeypatch):
    """Its moments and its options; the schedule goes on too."""

    def plain(module, lr):
        return torch.optim.AdamW([p for p in module.parameters() if p.requires_grad], lr=lr)

    with monkeypatch.context() as patch:
        patch.setattr(rlora.torch, "ScaledAdamW", plain)
        fit(AUTOMATIC, "ScaledAdamW", tmp_path, max_epochs=1)
    checkpoint = str(tmp_path / "epoch=0.ckpt")
    saved = torch.load(checkpoint, weights_only=True)
    model = adapted()
    model.load_state_dict({k.removeprefix("model."): v for k, v in saved["state_dict"].items()})
    start = loss_on_all(model)
    space = fit(AUTOMATIC, "ScaledAdamW", tmp_path, adapted(seed=1), checkpoint, max_epochs=2)
    (optimizer,) = space["trainer"].optimizers
    assert type(optimizer) is rlora.torch.ScaledAdamW
    assert space["trainer"].global_step == 2 * EPOCH
    assert counts(optimizer) == 2 * EPOCH
    assert optimizer.param_groups[0]["betas"] == (0.9, 0.999)  # of the file
    assert loss_on_all(space["model"]) < start


@kinds
@pytest.mark.filterwarnings("ignore:Detected call of `lr_scheduler.step:UserWarning")
@pytest.mark.works("Lightning", "fp16 with a GradScaler")
def test_float16_with_a_scaler_whose_first_steps_are_skipped(kind, tmp_path):
    """A scale of 2^30 overflows float16; it is halved until the gradients fit."""
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**30)
    seen = [(trained(adapted()), 0, scaler.get_scale())]

    class Watch(lightning.pytorch.callbacks.Callback):
        def on_train_batch_end(self, trainer, module, outputs, batch, index):
            (optimizer,) = trainer.optimizers
            seen.append((trained(module.model), counts(optimizer), scaler.get_scale()))

    half = lightning.pytorch.plugins.precision.MixedPrecision("16-mixed", "cpu", scaler=scaler)
    options = {"plugins": [half], "callbacks": [Watch()], "enable_checkpointing": False}
    space = fit(AUTOMATIC, kind, tmp_path, **options)
    for (before, count, scale), (after, new_count, new_scale) in pairwise(seen):
        assert same(before, after) == (new_scale < scale)
        assert new_count == count + (new_scale == scale)
    assert 0 < seen[-1][1] < 3 * EPOCH  # some steps were skipped, some were not
    assert loss_on_all(space["model"]) < loss_on_all(adapted())


def counts(optimizer):
    """Number of steps that the state of the pairs has counted."""
    found = {int(s.get("step", s.get("count", 0))) for s in optimizer.state.values() if s}
    assert len(found) <= 1
    return found.pop() if found else 0

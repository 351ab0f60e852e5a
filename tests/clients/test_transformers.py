"""transformers' Trainer, by every way that docs/how-to/transformers.md shows, on a tiny Llama."""

import re

import pytest
import torch
from pages import run, sections
from tiny import PAIRS, adapted, base, batches, loss_on_all, same, sequences, trained

import rlora
import rlora.torch

peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers", minversion="5.0")
pytest.importorskip("accelerate")

PAGE = "transformers.md"
PLAIN = "Go on from plain AdamW"
TRAINERS_GROUPS = """
report = rlora.torch.find_pairs(model)
factors = dict(model.named_parameters())
pairs = [(factors[pair.a], factors[pair.b]) for pair in report]
choice = (rlora.torch.ScaledAdamW, {"lr": 4e-3, "pairs": pairs})
"""
OWN_GROUPS = """
def groups(model, lr, head_lr):
    named = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
    head = [(n, p) for n, p in named if "lora_" not in n]
    lora = [(n, p) for n, p in named if "lora_" in n]
    return rlora.torch.ScaledAdamW(
        [{"params": lora}, {"params": head, "lr": head_lr, "weight_decay": 0.0}], lr=lr
    )


choice = (lambda: groups, {"lr": 4e-3, "head_lr": 1e-3})
"""


def in_place_of_the_choice(code):
    """The page's second way with another factory."""
    return re.sub(r"^choice = .*$", lambda _: code, WAYS["Made by the Trainer"], flags=re.MULTILINE)


WAYS = {title: code for title, code in sections(PAGE).items() if title != PLAIN}
WAYS |= {
    "in the Trainer's groups": in_place_of_the_choice(TRAINERS_GROUPS),
    "in groups of one's own": in_place_of_the_choice(OWN_GROUPS),
}
KINDS = ["ScaledAdamW", "LoRARite"]
STEPS = 20
RATE_OF_ADAMW = 1e-2

pytestmark = pytest.mark.filterwarnings(
    "ignore:`is_gradient_checkpointing` is deprecated:FutureWarning",
)


def arguments_of(folder, **changes):
    options = {
        "max_steps": STEPS,
        "save_steps": 10,
        "logging_steps": 1,
        "weight_decay": 0.01,
        "per_device_train_batch_size": 8,
        "use_cpu": True,
        "dataloader_pin_memory": False,
        "report_to": [],
        "disable_tqdm": True,
    }
    return transformers.TrainingArguments(folder, **(options | changes))


def train(way, kind, folder, checkpoint=None, model=None, **changes):
    """A run of the page; the trainer after it."""
    arguments = arguments_of(folder, **changes)
    space = {
        "model": adapted() if model is None else model,
        "arguments": arguments,
        "dataset": sequences(),
        "checkpoint": checkpoint,
    }
    exec(WAYS[way].replace("ScaledAdamW", kind), space)
    return space["trainer"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.works(
    "transformers Trainer",
    "`optimizers=`, `optimizer_cls_and_kwargs` and a factory that sees the model; resume bit for bit",
)
def test_the_loss_falls_on_the_schedule_and_a_checkpoint_resumes_bit_for_bit(way, kind, tmp_path):
    start = loss_on_all(adapted())
    trainer = train(way, kind, tmp_path)
    optimizer = trainer.optimizer.optimizer
    assert type(optimizer) is getattr(rlora.torch, kind)
    assert len(optimizer.report) == PAIRS
    assert not optimizer.report.refused
    assert loss_on_all(trainer.model) < 0.9 * start
    # The linear schedule from 4e-3 to 0.
    assert rates_of(trainer) == pytest.approx([4e-3 * (1 - t / STEPS) for t in range(STEPS)])

    resumed = train(way, kind, tmp_path, str(tmp_path / "checkpoint-10"), adapted(seed=0))
    assert resumed.state.global_step == STEPS
    assert same(trained(resumed.model), trained(trainer.model))
    theirs, ours = optimizer.state_dict()["state"], resumed.optimizer.state_dict()["state"]
    assert theirs.keys() == ours.keys()
    for i, state in theirs.items():
        assert all(
            torch.equal(torch.as_tensor(x), torch.as_tensor(ours[i][k])) for k, x in state.items()
        )


@pytest.mark.parametrize("kind", KINDS)
def test_every_way_is_a_loop_of_ones_own(kind, tmp_path):
    """The same batches, clipping, schedule and decay by hand: the same parameters, bit for bit."""
    model = adapted()
    model.train()
    optimizer = getattr(rlora.torch, kind)(model, lr=4e-3)
    for t, batch in enumerate(batches()[:4]):
        optimizer.param_groups[0]["lr"] = 4e-3 * (1 - t / 4)
        optimizer.zero_grad()
        model(**batch).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    options = {
        "max_steps": 4,
        "train_sampling_strategy": "sequential",
        "weight_decay": optimizer.defaults["weight_decay"],
    }
    for way in WAYS:
        assert same(trained(train(way, kind, tmp_path, **options).model), trained(model)), way


@pytest.mark.parametrize("kind", KINDS)
def test_accumulated_micro_batches_are_one_batch(kind, tmp_path):
    """In float64: Adam's first steps enlarge the rounding of gradients that are almost zero."""
    options = {
        "max_steps": 4,
        "train_sampling_strategy": "sequential",
        "lr_scheduler_type": "constant",
    }
    whole = train("Made by the Trainer", kind, tmp_path, model=adapted().double(), **options)
    parts = train(
        "Made by the Trainer",
        kind,
        tmp_path,
        model=adapted().double(),
        per_device_train_batch_size=2,
        gradient_accumulation_steps=4,
        **options,
    )
    for name, p in trained(whole.model).items():
        torch.testing.assert_close(trained(parts.model)[name], p, rtol=1e-7, atol=1e-9, msg=name)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.works("transformers Trainer", "bf16")
def test_bfloat16_training(kind, tmp_path):
    """Autocast around the model; the factors stay float32 and the loss falls."""
    trainer = train("Made by the Trainer", kind, tmp_path, bf16=True)
    assert loss_on_all(trainer.model) < 0.9 * loss_on_all(adapted())
    assert {p.dtype for p in trained(trainer.model).values()} == {torch.float32}


@pytest.mark.refuses("transformers Trainer", "the bare class, which gets parameters without names")
def test_the_bare_class_is_refused_and_told_what_to_write(tmp_path):
    with pytest.raises(rlora.PairingError, match=r"without names.*\(lambda: LoRARite, "):
        transformers.Trainer(
            adapted(),
            arguments_of(tmp_path),
            train_dataset=sequences(),
            optimizer_cls_and_kwargs=(rlora.torch.LoRARite, {"lr": 4e-3}),
        ).create_optimizer()


def test_no_pair_is_split_by_the_trainers_weight_decay():
    """Even where a LoRA layer stands in a module whose name keeps its bias from decay."""

    class Block(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.norm = torch.nn.ModuleDict({"linear": torch.nn.Linear(6, 6)})
            self.bias_proj = torch.nn.Linear(6, 6)
            self.proj = torch.nn.Linear(6, 6)

    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=2, target_modules=["linear", "bias_proj", "proj"], lora_bias=True)
    model = get_peft_model(Block(), config)
    decayed = set(transformers.Trainer.get_decay_parameter_names(None, model))
    report = rlora.torch.find_pairs(model)
    assert len(report) == 3
    assert [pair.a in decayed for pair in report] == [False, False, True]
    assert all((pair.a in decayed) == (pair.b in decayed) for pair in report)


@pytest.mark.works("transformers Trainer", "a run that AdamW began (`ScaledAdamW`)")
def test_adamws_checkpoint(tmp_path):
    """ScaledAdamW goes on from it; a method that keeps other state says what is wrong."""
    model = adapted()
    plain = transformers.Trainer(
        model,
        arguments_of(tmp_path, max_steps=10),
        train_dataset=sequences(),
        optimizer_cls_and_kwargs=(lambda: plain_groups, {"lr": 4e-3}),
    )
    plain.train()
    checkpoint = str(tmp_path / "checkpoint-10")
    assert (
        train("Made by the Trainer", "ScaledAdamW", tmp_path, checkpoint).state.global_step == STEPS
    )
    with pytest.raises(rlora.ShapeError, match="exp_avg of parameter 0 is the state of another"):
        train("Made by the Trainer", "LoRARite", tmp_path, checkpoint)


@pytest.fixture(scope="module")
def of_the_trainer(tmp_path_factory):
    """A folder with a checkpoint of the Trainer's own AdamW, which makes two groups."""
    folder = tmp_path_factory.mktemp("plain")
    arguments = arguments_of(folder, max_steps=10, learning_rate=RATE_OF_ADAMW)
    transformers.Trainer(adapted(), arguments, train_dataset=sequences()).train()
    return folder


@pytest.mark.parametrize("way", WAYS)
def test_the_checkpoint_of_the_trainers_own_adamw(way, of_the_trainer, tmp_path):
    """Two groups go on; with one the schedule of two does not fit, which is torch's."""
    checkpoint = str(of_the_trainer / "checkpoint-10")
    if "groups" not in way:
        with pytest.raises(IndexError, match="list index out of range"):
            train(way, "ScaledAdamW", tmp_path, checkpoint)
        return
    trainer = train(way, "ScaledAdamW", tmp_path, checkpoint)
    assert trainer.state.global_step == STEPS
    assert [g["betas"] for g in trainer.optimizer.param_groups] == [(0.9, 0.999)] * 2
    # AdamW's schedule, not the rate of the page.
    assert rates_of(trainer)[-9] == pytest.approx(RATE_OF_ADAMW * 9 / STEPS)
    assert loss_on_all(trainer.model) < 0.9 * loss_on_all(adapted())


def test_its_moments_load_into_one_group(of_the_trainer, tmp_path):
    checkpoint = of_the_trainer / "checkpoint-10"
    arguments = arguments_of(tmp_path)
    model = peft.PeftModel.from_pretrained(base(), checkpoint, is_trainable=True)
    space = {"model": model, "arguments": arguments, "dataset": sequences()}
    space |= {"rlora": rlora, "torch": torch, "Trainer": transformers.Trainer}
    trainer = run(PAGE, PLAIN, {**space, "checkpoint": checkpoint})["trainer"]
    (group,) = trainer.optimizer.param_groups
    assert (group["betas"], group["weight_decay"]) == ((0.7, 0.8), 0.01)
    # The page's learning rate, not the one that AdamW's schedule began with.
    assert rates_of(trainer)[:2] == pytest.approx([4e-3, 4e-3 * (1 - 1 / STEPS)])
    assert loss_on_all(trainer.model) < 0.9 * loss_on_all(adapted())
    saved = torch.load(checkpoint / "optimizer.pt", weights_only=True)
    optimizer = rlora.torch.ScaledAdamW(model)
    optimizer.load_state_dict(saved)
    moments = [optimizer.state[p]["exp_avg"] for p in optimizer.param_groups[0]["params"]]
    assert all(torch.equal(x, saved["state"][i]["exp_avg"]) for i, x in enumerate(moments))


def rates_of(trainer):
    return [entry["learning_rate"] for entry in trainer.state.log_history if "loss" in entry]


def plain_groups(model, lr):
    return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=lr)

"""accelerate around a loop, as docs/how-to/trainers.md shows it, on a tiny Llama."""

import pickle

import pytest
import torch
from pages import run
from tiny import PAIRS, adapted, batches, loss_on_all, same, trained
from torch.utils.data import DataLoader

import rlora.torch

accelerate = pytest.importorskip("accelerate")
pytest.importorskip("peft")

PAGE = "trainers.md"
kinds = pytest.mark.parametrize("kind", ["ScaledAdamW", "LoRARite"])

pytestmark = pytest.mark.filterwarnings(
    "ignore:.* is deprecated and will be removed in v6:FutureWarning",
)


@pytest.fixture(autouse=True)
def a_state_of_its_own():
    """accelerate keeps precision and devices in a state that the whole process shares."""

    def forget():
        accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)
        accelerate.state.GradientState._reset_state()

    forget()
    yield
    forget()


def rows(size):
    """A loader of the sequences in their order."""
    return DataLoader([{k: v[0] for k, v in b.items()} for b in batches(1)], batch_size=size)


def prepared(kind, model=None, size=4, **options):
    space = {
        "model": adapted() if model is None else model,
        "loader": rows(size),
        "options": {"cpu": True, **options},
    }
    return run(PAGE, "accelerate", space, kind)


def epoch(space):
    """A loop as accelerate's own documentation has it."""
    accelerator, model = space["accelerator"], space["model"]
    model.train()
    for batch in space["loader"]:
        with accelerator.accumulate(model):
            accelerator.backward(model(**batch).loss)
            if accelerator.sync_gradients:
                accelerator.clip_grad_norm_(model.parameters(), 1.0)
            space["optimizer"].step()
            space["scheduler"].step()
            space["optimizer"].zero_grad()
    return space


@kinds
@pytest.mark.parametrize("precision", ["no", "bf16"])
@pytest.mark.works("accelerate", "prepare, accumulate, bf16")
def test_the_loss_falls_on_the_schedule(kind, precision):
    start = loss_on_all(adapted())
    space = prepared(kind, mixed_precision=precision)
    assert len(space["optimizer"].optimizer.report) == PAIRS
    for _ in range(3):
        epoch(space)
    space["model"].eval()
    assert loss_on_all(space["model"]) < 0.9 * start
    assert {p.dtype for p in trained(space["model"]).values()} == {torch.float32}
    # 16 micro-batches are 8 steps an epoch: after 24 the schedule has reached its end.
    assert space["optimizer"].param_groups[0]["lr"] == pytest.approx(4e-4)


@kinds
def test_it_is_the_loop_without_accelerate(kind):
    """Bit for bit: two micro-batches a step, the mean of their losses, clipped, on the schedule."""
    space = epoch(prepared(kind))
    model = adapted()
    model.train()
    optimizer = getattr(rlora.torch, kind)(model, lr=4e-3)
    scheduler = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.1, total_iters=20)
    for i, batch in enumerate(rows(4)):
        (model(**batch).loss / 2).backward()
        if i % 2:
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()
    assert same(trained(space["model"]), trained(model))


@kinds
def test_two_micro_batches_are_one_batch(kind):
    """In float64: Adam's first steps enlarge the rounding of gradients that are almost zero."""
    parts = epoch(prepared(kind, adapted().double(), size=4))["model"]
    twin = adapted().double()
    twin.train()
    optimizer = getattr(rlora.torch, kind)(twin, lr=4e-3)
    scheduler = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.1, total_iters=20)
    for batch in rows(8):
        twin(**batch).loss.backward()
        torch.nn.utils.clip_grad_norm_(twin.parameters(), 1.0)
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
    for name, p in trained(twin).items():
        torch.testing.assert_close(trained(parts)[name], p, rtol=1e-7, atol=1e-9, msg=name)


@kinds
@pytest.mark.parametrize("precision", ["no", "bf16"])
@pytest.mark.works("accelerate", "save_state and load_state bit for bit")
def test_a_saved_state_resumes_bit_for_bit(kind, precision, tmp_path):
    space = epoch(prepared(kind, mixed_precision=precision))
    space["accelerator"].save_state(tmp_path)
    expected = trained(epoch(space)["model"])
    a_later_process = prepared(kind, adapted(seed=1), mixed_precision=precision)
    a_later_process["accelerator"].load_state(tmp_path)
    rate = a_later_process["optimizer"].param_groups[0]["lr"]
    assert rate == pytest.approx(4e-3 * (1 - 0.9 * 8 / 20))
    assert same(trained(epoch(a_later_process)["model"]), expected)


@kinds
def test_a_prepared_optimizer_can_be_pickled(kind):
    space = epoch(prepared(kind))
    optimizer = pickle.loads(pickle.dumps(space["optimizer"]))
    assert type(optimizer.optimizer) is getattr(rlora.torch, kind)
    assert len(optimizer.optimizer.report) == PAIRS


@pytest.mark.parametrize("by_order", [False, True])
@pytest.mark.works(
    "accelerate", "a state of plain AdamW goes on (`ScaledAdamW`), also in diffusers' scripts"
)
def test_a_state_of_plain_adamw_goes_on(by_order, tmp_path):
    """As diffusers' LoRA scripts have it: AdamW over the trainable tensors, save_state, load_state.

    They give it `filter(lambda p: p.requires_grad, unet.parameters())`, without names
    (docs/source/en/training/lora.md of huggingface/diffusers).
    """

    def trainable(model):
        return filter(lambda p: p.requires_grad, model.parameters())

    def prepared_by(make):
        accelerator = accelerate.Accelerator(cpu=True, gradient_accumulation_steps=2)
        model = adapted()
        optimizer = make(model)
        scheduler = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.1, total_iters=20)
        parts = accelerator.prepare(model, optimizer, rows(4), scheduler)
        names = ("model", "optimizer", "loader", "scheduler")
        return {"accelerator": accelerator, **dict(zip(names, parts, strict=True))}

    def ours(model):
        given = {"params": trainable(model), "pairs": "by_order"} if by_order else {"params": model}
        return rlora.torch.ScaledAdamW(**given, lr=4e-3)

    plain = prepared_by(lambda model: torch.optim.AdamW(trainable(model), lr=3e-3))
    epoch(plain)
    plain["accelerator"].save_state(tmp_path)
    space = prepared_by(ours)
    space["accelerator"].load_state(tmp_path)
    assert same(trained(space["model"]), trained(plain["model"]))
    before = [s["exp_avg"] for s in plain["optimizer"].state.values()]
    after = [s["exp_avg"] for s in space["optimizer"].state.values()]
    assert len(after) == 2 * PAIRS
    assert all(torch.equal(x, y) for x, y in zip(before, after, strict=True))
    (group,) = space["optimizer"].param_groups
    assert (group["betas"], group["initial_lr"]) == ((0.9, 0.999), 3e-3)  # of the file
    start = loss_on_all(space["model"])
    epoch(space)
    space["model"].eval()
    assert loss_on_all(space["model"]) < start

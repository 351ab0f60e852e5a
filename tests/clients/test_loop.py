"""A loop of one's own: the page docs/how-to/own_loop.md, and what every class owes to any loop.

What tests/torch/test_optimizer.py asks of ScaledAdamW alone is asked of the other classes here.
"""

import copy
import json

import pytest
import torch
from models import CLASSES, METHODS, batch, loss_of, make_model, pairs_in, train, values
from pages import run, sections
from safetensors import safe_open
from safetensors.torch import save_file
from tiny import PAIRS, adapted, batches, lora, loss_on_all, same, trained
from torch import nn

import rlora
import rlora.torch

pytest.importorskip("peft")
pytest.importorskip("transformers")

PAGE = "own_loop.md"
LOOP, HALF = "The loop", "Half precision"
SAVE, PLAIN, GROUPS = "Save and go on", "From plain AdamW, and back", "Groups"
COME, GO, BELOW = "Add an adapter", "Remove an adapter", "Precondition another optimizer"
EPOCH = 8

make = pytest.mark.parametrize("make", CLASSES.values(), ids=CLASSES)
method = pytest.mark.parametrize("make", [CLASSES[name] for name in METHODS], ids=METHODS)
kinds = pytest.mark.parametrize("kind", ["ScaledAdamW", "LoRARite"])

pytestmark = pytest.mark.filterwarnings(
    "ignore:.* is deprecated and will be removed in v6:FutureWarning",
)


def loop(kind, model):
    """The loop of the page, once through the batches."""
    return run(PAGE, LOOP, {"model": model, "loader": batches()}, kind)


def grads_of(model, seed=0):
    model.zero_grad()
    loss_of(model, seed).backward()


def held(optimizer):
    """A copy of the state, as a list so that it can be compared."""
    return [{k: torch.as_tensor(v).clone() for k, v in s.items()} for s in optimizer.state.values()]


def equal(one, other):
    return [list(s) for s in one] == [list(s) for s in other] and all(
        torch.equal(s[k], t[k]) for s, t in zip(one, other, strict=True) for k in s
    )


# --- the page -------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["ScaledAdamW", "ScaledSGD", *sorted(METHODS.keys() - {"LoRASB"})])
@pytest.mark.works(
    "a loop of one's own",
    "schedules, clipping, accumulation, parameter groups, lr as a tensor, hooks",
)
def test_the_loop(kind):
    """Every class: the loss falls, on the schedule. LoRASB moves nothing from PEFT's own start."""
    model = adapted()
    start = loss_on_all(model)
    for _ in range(2):
        optimizer = loop(kind, model)["optimizer"]
    assert len(optimizer.report) == PAIRS
    assert not optimizer.report.refused
    assert optimizer.param_groups[0]["lr"] == pytest.approx(4e-3 * (1 - 0.9 * EPOCH / 20))
    model.eval()
    assert loss_on_all(model) < start


@kinds
def test_accumulated_micro_batches_are_one_batch(kind):
    """In float64: Adam's first steps enlarge the rounding of gradients that are almost zero."""
    model, twin = (adapted().double().train() for _ in range(2))
    optimizer, whole = (getattr(rlora.torch, kind)(m, lr=4e-3) for m in (model, twin))
    for i, rows in enumerate(batches(2), 1):
        (model(**rows).loss / 4).backward()
        if i % 4 == 0:
            optimizer.step()
            optimizer.zero_grad()
    for rows in batches(8):
        twin(**rows).loss.backward()
        whole.step()
        whole.zero_grad()
    for name, p in trained(twin).items():
        torch.testing.assert_close(trained(model)[name], p, rtol=1e-7, atol=1e-9, msg=name)


@kinds
def test_half_precision_whose_first_steps_are_skipped(kind):
    """A scale of 2^24 overflows float16 gradients; halved often enough it does not."""
    model = adapted()
    optimizer = getattr(rlora.torch, kind)(model, lr=4e-3)
    steps = []
    optimizer.register_step_post_hook(lambda *_: steps.append(1))
    space = {
        "model": model,
        "optimizer": optimizer,
        "loader": batches() * 3,
        "device": "cpu",
        "scale": 2.0**24,
        "torch": torch,
    }
    scaler = run(PAGE, HALF, space)["scaler"]
    skipped = int(24 - torch.tensor(scaler.get_scale()).log2())
    assert 0 < skipped < 16
    assert len(steps) == 3 * EPOCH - skipped
    assert loss_on_all(model) < loss_on_all(adapted())


@kinds
def test_a_saved_run_goes_on_bit_for_bit(kind, tmp_path):
    save, load = sections(PAGE)[SAVE].split("\nsaved = ")
    space = loop(kind, adapted()) | {"path": tmp_path / "run.pt"}
    exec(save, space)

    def rest(space):
        code = sections(PAGE)[LOOP].partition("model.train()")[2]
        exec(code, space)
        return trained(space["model"])

    expected = rest(space)
    later = loop(kind, adapted(seed=1)) | {"path": space["path"]}
    exec("saved = " + load, later)
    assert same(rest(later), expected)


@make
def test_a_state_in_safetensors_goes_on_bit_for_bit(make, tmp_path):
    model, path = make_model(), tmp_path / "state.safetensors"
    optimizer = make(model)
    train(model, optimizer, 3)
    saved = optimizer.state_dict()
    tensors = {
        f"{i}.{key}": torch.as_tensor(x).clone(memory_format=torch.contiguous_format)
        for i, state in saved["state"].items()
        for key, x in state.items()
    }
    save_file(tensors, path, metadata={"groups": json.dumps(saved["param_groups"])})
    later = copy.deepcopy(model)
    resumed = make(later)
    with safe_open(path, "pt") as file:
        groups = json.loads(file.metadata()["groups"])
        state = {}
        for name in file.keys():  # noqa: SIM118
            i, _, key = name.partition(".")
            state.setdefault(int(i), {})[key] = file.get_tensor(name)
    resumed.load_state_dict({"state": state, "param_groups": groups})
    old, new = (o.state_dict()["state"] for o in (optimizer, resumed))
    assert {i: x.keys() for i, x in old.items()} == {i: x.keys() for i, x in new.items()}
    for m, o in ((model, optimizer), (later, resumed)):
        train(m, o, 3, start=3)
    assert same(values(later), values(model))


def test_from_plain_adamw_and_back():
    model = adapted()
    plain = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=3e-3)
    model.train()
    for rows in batches()[:4]:
        plain.zero_grad()
        model(**rows).loss.backward()
        plain.step()
    state = [{k: v.clone() for k, v in s.items()} for s in plain.state.values()]
    space = run(PAGE, PLAIN, {"model": model, "plain": plain, "rlora": rlora})
    optimizer = space["optimizer"]
    assert optimizer.param_groups[0]["lr"] == 3e-3
    assert equal(state, held(optimizer))
    model(**batches()[4]).loss.backward()
    optimizer.step()
    moved = held(optimizer)
    plain.load_state_dict(optimizer.state_dict())
    assert equal(moved, held(plain))
    assert {int(s["step"]) for s in plain.state.values()} == {5}
    plain.step()


@method
@pytest.mark.refuses("a loop of one's own", "AdamW's state for a method class")
def test_methods_refuse_adamws_state_whole(make):
    model = make_model()
    plain = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=4e-3)
    train(model, plain, 2)
    optimizer = make(model)
    train(model, optimizer, 2)
    before = held(optimizer)
    with pytest.raises(rlora.ShapeError, match="another optimizer; this one keeps"):
        optimizer.load_state_dict(plain.state_dict())
    assert equal(before, held(optimizer))


@kinds
def test_groups(kind):
    """Two groups are two optimizers, bit for bit."""
    model, twin = adapted(), adapted()
    optimizer = run(PAGE, GROUPS, {"model": model, "rlora": rlora}, kind)["optimizer"]
    named = [(n, p) for n, p in twin.named_parameters() if p.requires_grad]
    one = getattr(rlora.torch, kind)([x for x in named if "self_attn" in x[0]], lr=8e-3)
    two = getattr(rlora.torch, kind)(
        [x for x in named if "self_attn" not in x[0]], lr=4e-3, weight_decay=0.1
    )
    for rows in batches()[:4]:
        for m, optimizers in ((model, [optimizer]), (twin, [one, two])):
            m.zero_grad()
            m(**rows).loss.backward()
            for o in optimizers:
                o.step()
    assert same(trained(model), trained(twin))


@kinds
@pytest.mark.works("a loop of one's own", "adapters that come and go")
def test_adapters_come_and_go(kind):
    """The second adapter moves as it would alone, the first as if there had been no second."""
    model = adapted()
    space = loop(kind, model)
    optimizer = space["optimizer"]
    first = {n: p for n, p in trained(model).items() if ".default." in n}
    state = held(optimizer)
    torch.manual_seed(1)
    run(PAGE, COME, space | {"config": lora()})
    assert len(optimizer.report) == 2 * PAIRS
    assert [len(g["params"]) for g in optimizer.param_groups] == [2 * PAIRS, 2 * PAIRS]

    alone = adapted()
    alone.load_state_dict(first, strict=False)
    torch.manual_seed(1)
    alone.add_adapter("second", lora())
    alone.set_adapter("second")
    separate = getattr(rlora.torch, kind)(alone, lr=4e-3, adapter="second")
    for rows in batches()[:4]:
        for m, o in ((model, optimizer), (alone, separate)):
            o.zero_grad()
            m(**rows).loss.backward()
            o.step()
    assert same(trained(model), trained(alone))
    assert all(torch.equal(dict(model.named_parameters())[n], p) for n, p in first.items())

    run(PAGE, GO, space)
    assert [len(g["params"]) for g in optimizer.param_groups] == [2 * PAIRS, 0]
    assert equal(state, held(optimizer))
    model(**batches()[0]).loss.backward()
    optimizer.step()
    assert not any(torch.equal(p, first[n]) for n, p in trained(model).items() if "lora_B" in n)
    optimizer.load_state_dict(optimizer.state_dict())


def test_an_optimizer_of_another_library_below():
    """The page's line; tests/clients/test_low_bit.py has the rest."""
    bitsandbytes = pytest.importorskip("bitsandbytes", minversion="0.50")
    model = adapted()
    space = {"model": model, "bitsandbytes": bitsandbytes, "rlora": rlora}
    optimizer = run(PAGE, BELOW, space)["optimizer"]
    assert isinstance(optimizer, bitsandbytes.optim.AdamW8bit)
    assert len(optimizer.report) == PAIRS


# --- what every class owes to any loop ------------------------------------------------------------


@make
@pytest.mark.parametrize("when", [0, 2])
@pytest.mark.works("a loop of one's own", "GradScaler")
def test_a_step_that_the_scaler_skips_leaves_all_as_it_was(make, when):
    """From the first step, when there is no state yet, and later; then the run goes on."""
    model = make_model()
    optimizer = make(model)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    for t in range(4):
        optimizer.zero_grad()
        scaler.scale(loss_of(model, t)).backward()
        if t == when:
            pairs_in(model)[0][1].grad[0, 0] = float("inf")
        before, state = values(model), held(optimizer)
        scaler.step(optimizer)
        scaler.update()
        assert same(before, values(model)) == (t == when)
        assert equal(state, held(optimizer)) or t != when
    assert scaler.get_scale() == 512.0


@make
def test_scaled_and_plain_gradients_give_the_same_run(make):
    """A scale that is a power of two costs no bit."""
    model, twin = make_model(), make_model()
    optimizer, plain = make(model), make(twin)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    for t in range(3):
        optimizer.zero_grad()
        scaler.scale(loss_of(model, t)).backward()
        scaler.step(optimizer)
        scaler.update()
        grads_of(twin, t)
        plain.step()
    assert same(values(model), values(twin))


@method
def test_the_step_does_not_notice_autocast(make):
    model, twin = make_model(), make_model()
    for m in (model, twin):
        optimizer = make(m)
        for t in range(3):
            grads_of(m, t)
            with torch.autocast("cpu", dtype=torch.bfloat16, enabled=m is model):
                optimizer.step()
    assert same(values(model), values(twin))


@make
def test_micro_batches(make):
    model, twin = make_model(dtype=torch.float64), make_model(dtype=torch.float64)
    optimizer, whole = make(model), make(twin)
    for t in range(3):
        x, y = batch(t, torch.float64)
        optimizer.zero_grad()
        for part in range(0, 16, 4):
            rows = slice(part, part + 4)
            ((model(x[rows]) - y[rows]).square().mean() / 4).backward()
        optimizer.step()
        whole.zero_grad()
        (twin(x) - y).square().mean().backward()
        whole.step()
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        # float64: the sums are taken in another order
        torch.testing.assert_close(p, q, rtol=1e-8, atol=1e-10)


@make
def test_clipped_gradients_are_what_is_stepped(make):
    model, twin = make_model(), make_model()
    optimizer, by_hand = make(model), make(twin)
    for t in range(3):
        grads_of(model, t)
        norm = nn.utils.clip_grad_norm_(model.parameters(), 0.1)
        assert norm > 0.1
        kept = {p: p.grad.clone() for p in model.parameters() if p.grad is not None}
        optimizer.step()
        assert all(torch.equal(p.grad, g) for p, g in kept.items())
        grads_of(twin, t)
        for p in twin.parameters():
            if p.grad is not None:
                p.grad *= (0.1 / (norm + 1e-6)).clamp(max=1.0)
        by_hand.step()
    assert same(values(model), values(twin))


@make
def test_zero_grad_both_ways(make):
    model, twin = make_model(), make_model()
    for m, to_none in ((model, True), (twin, False)):
        optimizer = make(m)
        for t in range(4):
            optimizer.zero_grad(set_to_none=to_none)
            assert all(p.grad is None or not p.grad.any() for p in m.parameters())
            loss_of(m, t).backward()
            optimizer.step()
    assert same(values(model), values(twin))


@make
@pytest.mark.parametrize("side", ["A", "B", "AB"])
def test_a_factor_without_a_gradient_stays(make, side):
    """Bit for bit, in one step of four; the other pair moves as if nothing were missing."""
    model = make_model(bias=False)
    optimizer = make(model)
    for t in range(4):
        grads_of(model, t)
        without = [pairs_in(model)[0]["AB".index(letter)] for letter in side] if t == 1 else []
        twin, whole = copy.deepcopy((model, optimizer))
        for p, q in zip(model.parameters(), twin.parameters(), strict=True):
            q.grad = None if p.grad is None else p.grad.clone()
        for p in without:
            p.grad = None
        before = [p.detach().clone() for p in without]
        optimizer.step()
        whole.step()
        assert all(torch.equal(p, old) for p, old in zip(without, before, strict=True))
        for p, q in zip(pairs_in(model)[1], pairs_in(twin)[1], strict=True):
            # one layer on a stack or two: the kernels may round otherwise
            torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6)
    assert all(torch.isfinite(p).all() for p in model.parameters())


@make
def test_empty_groups(make):
    """Beside named groups and tensors, in any place; with a scheduler; saved and loaded."""
    model, twin = make_model(), make_model()
    named = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
    optimizer = make([{"params": []}, {"params": named}, {"params": [], "lr": 0.5}])
    plain = make(twin)
    train(model, optimizer, 2)
    train(twin, plain, 2)
    optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    schedules = [torch.optim.lr_scheduler.StepLR(o, 1, 0.5) for o in (optimizer, plain)]
    for m, o, schedule in zip((model, twin), (optimizer, plain), schedules, strict=True):
        train(m, o, 1)
        schedule.step()
        train(m, o, 1)
    assert same(values(model), values(twin))
    assert len(optimizer.param_groups) == 3
    pairs = pairs_in(model)
    by_hand = make([{"params": []}, {"params": [p for pair in pairs for p in pair]}], pairs=pairs)
    by_hand.add_param_group({"params": []})
    train(model, by_hand, 1)


@method
def test_groups_of_pairs_are_separate_optimizers(make):
    model, twin = make_model(bias=False), make_model(bias=False)
    named = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
    halves = [[x for x in named if x[0].startswith(place)] for place in ("0", "2")]
    decay = {"weight_decay": 0.3} if "weight_decay" in make(twin).defaults else {}
    optimizer = make([{"params": halves[0], "lr": 1e-3}, {"params": halves[1], **decay}])
    others = [(n, p) for n, p in twin.named_parameters() if p.requires_grad]
    one = make([x for x in others if x[0].startswith("0")])
    one.param_groups[0]["lr"] = 1e-3
    two = make([x for x in others if x[0].startswith("2")], **decay)
    for t in range(3):
        grads_of(model, t)
        optimizer.step()
        grads_of(twin, t)
        one.step()
        two.step()
    assert same(values(model), values(twin))


@method
def test_lr_as_a_tensor(make):
    """The same run as with a number; a schedule writes into the tensor."""
    model, twin = make_model(), make_model()
    plain = make(twin)
    lr = torch.tensor(plain.param_groups[0]["lr"])
    kind = type(plain)
    optimizer = kind(model, lr=lr)
    schedules = [torch.optim.lr_scheduler.StepLR(o, 1, 0.5) for o in (optimizer, plain)]
    for _ in range(3):
        train(model, optimizer, 1)
        train(twin, plain, 1)
        for schedule in schedules:
            schedule.step()
    assert isinstance(optimizer.param_groups[0]["lr"], torch.Tensor)
    assert float(optimizer.param_groups[0]["lr"]) == pytest.approx(
        float(lr.new_tensor(plain.param_groups[0]["lr"]))
    )
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        # lr is float32 here and a float64 number there: they differ by its rounding
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6)


@make
def test_hooks_see_the_parameters_before_and_after(make):
    model = make_model()
    optimizer = make(model)
    seen = []
    pre = optimizer.register_step_pre_hook(lambda o, a, k: seen.append(("pre", values(model))))
    optimizer.register_step_post_hook(lambda o, a, k: seen.append(("post", values(model))))
    start = values(model)
    train(model, optimizer, 1)
    assert [name for name, _ in seen] == ["pre", "post"]
    assert same(seen[0][1], start)
    assert same(seen[1][1], values(model))
    assert not same(start, values(model))
    pre.remove()
    train(model, optimizer, 1)
    assert [name for name, _ in seen] == ["pre", "post", "post"]


@method
def test_a_group_added_in_mid_run_begins_at_its_first_step(make):
    model, extra = make_model(), make_model(seed=3, bias=False)
    twin, twin_extra = copy.deepcopy((model, extra))
    optimizer, reference = make(model), make(twin)
    train(model, optimizer, 3)
    train(twin, reference, 3)
    new = [(f"new.{n}", p) for n, p in extra.named_parameters() if p.requires_grad]
    optimizer.add_param_group({"params": new})
    assert len(optimizer.report) == 4
    alone = make(twin_extra)
    for t in range(2):
        for m in (model, extra, twin, twin_extra):
            grads_of(m, t)
        for o in (optimizer, reference, alone):
            o.step()
    assert same(values(model), values(twin))
    assert same(values(extra), values(twin_extra))


@make
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_factors_in_half_precision(make, dtype):
    """The loss falls; what is kept between steps is float32."""
    model = make_model(dtype=dtype, bias=False)  # in float16 torch's own AdamW ends in NaN
    optimizer = make(model)
    losses = train(model, optimizer, 12)
    assert min(losses[-3:]) < max(losses[:3])
    assert all(torch.isfinite(p).all() for p in model.parameters())
    for pair in pairs_in(model):
        for p in pair:
            floats = [
                x
                for x in optimizer.state.get(p, {}).values()
                if isinstance(x, torch.Tensor) and x.is_floating_point()
            ]
            assert all(x.dtype == torch.float32 for x in floats)

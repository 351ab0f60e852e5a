"""The torch optimizers against the functional ones, PEFT's wrapper, and torch's own promises."""

import copy
import pickle
import re
import warnings
from functools import partial

import pytest
import torch
from models import CLASSES, METHODS, batch, loss_of, make_model, pairs_in, same, train, values
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import rlora
import rlora.torch
from rlora import Factors
from rlora.methods.scaled import PEFT
from rlora.torch import ScaledAdamW, ScaledSGD, precondition
from rlora.torch.step import method_batch

make = pytest.mark.parametrize("make", CLASSES.values(), ids=CLASSES)


@pytest.mark.parametrize("flags", [{}, {"fused": True}, {"foreach": True}], ids=str)
@pytest.mark.parametrize("order", ["jacobi", "gauss_seidel"])
@pytest.mark.parametrize("placement", ["before", "after", "both"])
@pytest.mark.parametrize("mode", ["relative", "absolute", "covariant"])
def test_equals_the_functional_method(mode, placement, order, flags):
    """Ten steps in float64; the head outside the pairs moves as torch's AdamW moves it."""
    options = {"damping": 1e-3, "damping_mode": mode, "placement": placement, "order": order}
    model = make_model(dtype=torch.float64)
    plain = copy.deepcopy(model)
    optimizer = ScaledAdamW(model, lr=1e-2, weight_decay=0.1, **options, **flags)
    head = [p for name, p in plain.named_parameters() if name.startswith("3.")]
    reference = torch.optim.AdamW(head, lr=1e-2, betas=(0.7, 0.8), weight_decay=0.1)
    method = rlora.scaled_adamw(weight_decay=0.1, **options)
    params = [Factors(a.detach().clone(), b.detach().clone()) for a, b in pairs_in(model)]
    state = method.init(params)
    for t in range(10):
        optimizer.zero_grad()
        loss_of(model, t).backward()
        grads = [Factors(a.grad.clone(), b.grad.clone()) for a, b in pairs_in(model)]
        for p, q in zip(head, model[3].parameters(), strict=True):
            p.grad = q.grad.clone()
        optimizer.step()
        reference.step()
        params, state = rlora.step(method, params, grads, state, 1e-2)
    for pair, factors in zip(pairs_in(model), params, strict=True):
        for p, x in zip(pair, factors, strict=True):
            torch.testing.assert_close(p.detach(), x, rtol=0, atol=1e-12)
    for p, q in zip(head, model[3].parameters(), strict=True):
        torch.testing.assert_close(q.detach(), p.detach(), rtol=0, atol=1e-14)


def run_beside(model, optimizer, method, steps, changed=None):
    """Steps of a model and of the functional method on its gradients, which must move alike.

    `changed` are a step, and the method from then on after the optimizer's options have changed.
    """
    params = [Factors(a.detach().clone(), b.detach().clone()) for a, b in pairs_in(model)]
    state = method.init(params)
    for t in range(steps):
        if changed and t == changed[0]:
            options, method = changed[1:]
            optimizer.param_groups[0].update(options)
        optimizer.zero_grad()
        loss_of(model, t).backward()
        grads = [Factors(a.grad.clone(), b.grad.clone()) for a, b in pairs_in(model)]
        optimizer.step()
        params, state = rlora.step(method, params, grads, state, 1e-2)
    for pair, factors in zip(pairs_in(model), params, strict=True):
        for p, x in zip(pair, factors, strict=True):
            # float64: rounding, in another order of the sums, over a few steps
            torch.testing.assert_close(p.detach(), x, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("flags", [{}, {"fused": True}, {"foreach": True}], ids=str)
def test_scaled_sgd_equals_the_functional_method(flags):
    model = make_model(dtype=torch.float64, bias=False)
    optimizer = ScaledSGD(model, lr=1e-2, momentum=0.9, nesterov=True, **flags)
    run_beside(model, optimizer, rlora.scaled_sgd(momentum=0.9, nesterov=True), 10)


@pytest.mark.parametrize("name", sorted(METHODS))
def test_layers_in_batches_equal_the_functional_method(name, monkeypatch):
    """Each pair a portion of its own, read and written where it is, in memory that all share."""
    monkeypatch.setattr(method_batch, "PORTION", 1)
    model = make_model(dtype=torch.float64, bias=False)
    optimizer = METHODS[name](model, lr=1e-2)
    options = optimizer._chosen(optimizer.param_groups[0])
    run_beside(model, optimizer, type(optimizer).method(**options), 6)
    assert len(optimizer._current_plans()[0].batches) == len(pairs_in(model))


@pytest.mark.parametrize("portion", [1, method_batch.PORTION])
@pytest.mark.parametrize("name", ["LoRARite", "LoRAProAdamW", "LoRAProSGD", "LoRAPlus"])
def test_gradients_are_only_read(name, portion, monkeypatch):
    monkeypatch.setattr(method_batch, "PORTION", portion)
    model = make_model(dtype=torch.float64, bias=False)
    twin = copy.deepcopy(model)
    options = {"momentum": 0.9} if name == "LoRAProSGD" else {}
    up = METHODS[name](model, lr=1e-2, maximize=True, **options)
    down = METHODS[name](twin, lr=1e-2, **options)
    for t in range(3):
        up.zero_grad()
        loss_of(model, t).backward()
        before = [p.grad.clone() for p in model.parameters() if p.grad is not None]
        for p, q in zip(model.parameters(), twin.parameters(), strict=True):
            q.grad = None if p.grad is None else -p.grad
        up.step()
        down.step()
        after = [p.grad for p in model.parameters() if p.grad is not None]
        assert all(map(torch.equal, before, after))
    assert same(values(model), values(twin))


@pytest.mark.parametrize("name, method_of, changes", [
    ("LoRARite", rlora.lora_rite, {"betas": (0.5, 0.6), "eps": 1e-3, "weight_decay": 0.2}),
    ("LoRAProAdamW", rlora.lora_pro_adamw, {"betas": (0.5, 0.6), "eps": 1e-3, "weight_decay": 0.2}),
    ("LoRAProSGD", rlora.lora_pro_sgd, {"momentum": 0.5, "weight_decay": 0.2}),
])  # fmt: skip
def test_options_changed_in_mid_run_count(name, method_of, changes):
    """As a scheduler of betas or momentum changes them: the functional method with the new ones."""
    model = make_model(dtype=torch.float64, bias=False)
    start = {"momentum": 0.9} if "momentum" in changes else {}
    optimizer = getattr(rlora.torch, name)(model, lr=1e-2, **start)
    before = method_of(weight_decay=optimizer.param_groups[0]["weight_decay"], **start)
    named = dict(changes)
    if "betas" in named:
        named["b1"], named["b2"] = named.pop("betas")
    run_beside(model, optimizer, before, 6, changed=(3, changes, method_of(**named)))


def test_the_functional_step_takes_tensors_that_require_gradients():
    """As a loop of one's own has them, outside of no_grad too for a method without products."""
    pair = Factors(torch.ones(2, 5, requires_grad=True), torch.ones(3, 2, requires_grad=True))
    grads = Factors(torch.ones(2, 5), torch.ones(3, 2))
    method = rlora.lora_plus()
    moved, _ = rlora.step(method, pair, grads, method.init(pair), 1e-2)
    assert float((moved.A - pair.A).detach().abs().max()) > 0


def test_momentum_that_starts_in_mid_run():
    """Without momentum there is no buffer; when a schedule turns it on, one is made."""
    model = make_model()
    optimizer = rlora.torch.LoRAProSGD(model, lr=1e-2)
    train(model, optimizer, 2)
    optimizer.param_groups[0]["momentum"] = 0.9
    train(model, optimizer, 2)
    for p in (p for pair in pairs_in(model) for p in pair):
        assert float(optimizer.state[p]["mu"].abs().max()) > 0


def peft_model(dtype=torch.float32):
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(6, 10, dtype=dtype), nn.Tanh(), nn.Linear(10, 8, dtype=dtype))
    config = LoraConfig(r=4, target_modules=["0", "2"], use_dora=False)
    return get_peft_model(base, config, autocast_adapter_dtype=False)


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 2e-6), (torch.bfloat16, 2e-2)])
@pytest.mark.parametrize("base, options", [
    (torch.optim.AdamW, {"lr": 1e-3, "weight_decay": 0.1}),
    (torch.optim.SGD, {"lr": 1e-2, "momentum": 0.9}),
])  # fmt: skip
def test_agrees_with_pefts_wrapper(base, options, dtype, tolerance):
    """G12, 20 steps each on its own path. In float32 their pinv and our Cholesky differ by rounding;
    in bfloat16 they round directions and moments to 8 bits, and we do not; both to the nearest."""
    from peft.optimizers import create_riemannian_optimizer

    theirs, ours = peft_model(dtype), peft_model(dtype)
    ours.load_state_dict(theirs.state_dict())
    a = create_riemannian_optimizer(theirs, base, **options)
    damping = {name: PEFT[name] for name in ("damping", "damping_mode")}
    if base is torch.optim.AdamW:
        betas, placement = (PEFT["b1"], PEFT["b2"]), PEFT["placement"]
        b = ScaledAdamW(ours, betas=betas, placement=placement, **options, **damping)
    else:
        b = ScaledSGD(ours, **options, **damping)
    b.param_groups[0]["stochastic_rounding"] = False
    assert len(b.report) == 2
    for t in range(20):
        for model, optimizer in ((theirs, a), (ours, b)):
            optimizer.zero_grad()
            x, y = batch(t, dtype)
            (model(x) - y).float().square().mean().backward()
            optimizer.step()
    for (name, p), (_, q) in zip(theirs.named_parameters(), ours.named_parameters(), strict=True):
        scale = p.detach().float().abs().max().clamp(min=1e-3)
        assert ((p - q).detach().float().abs().max() / scale) <= tolerance, name


@make
def test_is_a_true_subclass_and_the_loss_falls(make):
    model = make_model()
    optimizer = make(model)
    parents = (torch.optim.AdamW, torch.optim.SGD, torch.optim.NAdam)
    assert sum(isinstance(optimizer, parent) for parent in parents) == 1
    losses = train(model, optimizer, 40)
    assert losses[-1] < 0.9 * losses[0]
    assert {"damping", "scaling"} & set(re.findall(r"\w+", repr(optimizer)))


@make
def test_gradients_are_untouched(make):
    model = make_model()
    optimizer = make(model)
    for _ in range(2):
        optimizer.zero_grad()
        loss_of(model).backward()
        before = {
            n: (p.grad, p.grad.clone()) for n, p in model.named_parameters() if p.requires_grad
        }
        optimizer.step()
        for name, p in model.named_parameters():
            if p.requires_grad:
                grad, old = before[name]
                assert p.grad is grad
                assert torch.equal(grad, old)


@make
def test_closure_runs_once_first_and_under_grad(make):
    model = make_model()
    optimizer = make(model)
    twin = copy.deepcopy(model)
    reference = make(twin)
    calls = []

    def closure():
        assert torch.is_grad_enabled()
        calls.append(1)
        optimizer.zero_grad()
        loss = loss_of(model)
        loss.backward()
        return loss

    assert optimizer.step(closure).item() == loss_of(twin).item()
    loss_of(twin).backward()
    reference.step()
    assert len(calls) == 1
    assert same(values(model), values(twin))


@make
def test_a_closure_that_raises_moves_nothing(make):
    model = make_model()
    optimizer = make(model)
    train(model, optimizer, 2)
    before, state = values(model), copy.deepcopy(optimizer.state_dict())

    def closure():
        raise KeyError("no batch")

    with pytest.raises(KeyError, match="no batch"):
        optimizer.step(closure)
    assert same(before, values(model))
    assert str(state) == str(optimizer.state_dict())


@make
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_resume_is_bit_exact(make, dtype, tmp_path):
    """Through torch.load(weights_only=True), into a fresh model and optimizer."""
    model = make_model(dtype=dtype)
    optimizer = make(model)
    train(model, optimizer, 3)
    torch.save({"m": model.state_dict(), "o": optimizer.state_dict()}, tmp_path / "c.pt")
    expected = train(model, optimizer, 3, start=3)
    saved = torch.load(tmp_path / "c.pt", weights_only=True)
    again = make_model(seed=9, dtype=dtype)
    resumed = make(again)
    again.load_state_dict(saved["m"])
    resumed.load_state_dict(saved["o"])
    assert train(again, resumed, 3, start=3) == expected
    assert same(values(model), values(again))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_moments_of_pairs_are_float32_and_stay_so(dtype):
    model = make_model(dtype=dtype, bias=False)  # torch's own step of a float16 head overflows
    optimizer = ScaledAdamW(model, lr=1e-2)
    train(model, optimizer, 3)
    copies = make_model(dtype=dtype, bias=False)
    resumed = ScaledAdamW(copies, lr=1e-2)
    resumed.load_state_dict(optimizer.state_dict())
    for o, m in ((optimizer, model), (resumed, copies)):
        for pair in pairs_in(m):
            for p in pair:
                assert o.state[p]["exp_avg"].dtype == torch.float32
                assert o.state[p]["exp_avg_sq"].dtype == torch.float32


@make
def test_pickle_and_deepcopy(make):
    model = make_model()
    optimizer = make(model)
    train(model, optimizer, 3)
    for clone in (copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))):
        model_2, optimizer_2 = clone((model, optimizer))
        assert type(optimizer_2) is type(optimizer)
        assert str(optimizer_2.report) == str(optimizer.report)
        public = [name for name in dir(optimizer) if not name.startswith("_")]
        assert all(hasattr(optimizer_2, name) for name in public)
        model_1, optimizer_1 = copy.deepcopy((model, optimizer))
        assert train(model_2, optimizer_2, 3, start=3) == train(model_1, optimizer_1, 3, start=3)
        assert same(values(model_2), values(model_1))
        # The copy moves its own model, never the old one.
        assert not same(values(model_2), values(model))


class OwnRite(rlora.torch.LoRARite):
    """A subclass as a user writes one, which pickle finds by its name."""


class OwnNAdam(precondition(torch.optim.NAdam)):
    """The same of a class that `precondition` has made."""


@pytest.mark.parametrize("kind", [OwnRite, OwnNAdam])
def test_pickle_and_deepcopy_of_a_subclass(kind):
    model = make_model()
    optimizer = kind(model, lr=1e-2)
    train(model, optimizer, 1)
    for clone in (copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))):
        found = clone(optimizer)
        assert type(found) is kind
        assert found.report == optimizer.report
        saved, expected = (x.state_dict()["state"] for x in (found, optimizer))
        torch.testing.assert_close(saved, expected, rtol=0, atol=0)


@pytest.mark.parametrize("kind", [ScaledAdamW, rlora.torch.LoRARite])
def test_an_optimizer_whose_pairs_have_all_been_taken_out(kind):
    model = make_model()
    optimizer = kind(model, lr=1e-2)
    train(model, optimizer, 1)
    optimizer.watch()
    group = optimizer.param_groups[0]
    group["params"] = [p for name, p in model.named_parameters() if name.startswith("3.")]
    train(model, optimizer, 1)
    assert len(optimizer.report) == 0
    numbers = optimizer.diagnostics()
    assert numbers["rlora/pairs"] == 0
    assert rlora.torch.findings(numbers) == []
    assert rlora.torch.diagnostics_table(numbers).row_count == 2  # the medians
    assert len(copy.deepcopy(optimizer).report) == 0


def test_state_dict_is_the_parents():
    """Keys of the state, step tensors and shapes as torch's AdamW has them."""
    model = make_model()
    ours, plain = ScaledAdamW(model, lr=1e-2), torch.optim.AdamW(model.named_parameters(), lr=1e-2)
    train(model, ours, 1)
    train(model, plain, 1)
    mine, theirs = ours.state_dict(), plain.state_dict()
    assert {k for s in mine["state"].values() for k in s} == {
        k for s in theirs["state"].values() for k in s
    }
    assert set(theirs["param_groups"][0]) <= set(mine["param_groups"][0])
    assert mine["param_groups"][0]["damping"] == 1e-2


def test_load_from_and_to_plain_adamw():
    """Row 15: a plain state goes on preconditioning with what the constructor was given."""
    model = make_model()
    plain = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=3e-3)
    train(model, plain, 3)
    ours = ScaledAdamW(model, lr=1e-2, damping=0.5, damping_mode="absolute")
    ours.load_state_dict(plain.state_dict())
    group = ours.param_groups[0]
    assert (group["damping"], group["damping_mode"], group["lr"]) == (0.5, "absolute", 3e-3)
    twin = copy.deepcopy(model)
    fresh = torch.optim.AdamW([p for p in twin.parameters() if p.requires_grad], lr=3e-3)
    fresh.load_state_dict(plain.state_dict())
    train(model, ours, 1)
    train(twin, fresh, 1)
    assert not same(values(model), values(twin))  # preconditioned
    fresh.load_state_dict(ours.state_dict())
    assert train(twin, fresh, 1)


def test_a_state_of_other_shapes_is_refused_whole():
    """Row 16: the rank was changed between save and load."""
    old = make_model(r=2)
    saved = ScaledAdamW(old, lr=1e-2)
    train(old, saved, 2)
    model = make_model(r=4)
    optimizer = ScaledAdamW(model, lr=1e-2)
    train(model, optimizer, 2)
    before = copy.deepcopy(optimizer.state_dict())
    with pytest.raises(rlora.ShapeError, match="rank"):
        optimizer.load_state_dict(saved.state_dict())
    assert str(before) == str(optimizer.state_dict())
    other = make_model(bias=False)
    with pytest.raises(ValueError, match="group"):
        optimizer.load_state_dict(ScaledAdamW(other, lr=1e-2).state_dict())
    assert str(before) == str(optimizer.state_dict())


def test_hooks_run_once_in_order_around_the_step():
    """Also when a plain AdamW was made first, whose class torch has patched then."""
    torch.optim.AdamW([nn.Parameter(torch.ones(2))])
    model = make_model()
    optimizer = ScaledAdamW(model, lr=1e-2, order="gauss_seidel")
    seen = []
    pre = optimizer.register_step_pre_hook(lambda *_: seen.append("pre"))
    optimizer.register_step_post_hook(lambda *_: seen.append("post"))
    train(model, optimizer, 1)
    assert seen == ["pre", "post"]
    pre.remove()
    train(model, optimizer, 1)
    assert seen == ["pre", "post", "post"]
    optimizer.register_load_state_dict_pre_hook(lambda *_: seen.append("load"))
    optimizer.register_load_state_dict_post_hook(lambda *_: seen.append("loaded"))
    optimizer.load_state_dict(optimizer.state_dict())
    assert seen[3:] == ["load", "loaded"]


@pytest.mark.parametrize("scheduler", [
    lambda o: torch.optim.lr_scheduler.CosineAnnealingLR(o, 10),
    lambda o: torch.optim.lr_scheduler.OneCycleLR(o, 1e-2, total_steps=10),
    lambda o: torch.optim.lr_scheduler.LinearLR(o),
])  # fmt: skip
def test_schedulers_compose(scheduler):
    model = make_model()
    optimizer = ScaledAdamW(model, lr=1e-2)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        schedule = scheduler(optimizer)
        rates = []
        for t in range(5):
            train(model, optimizer, 1, start=t)
            schedule.step()
            rates.append(optimizer.param_groups[0]["lr"])
    assert len(set(rates)) > 1


def test_groups_are_separate_optimizers():
    """LoRA+ style: A and B in groups of their own, with their own lr, decay and damping."""
    model = make_model(dtype=torch.float64, bias=False)
    named = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
    groups = [
        {"params": [x for x in named if "lora_A" in x[0]], "lr": 1e-3, "damping": 1e-2},
        {"params": [x for x in named if "lora_B" in x[0]], "lr": 1e-2, "weight_decay": 0.3},
    ]
    optimizer = ScaledAdamW(groups, lr=1.0, damping=1e-4)
    assert [g["damping"] for g in optimizer.param_groups] == [1e-2, 1e-4]
    assert len(optimizer.report) == 2
    start = [Factors(a.detach().clone(), b.detach().clone()) for a, b in pairs_in(model)]
    loss_of(model).backward()
    grads = [Factors(a.grad, b.grad) for a, b in pairs_in(model)]
    optimizer.step()
    for side, options, lr in ((0, {"damping": 1e-2}, 1e-3), (1, {"damping": 1e-4}, 1e-2)):
        decay = 0.01 if side == 0 else 0.3
        method = rlora.scaled_adamw(weight_decay=decay, **options)
        expected, _ = rlora.step(method, start, grads, method.init(start), lr)
        for pair, factors in zip(pairs_in(model), expected, strict=True):
            torch.testing.assert_close(pair[side].detach(), factors[side], rtol=0, atol=1e-13)


def test_add_param_group_pairs_what_is_new():
    """Row 14: the rest is undisturbed, and the new pair starts at t = 0."""
    model, extra = make_model(), make_model(seed=3, bias=False)
    twin, twin_extra = copy.deepcopy((model, extra))
    optimizer, reference = ScaledAdamW(model, lr=1e-2), ScaledAdamW(twin, lr=1e-2)
    train(model, optimizer, 3)
    train(twin, reference, 3)
    new = [(f"new.{n}", p) for n, p in extra.named_parameters() if p.requires_grad]
    optimizer.add_param_group({"params": new, "damping": 0.1})
    assert len(optimizer.report) == 4
    alone = ScaledAdamW(twin_extra, lr=1e-2, damping=0.1)
    for m, o in ((model, None), (extra, None), (twin, None), (twin_extra, None)):
        m.zero_grad()
        loss_of(m).backward()
        assert o is None
    for o in (optimizer, reference, alone):
        o.step()
    assert same(values(model), values(twin))
    assert same(values(extra), values(twin_extra))
    with pytest.raises(ValueError, match="damping"):
        optimizer.add_param_group({"params": new, "damping": -1.0})
    assert len(optimizer.param_groups) == 2


def test_explicit_pairs_and_groups_added_by_hand():
    A, B = nn.Parameter(torch.randn(2, 5)), nn.Parameter(torch.randn(4, 2))
    optimizer = ScaledAdamW([A, B], lr=0.1, pairs=[(A, B)])
    C, D = nn.Parameter(torch.randn(2, 5)), nn.Parameter(torch.randn(4, 2))
    optimizer.add_param_group({"params": [C, D], "pairs": [(C, D)]})
    for p in (A, B, C, D):
        p.grad = torch.ones_like(p)
    optimizer.step()
    assert [pair.name for pair in optimizer.report] == ["pairs[0]", "pairs[1]"]
    E = nn.Parameter(torch.randn(3))
    with pytest.raises(rlora.PairingError, match="not among"):
        optimizer.add_param_group({"params": [E], "pairs": [(C, torch.randn(4, 2))]})
    assert len(optimizer.param_groups) == 2
    grouped = ScaledAdamW([{"params": [A, B], "pairs": [(A, B)]}, {"params": [E]}], lr=0.1)
    assert str(grouped.report).startswith("1 pair, 1 unpaired parameter")


def test_numbers_of_a_group_are_validated():
    """torch checks those of the constructor only."""
    for bad in ({"lr": -1.0}, {"lr": float("nan")}, {"weight_decay": float("inf")}, {"eps": "1"}):
        with pytest.raises((ValueError, TypeError), match=next(iter(bad))):
            ScaledAdamW([{"params": make_model(), **bad}])
        optimizer = ScaledAdamW(make_model())
        with pytest.raises((ValueError, TypeError), match=next(iter(bad))):
            optimizer.add_param_group({"params": [nn.Parameter(torch.ones(2))], **bad})
        assert len(optimizer.param_groups) == 1


@pytest.mark.parametrize("options", [
    {"amsgrad": True}, {"maximize": True}, {"lr": torch.tensor(1e-2).double()},
    {"capturable": False},
])  # fmt: skip
@pytest.mark.parametrize("placement", ["before", "both"])
def test_flags_of_adamw(options, placement):
    """The parent's own arithmetic on hand-made directions, and ours, agree.

    A learning rate of float32 would be divided in float32 by the parent, and is not by its kernel.
    """
    model = make_model(dtype=torch.float64, bias=False)
    twin = copy.deepcopy(model)
    settings = {"lr": 1e-2, "betas": (0.7, 0.8), "weight_decay": 0.0, **options}
    relative = {"damping": 1e-6, "damping_mode": "relative"}
    ours = ScaledAdamW(model, placement=placement, **settings, **relative)
    # Adam on zeros, fed with preconditioned gradients, gives the moves.
    moves = [torch.zeros_like(p, requires_grad=True) for pair in pairs_in(twin) for p in pair]
    parent = torch.optim.AdamW(moves, **settings)
    for t in range(4):
        for m in (model, twin):
            m.zero_grad()
            loss_of(m, t).backward()
        second = []
        for k, (a, b) in enumerate(pairs_in(twin)):
            c = (b.shape[0] / a.shape[1]) ** 0.25
            eye = torch.eye(4, dtype=torch.float64)
            for side, S in enumerate((b.mT @ b, a @ a.mT)):  # in row form, B transposed
                S = S.detach()
                P = torch.linalg.inv(S + 1e-6 * S.trace() / 4 * eye)
                if placement == "both":  # Pᵀ P is the inverse; triangular, upper for A
                    flips = () if side == 0 else (0, 1)
                    P = torch.linalg.cholesky(P.flip(flips)).mT.flip(flips)
                F = torch.linalg.matrix_power(P @ S @ P.mT, 4)
                second.append((c if side == 0 else 1 / c) * P.mT @ F)
                g = (a.grad, b.grad.mT)[side]
                moves[2 * k + side].data.zero_()
                moves[2 * k + side].grad = P @ g if side == 0 else (P @ g).mT.contiguous()
        ours.step()
        parent.step()
        with torch.no_grad():
            for i, p in enumerate(p for pair in pairs_in(twin) for p in pair):
                move = moves[i].detach()
                if placement == "both":
                    move = second[i] @ move if i % 2 == 0 else (second[i] @ move.mT).mT
                p += move
    for (name, p), q in zip(model.named_parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=0, atol=1e-12, msg=name)


def test_none_and_zero_gradients():
    """Row 11: a factor without gradient stays bit-equal, and the other one is preconditioned."""
    model = make_model(bias=False)
    optimizer = ScaledAdamW(model, lr=1e-2)
    before = values(model)
    optimizer.step()  # no gradient anywhere
    assert same(before, values(model))
    loss_of(model).backward()
    (a, b), _ = pairs_in(model)
    a.grad = None
    expected = rlora.scaled_adamw()
    pair = Factors(a.detach().clone(), b.detach().clone())
    new, _ = rlora.step(expected, pair, Factors(None, b.grad), expected.init(pair), 1e-2)
    optimizer.step()
    assert torch.equal(a, before["0.lora_A.default.weight"])
    torch.testing.assert_close(b.detach(), new.B)
    assert a not in optimizer.state


def test_zero_gradients_move_nothing_without_decay():
    """Row 25: an empty batch."""
    model = make_model()
    optimizer = ScaledAdamW(model, lr=1e-2, weight_decay=0.0)
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    before = values(model)
    optimizer.step()
    assert same(before, values(model))


def test_frozen_factor():
    model = make_model(bias=False)
    for a, _ in pairs_in(model):
        a.requires_grad_(False)
    optimizer = ScaledAdamW(model, lr=1e-2)
    assert len(optimizer.report) == 2
    before = values(model)
    losses = train(model, optimizer, 40)
    for name, p in model.named_parameters():
        assert torch.equal(p, before[name]) == ("lora_B" not in name)
    assert losses[18] < losses[0]  # the same batch


def test_gradient_accumulation_is_one_large_batch():
    model = make_model(dtype=torch.float64)
    twin = copy.deepcopy(model)
    a, b = (ScaledAdamW(m, lr=1e-2) for m in (model, twin))
    x, y = batch(0, torch.float64)
    (model(x) - y).square().mean().backward()
    for k in range(4):
        part = slice(4 * k, 4 * k + 4)
        ((twin(x[part]) - y[part]).square().mean() / 4).backward()
    a.step()
    b.step()
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("make", [CLASSES["adamw"], lambda m: CLASSES["adamw"](m, fused=True)])
def test_grad_scaler_skips_and_unscales(make):
    """Also with fused kernels, which would otherwise take scaled gradients."""
    model = make_model()
    twin = copy.deepcopy(model)
    optimizer, reference = make(model), make(twin)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    for t in range(3):
        optimizer.zero_grad()
        scaler.scale(loss_of(model, t)).backward()
        if t == 1:
            model[0].lora_A["default"].weight.grad[0, 0] = float("inf")
            before, state = values(model), str(optimizer.state_dict())
        scaler.step(optimizer)
        scaler.update()
        if t == 1:
            assert same(before, values(model))
            assert str(optimizer.state_dict()) == state
            continue
        reference.zero_grad()
        loss_of(twin, t).backward()
        reference.step()
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p, q)


def test_precondition_refuses_what_cannot_work():
    with pytest.raises(ValueError, match="LBFGS evaluates the loss again"):
        precondition(torch.optim.LBFGS)
    with pytest.raises(TypeError, match="subclass"):
        precondition(make_model())
    with pytest.raises(ValueError, match="works over AdamW"):
        precondition(torch.optim.NAdam)(make_model(), placement="after")
    assert precondition(torch.optim.Adagrad) is precondition(torch.optim.Adagrad)


@pytest.mark.parametrize(
    "base", ["Adam", "AdamW", "SGD", "RMSprop", "Adagrad", "Adadelta", "Adafactor", "Adamax", "NAdam", "RAdam",
             "ASGD", "Rprop"],
)  # fmt: skip
def test_precondition_any_torch_optimizer(base):
    """With the identity as preconditioner it is the parent itself, state and all."""
    parent = getattr(torch.optim, base)
    model = make_model(dtype=torch.float64)
    twin = copy.deepcopy(model)
    ours = precondition(parent)(model, lr=1e-3)
    train(model, ours, 3)
    assert not same(values(model), values(twin))
    # Orthonormal factors: both Grams are the identity.
    model, twin = make_model(dtype=torch.float64), None
    for a, b in pairs_in(model):
        nn.init.orthogonal_(a)
        b.data.copy_(torch.linalg.qr(torch.randn_like(b.repeat(2, 1)))[0][: b.shape[0]])
    model = nn.Sequential(model[0])  # B is (10, 4): truly orthonormal columns
    a, b = pairs_in(model)[0]
    b.data.copy_(torch.linalg.qr(torch.randn(10, 4, dtype=torch.float64))[0])
    twin = copy.deepcopy(model)
    ours = precondition(parent)(model, lr=1e-3, damping=0.0)
    plain = parent([p for p in twin.parameters() if p.requires_grad], lr=1e-3)
    for m, o in ((model, ours), (twin, plain)):
        m(batch(0, torch.float64)[0]).square().mean().backward()
        o.step()
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-9, atol=1e-9)


LISTWISE = {"ScaledAdamW": ScaledAdamW, "ScaledSGD": partial(ScaledSGD, momentum=0.9)}


@pytest.mark.parametrize("kind", (METHODS | LISTWISE).values(), ids=METHODS | LISTWISE)
def test_factors_on_a_cpu_under_another_default_device(kind):
    """Everything of a step is made where the factors are, small and large, one and many."""
    steps = []
    for default in ("cpu", "meta"):
        g = torch.Generator().manual_seed(0)
        shapes = [(4, 20, 30)] * 3 + [(4, 12_000, 10)]
        pairs = [
            tuple(torch.randn(shape, generator=g, device="cpu") for shape in ((r, n), (m, r)))
            for r, n, m in shapes
        ]
        params = [p.requires_grad_() for pair in pairs for p in pair]
        for p in params:
            p.grad = torch.randn(p.shape, generator=g, device="cpu")
        with torch.device(default):
            optimizer = kind(params, lr=1e-3, pairs=pairs)
            optimizer.step()
            optimizer.step()
        steps.append(params)
    for found, expected in zip(steps[1], steps[0], strict=True):
        assert torch.equal(found, expected)


# --- what a step asks of the device ---------------------------------------------------------------


class Operations(TorchDispatchMode):
    """Counts what is dispatched, but for views, which ask nothing of a device."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if not func.is_view:
            self.names.append(str(func))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("kind", METHODS.values(), ids=METHODS)
def test_operations_do_not_grow_with_the_layers(kind):
    """A step of 12 equal layers is as many operations as one of 3."""
    counts = []
    for layers in (3, 12):
        pairs = [(torch.randn(4, 20), torch.randn(30, 4)) for _ in range(layers)]
        params = [p.requires_grad_() for pair in pairs for p in pair]
        optimizer = kind(params, lr=1e-3, pairs=pairs)
        for p in params:
            p.grad = torch.randn_like(p)
        optimizer.step()
        with Operations() as seen:
            optimizer.step()
        assert not any("item" in name or "_local_scalar" in name for name in seen.names)
        counts.append(len(seen.names))
    assert counts[0] == counts[1]


class Perturbed(torch.optim.SGD):
    """An optimizer with methods of its own that change gradients, as SAM's first step."""

    @torch.no_grad()
    def halve(self):
        for group in self.param_groups:
            for p in group["params"]:
                p.grad.mul_(0.5)

    def drop(self):
        for group in self.param_groups:
            for p in group["params"]:
                p.grad = None


def test_a_parents_method_that_changes_gradients_changes_those_of_bfloat16_factors():
    A, B = (nn.Parameter(torch.randn(shape).bfloat16()) for shape in [(2, 8), (6, 2)])
    optimizer = precondition(Perturbed)([A, B], lr=1e-2, momentum=0.9, pairs=[(A, B)])
    A.grad, B.grad = torch.ones_like(A), torch.ones_like(B)
    optimizer.step()
    held = A.grad
    optimizer.halve()
    assert A.grad is held
    assert (A.grad == 0.5).all()
    assert (B.grad == 0.5).all()
    optimizer.drop()
    assert A.grad is None
    assert B.grad is None


def test_adam_decays_as_adam_and_not_as_adamw():
    """Its decay is part of the gradient, behind the preconditioner."""
    torch.manual_seed(0)
    start = torch.randn(2, 8), torch.randn(6, 2)
    (A, B), plain = ([nn.Parameter(x.clone()) for x in start] for _ in range(2))
    options = {"lr": 0.1, "weight_decay": 0.5, "eps": 0.0}
    damping = {"damping": 1.0, "damping_mode": "absolute"}
    optimizer = precondition(torch.optim.Adam)([A, B], pairs=[(A, B)], **damping, **options)
    parent = torch.optim.Adam(plain, **options)
    for _ in range(3):
        S_A, S_B = A.detach() @ A.detach().T, B.detach().T @ B.detach()
        for p in (A, B):
            p.grad = torch.randn_like(p)
        plain[0].grad = torch.linalg.solve(S_B + torch.eye(2), A.grad)
        plain[1].grad = torch.linalg.solve(S_A + torch.eye(2), B.grad.T).T
        optimizer.step()
        parent.step()
        for p, q in zip((A, B), plain, strict=True):
            torch.testing.assert_close(p, q, rtol=1e-4, atol=1e-5)  # float32


def test_options_of_a_class_statement_reach_the_parents():
    class Tagged(torch.optim.AdamW):
        def __init_subclass__(cls, tag=None, **kwargs):
            super().__init_subclass__(**kwargs)
            cls.tag = tag

    class Ours(rlora.torch.precondition(Tagged), tag="x"):
        pass

    assert Ours.tag == "x"


@pytest.mark.parametrize("kind", [ScaledAdamW, ScaledSGD, rlora.torch.LoRARite])
def test_what_a_graph_calls_of_the_parent_is_bare(kind):
    """torch 2.14 does not let a graph ask its functions whether something is wrapped around them."""
    assert set(kind._bare) == {"step", "_init_group"}
    for name, function in kind._bare.items():
        assert function.__name__ == name
        assert not hasattr(function, "__wrapped__")

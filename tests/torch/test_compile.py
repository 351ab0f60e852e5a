"""Compiled steps: one graph for every class, no other after it, and the eager step's numbers."""

import copy
import subprocess
import sys

import pytest
import torch
from models import CLASSES, LoRALinear, loss_of, same, train, values
from pages import run
from torch import nn
from torch._dynamo.exc import Unsupported
from torch._dynamo.utils import counters

from rlora.torch import LoRARite, ScaledAdamW, ScaledSGD

LR = 1e-2
ALL = CLASSES | {
    "adamw-after": lambda m: ScaledAdamW(m, lr=LR, placement="after"),
    "adamw-amsgrad": lambda m: ScaledAdamW(m, lr=LR, amsgrad=True, maximize=True),
    "adamw-fused": lambda m: ScaledAdamW(m, lr=LR, fused=True),
    "sgd-nesterov": lambda m: ScaledSGD(m, lr=LR, momentum=0.9, nesterov=True, foreach=True),
}
few = pytest.mark.parametrize("name", ["adamw", "LoRARite"])


@pytest.fixture(autouse=True)
def afresh(monkeypatch):
    """No graphs of other tests; float64 by default, or torch's compiled Adam counts in float32.

    Learning rates are then tensors of float64. torch takes the number of such a scalar for a symbol,
    finds at the end of a graph that nothing uses it, and traces all of it again, if not told so.
    """
    monkeypatch.setenv("TENSORIFY_PYTHON_SCALARS", "0")
    torch._dynamo.reset()
    counters.clear()
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.fixture
def one_graph():
    with torch._dynamo.config.patch(error_on_recompile=True):
        yield


def small_model(dtype=torch.float64):
    """Two layers of one shape, whose states are views of one stack, and a head outside."""
    torch.manual_seed(0)
    model = nn.Sequential(*(LoRALinear(6, 6, 2, dtype) for _ in range(2)))
    for name, p in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(p, std=0.3)
    return model.append(nn.Linear(6, 8, dtype=dtype))


def twins(make, dtype=torch.float64, backend="aot_eager"):
    """Two equal models, each with an optimizer after its first step, and the first one's step."""
    models = [small_model(dtype) for _ in range(2)]
    optimizers = [make(model) for model in models]
    for model, optimizer in zip(models, optimizers, strict=True):
        for group in optimizer.param_groups:
            group["lr"] = torch.tensor(group["lr"])
        train(model, optimizer, 1)
    step = torch.compile(optimizers[0].step, fullgraph=True, backend=backend)
    return models, optimizers, step


def both_step(models, steps, t):
    """One step of each on the gradients of batch t."""
    for model, step in zip(models, steps, strict=True):
        model.zero_grad()
        loss_of(model, t).backward()
        step()


def assert_alike(models, optimizers, atol=1e-12):
    # float64: rounding, in another order of the sums, over the steps
    for p, q in zip(*(model.parameters() for model in models), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-9, atol=atol)
    states = (optimizer.state_dict()["state"] for optimizer in optimizers)
    torch.testing.assert_close(*states, rtol=1e-9, atol=atol)


def graphs():
    assert not counters["graph_break"]
    return counters["stats"]["unique_graphs"]


@pytest.mark.parametrize("make", ALL.values(), ids=ALL)
@pytest.mark.works("torch.compile", "the step of every class in one graph, with a schedule")
def test_one_graph_and_the_numbers_of_the_eager_step(make, one_graph):
    models, optimizers, step = twins(make)
    schedulers = [torch.optim.lr_scheduler.ExponentialLR(o, 0.95) for o in optimizers]
    both_step(models, [o.step for o in optimizers], 1)  # the schedulers want to see one
    before = values(models[0])
    held = [{k: id(x) for k, x in s.items()} for s in optimizers[0].state.values()]
    for t in range(20):
        both_step(models, [step, optimizers[1].step], t % 3)
        for scheduler in schedulers:
            scheduler.step()
    assert graphs() == 1
    # Adam's kernels form the bias corrections in float64, a graph in the float32 of the counter.
    fused = optimizers[0].param_groups[0].get("fused")
    assert_alike(models, optimizers, atol=1e-6 if fused else 1e-12)
    assert any(
        not torch.equal(p, before[n]) for n, p in models[0].named_parameters() if "lora" in n
    )
    assert [{k: id(x) for k, x in s.items()} for s in optimizers[0].state.values()] == held


@few
def test_a_number_as_learning_rate_costs_one_graph_more(name):
    """Once it has changed, torch takes it for a symbol, which has no attributes to be asked for."""
    models = [small_model() for _ in range(2)]
    optimizers = [CLASSES[name](model) for model in models]
    both_step(models, [o.step for o in optimizers], 0)
    step = torch.compile(optimizers[0].step, fullgraph=True, backend="aot_eager")
    for t in range(4):
        both_step(models, [step, optimizers[1].step], t % 3)
        for optimizer in optimizers:
            optimizer.param_groups[0]["lr"] *= 0.9
    assert graphs() == 2
    assert_alike(models, optimizers)


@pytest.mark.parametrize("name", ["adamw", "LoFT", "LoRAFA", "LoRARite"])
def test_betas_on_a_schedule_cost_one_graph_more(name):
    """OneCycleLR cycles the first of them; each by way of `corrected_decays` or of corrections."""
    models, optimizers, _ = twins(CLASSES[name])
    step = torch.compile(optimizers[0].step, fullgraph=True, backend="eager")
    cycle = torch.optim.lr_scheduler.OneCycleLR
    schedulers = [cycle(optimizer, max_lr=LR, total_steps=20) for optimizer in optimizers]
    both_step(models, [o.step for o in optimizers], 1)  # the schedulers want to see one
    for t in range(4):
        for scheduler in schedulers:
            scheduler.step()
        both_step(models, [step, optimizers[1].step], t % 3)
    assert graphs() == 2
    assert_alike(models, optimizers)


@few
def test_eager_and_compiled_steps_alternate(name, one_graph):
    models, optimizers, step = twins(CLASSES[name])
    for t in range(6):
        both_step(models, [step if t % 2 else optimizers[0].step, optimizers[1].step], t % 3)
    assert graphs() == 1
    assert_alike(models, optimizers)


@few
def test_what_a_graph_rests_on_may_change(name):
    """Gradients that come and go, an option, and the memory of a parameter."""
    models, optimizers, step = twins(CLASSES[name], backend="eager")
    steps = [step, optimizers[1].step]
    both_step(models, steps, 0)
    for model in models:
        model[0].lora_A["default"].weight.requires_grad_(False)
    still = models[0][0].lora_A["default"].weight.detach().clone()
    both_step(models, steps, 1)
    assert torch.equal(models[0][0].lora_A["default"].weight, still)
    assert_alike(models, optimizers)
    for model in models:
        model[0].lora_A["default"].weight.requires_grad_(True)
    both_step(models, steps, 2)
    for optimizer in optimizers:
        optimizer.param_groups[0]["weight_decay"] = 0.3
    both_step(models, steps, 0)
    made = graphs()
    assert made == 3  # with a gradient for A, without, and with the other decay
    for p in (p for model in models for p in model.parameters()):
        p.data = p.data.clone()
    both_step(models, steps, 1)
    assert graphs() == made
    assert_alike(models, optimizers)


@few
def test_a_compiled_run_goes_on_from_a_checkpoint(name):
    models, optimizers, step = twins(CLASSES[name])
    both_step(models, [step, optimizers[1].step], 1)
    models[1].load_state_dict(models[0].state_dict())
    optimizers[1].load_state_dict(copy.deepcopy(optimizers[0].state_dict()))
    both_step(models, [step, optimizers[1].step], 2)
    assert_alike(models, optimizers)
    optimizers[0].load_state_dict(copy.deepcopy(optimizers[1].state_dict()))
    both_step(models, [step, optimizers[1].step], 0)
    assert_alike(models, optimizers)


@few
def test_the_first_step_compiled_costs_one_graph_more(name):
    models = [small_model() for _ in range(2)]
    optimizers = [CLASSES[name](model) for model in models]
    step = torch.compile(optimizers[0].step, fullgraph=True, backend="aot_eager")
    for t in range(4):
        both_step(models, [step, optimizers[1].step], t % 3)
    assert graphs() == 2
    assert_alike(models, optimizers)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@few
def test_narrow_factors(name, dtype, one_graph):
    """Wide results are written back, moments stay float32."""
    models, optimizers, step = twins(CLASSES[name], dtype)
    for t in range(1, 6):
        both_step(models, [step, optimizers[1].step], t % 3)
    assert graphs() == 1
    # Single roundings of float32; in bfloat16 one of the last bit, 2**-8, where they straddle it.
    rounding = 1e-5 if dtype == torch.float32 else 2**-7
    for p, q in zip(*(model.parameters() for model in models), strict=True):
        torch.testing.assert_close(p, q, rtol=rounding, atol=rounding)
    A = models[0][0].lora_A["default"].weight
    wide = {x.dtype for x in optimizers[0].state[A].values() if x.ndim}
    assert wide == {torch.float32}


@few
def test_a_graph_changes_no_option(name):
    """Its first step, of a fresh optimizer, of a new group, and after a file without a count."""
    model = small_model(torch.bfloat16)
    A, B = (nn.Parameter(torch.randn(s).bfloat16()) for s in ((2, 5), (6, 2)))
    optimizer = CLASSES[name](model)
    step = torch.compile(optimizer.step, fullgraph=True, backend="eager")
    before = dict(optimizer.param_groups[0])
    loss_of(model, 0).backward()
    step()
    optimizer.add_param_group({"params": [A, B], "pairs": [(A, B)]})
    A.grad, B.grad = torch.ones_like(A), torch.ones_like(B)
    step()
    saved = optimizer.state_dict()
    for group in saved["param_groups"]:
        assert int(group.pop("rounded")) > 0
    optimizer.load_state_dict(saved)
    step()
    first, second = optimizer.param_groups
    assert {k: v for k, v in first.items() if k not in ("params", "rounded")} == {
        k: v for k, v in before.items() if k not in ("params", "rounded")
    }
    assert int(first["rounded"]) == int(second["rounded"]) == 1
    assert second.get("capturable") == before.get("capturable")
    optimizer.step()


def test_a_compiled_step_cannot_begin_to_round_at_random():
    model = small_model()
    optimizer = CLASSES["adamw"](model)
    model.bfloat16()
    loss_of(model, 0).backward()
    step = torch.compile(optimizer.step, fullgraph=True, backend="eager")
    with pytest.raises(Unsupported, match="make one eager step before a compiled one"):
        step()
    optimizer.step()
    step()
    assert int(optimizer.param_groups[0]["rounded"]) == 2


def test_convolutions(one_graph):
    torch.manual_seed(0)
    A, B = torch.randn(4, 3, 3, 3, requires_grad=True), torch.randn(8, 4, 1, 1, requires_grad=True)
    kernels = [[p.detach().clone().requires_grad_() for p in (A, B)] for _ in range(2)]
    optimizers = [LoRARite(pair, lr=LR, pairs=[tuple(pair)]) for pair in kernels]
    step = torch.compile(optimizers[0].step, fullgraph=True, backend="aot_eager")
    for t in range(4):
        for pair in kernels:
            for p in pair:
                p.grad = torch.randn(p.shape, generator=torch.Generator().manual_seed(t))
        (step if t else optimizers[0].step)()
        optimizers[1].step()
    for p, q in zip(*kernels, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-9, atol=1e-12)


@pytest.mark.refuses("torch.compile", "lowered precision of products")
def test_lowered_precision_is_refused():
    models, _, step = twins(CLASSES["adamw"])
    loss_of(models[0], 1).backward()
    before = values(models[0])
    torch.set_float32_matmul_precision("high")
    try:
        with pytest.raises(Unsupported, match="set_float32_matmul_precision"):
            step()
    finally:
        torch.set_float32_matmul_precision("highest")
    assert same(values(models[0]), before)
    step()
    assert not same(values(models[0]), before)


@pytest.mark.filterwarnings("ignore:.*torch._prims_common.check:FutureWarning")  # in inductor
@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")  # in inductor
def test_the_how_to_runs(one_graph, monkeypatch):
    """With inductor, a scheduler and torch's own settings; the loss of an eager loop."""
    monkeypatch.delenv("TENSORIFY_PYTHON_SCALARS")
    losses = []
    for compiler in (torch.compile, lambda step, **_: step):
        model = small_model()
        space = {"model": model, "batches": [0, 1, 2] * 2, "loss_of": loss_of}
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(torch, "compile", compiler)
            run("own_loop.md", "Compile the step", space)
        losses.append(loss_of(model, 0))
    assert graphs() == 1
    # The page's learning rate is a float64 tensor here: only the order of sums differs.
    torch.testing.assert_close(*losses, rtol=1e-9, atol=0)


@few
def test_the_first_step_of_a_process_may_be_compiled(name):
    """Nothing that a graph rests on is left to a step before it."""
    code = f"""
import torch
import rlora.torch
pair = [torch.nn.Parameter(torch.randn(shape)) for shape in ((2, 8), (6, 2))]
optimizer = rlora.torch.{"ScaledAdamW" if name == "adamw" else name}(pair, pairs=[tuple(pair)])
before = [p.detach().clone() for p in pair]
for p in pair:
    p.grad = torch.randn_like(p)
torch.compile(optimizer.step, fullgraph=True, backend="eager")()
assert not any(map(torch.equal, pair, before))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert not done.returncode, done.stderr[-2000:]


def test_single_precision_is_compiled_once(one_graph):
    torch.set_default_dtype(torch.float32)
    models, optimizers, step = twins(lambda m: ScaledSGD(m, lr=LR), torch.float32)
    for t in range(3):
        both_step(models, [step, optimizers[1].step], t)
    assert graphs() == 1

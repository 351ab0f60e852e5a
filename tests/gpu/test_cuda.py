"""On a CUDA device: the contract, the numbers of a CPU, host waits and graphs. `make gpu` runs it."""

import copy

import pytest
import torch
from models import (
    CLASSES,
    WITHOUT_WAIT,
    batch,
    loss_of,
    make_model,
    pairs_in,
    same,
    train,
    values,
)
from pages import sections

import rlora
import rlora.torch
from rlora import Factors, flatten_state, methods
from rlora.backends import get
from rlora.integrations.deepspeed import ZeroOptimizer
from rlora.testing import CONTRACT, assert_close
from rlora.torch import ScaledAdamW

if not torch.cuda.is_available():
    pytest.skip("there is no CUDA device here", allow_module_level=True)

BY_PRODUCTS = ("BalancedLoRA", "FactorMuon", "LoRARite", "LoRAMuon", "RefLoRA")

CAPTURED = (
    *("adapre_lora", "alt_lora", "alt_lora_plus", "factor_muon", "graft_adamw", "loft", "lora_fa"),
    *("lora_muon", "lora_plus", "lora_rite", "ref_lora", "scaled_adamw", "scaled_sgd"),
    "stable_lora",
    "trust_region",
)
"""Methods whose step asks a device for nothing."""

NEVER_CAPTURED = {"BalancedLoRA", "LoRAProAdamW", "LoRAProSGD", "OPLoRA", "Riemannion", "nadam"}
"""Classes that wait for a factorisation, and one whose counters are torch's own, on the host."""


@pytest.fixture
def cuda(monkeypatch):
    """The torch backend, whose new arrays lie on the device."""
    backend = get("torch")
    make = type(backend).asarray
    monkeypatch.setattr(
        type(backend),
        "asarray",
        lambda self, x, dtype="float32", device=None: make(self, x, dtype, device or "cuda:0"),
    )
    return backend


@pytest.mark.parametrize("check", CONTRACT, ids=lambda c: c.__name__.removeprefix("check_"))
@pytest.mark.parametrize("name", methods.__all__)
def test_contract(name, check, cuda):
    check(getattr(methods, name), cuda)


@pytest.mark.parametrize("check", CONTRACT, ids=lambda c: c.__name__.removeprefix("check_"))
@pytest.mark.parametrize("name", methods.__all__)
def test_contract_on_cupy(name, check):
    pytest.importorskip("cupy")
    if name == "riemannion" and check.__name__ == "check_batched_equals_looped":
        pytest.skip("a batched SVD of cuSOLVER has other signs than a single one; B A is the same")
    check(getattr(methods, name), get("cupy"))


def on_device(model):
    return model.to("cuda")


def step_on(model, optimizer, t=0):
    like = next(model.parameters())
    x, y = (z.to(like.device) for z in batch(t, like.dtype))
    optimizer.zero_grad()
    (model(x) - y).square().mean().backward()
    optimizer.step()


@pytest.mark.parametrize("name", sorted(CLASSES))
def test_equals_a_cpu(name):
    """Ten steps in float64, the products B A: the split is free under a Riemannian step.

    Roots are taken by products on a device, LoRA-RITE's and Muon's under a shift of sqrt(eps).
    """
    host, device = make_model(dtype=torch.float64), on_device(make_model(dtype=torch.float64))
    optimizers = [CLASSES[name](model) for model in (host, device)]
    for t in range(10):
        step_on(host, optimizers[0], t)
        step_on(device, optimizers[1], t)
    for pairs in zip(pairs_in(host), pairs_in(device), strict=True):
        expected, found = ((B @ A).detach().cpu().numpy() for A, B in pairs)
        assert_close(found, expected, rtol=1e-4 if name in BY_PRODUCTS else 1e-8)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("name", WITHOUT_WAIT)
def test_a_step_waits_for_nothing(name, dtype):
    model = on_device(make_model(dtype=dtype))
    optimizer = CLASSES[name](model)
    for t in range(3):
        step_on(model, optimizer, t)
    torch.cuda.set_sync_debug_mode("error")
    try:
        optimizer.step()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("placement", ["before", "both"])
def test_a_captured_step_is_the_eager_one(placement):
    """Replays of one CUDA graph against eager steps, bit for bit."""
    models = [on_device(make_model()) for _ in range(2)]
    made = [ScaledAdamW(model, lr=1e-2, capturable=True, placement=placement) for model in models]
    x, y = (z.to("cuda") for z in batch(0))

    def backward(model):
        (model(x) - y).square().mean().backward()

    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for model, optimizer in zip(models, made, strict=True):
            for _ in range(3):
                optimizer.zero_grad()
                backward(model)
                optimizer.step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        made[1].step()  # on the gradients that are there
    for _ in range(4):
        made[0].step()
        graph.replay()
    torch.cuda.synchronize()
    for key, p in values(models[0]).items():
        assert_close(values(models[1])[key].cpu().numpy(), p.cpu().numpy(), rtol=1e-5, what=key)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("name", sorted(CLASSES.keys() - NEVER_CAPTURED))
def test_a_captured_step_of_every_class(name, dtype):
    """Replays on gradients that change where they are: the same kernels, so the same bits."""
    models = [on_device(make_model(dtype=dtype, bias=False)) for _ in range(2)]
    captured, eager = (CLASSES[name](model) for model in models)
    for group in captured.param_groups:
        if "capturable" in group:
            group["capturable"] = True
    graph, params = torch.cuda.CUDAGraph(), [[*model.parameters()] for model in models]
    for t in range(7):
        for p, q in zip(*params, strict=True):
            if q.requires_grad:
                q.grad = torch.sin(torch.arange(q.numel(), device="cuda") + t).view_as(q).to(dtype)
                if p.grad is None:
                    p.grad = q.grad.clone()
                p.grad.copy_(q.grad)
        if t == 3:
            with torch.cuda.graph(graph):
                captured.step()
        graph.replay() if t >= 3 else captured.step()
        eager.step()
    assert same(values(models[0]), values(models[1]))


@pytest.mark.parametrize("capturable", [False, True])
@pytest.mark.parametrize("name", [*WITHOUT_WAIT, "adamw-before", "LoRAPlus"])
def test_a_compiled_step_is_the_eager_one(name, capturable):
    """In one graph; sums in another order, and Adam's bias correction on the device."""
    torch.compiler.reset()
    models = [on_device(make_model(bias=False)) for _ in range(2)]
    compiled, eager = (CLASSES[name](model) for model in models)
    if capturable and "capturable" not in compiled.defaults:
        pytest.skip("this class has no such option")
    for group in compiled.param_groups:
        group["lr"] = torch.tensor(group["lr"], device="cuda")
        group.update({"capturable": True} if capturable else {})
    step = torch.compile(compiled.step, fullgraph=True, backend="aot_eager")
    for t in range(4):
        for model, move in zip(models, (step if t else compiled.step, eager.step), strict=True):
            x, y = (z.to("cuda") for z in batch(t))
            model.zero_grad()
            (model(x) - y).square().mean().backward()
            move()
    for key, p in values(models[1]).items():
        assert_close(values(models[0])[key].cpu().numpy(), p.cpu().numpy(), rtol=1e-4, what=key)


@pytest.mark.parametrize("kind", ["ScaledAdamW", "LoRARite"])
def test_the_how_to_of_graphs(kind):
    """Beside eager steps with a schedule of numbers, which have more digits than a tensor's."""
    models = [on_device(make_model(bias=False)) for _ in range(2)]

    def loss(model, t):
        x, y = (z.to("cuda") for z in batch(t))
        return (model(x) - y).square().mean()

    title, page = "Replay the step from a CUDA graph", "own_loop.md"
    code = sections(page)[title].replace("ScaledAdamW", kind)
    code = code if kind == "ScaledAdamW" else code.replace(", capturable=True", "")
    exec(code, {"model": models[0], "batches": range(8), "loss_of": loss})
    eager = getattr(rlora.torch, kind)(models[1], lr=4e-3)
    for t in range(8):
        eager.param_groups[0]["lr"] = 4e-3 * 0.95**t
        eager.zero_grad()
        loss(models[1], t).backward()
        eager.step()
    for key, p in values(models[1]).items():
        assert_close(values(models[0])[key].cpu().numpy(), p.cpu().numpy(), rtol=1e-4, what=key)


@pytest.mark.parametrize("rank", [4, 40])
@pytest.mark.parametrize("name", CAPTURED)
def test_a_captured_function_is_the_eager_one(name, rank):
    """A step of the pure function in a graph, whose arrays it writes over; ranks above 32 too.

    Libraries may factor larger matrices in ways that no graph can hold.
    """
    method, gradients = getattr(methods, name)(), []
    generator = torch.Generator().manual_seed(0)

    def draw(*shape):
        return torch.randn(shape, generator=generator).to("cuda")

    pairs = [Factors(draw(rank, 96), draw(64, rank)) for _ in range(3)]
    gradients = [Factors(draw(rank, 96), draw(64, rank)) for _ in range(3)]

    def steps(count, capture_at):
        params = [Factors(*(x.clone() for x in pair)) for pair in pairs]
        state = method.init(params)
        kept = [*(x for pair in params for x in pair), *flatten_state(state).values()]

        def step():
            new, after = rlora.step(method, params, gradients, state, 1e-3)
            torch._foreach_copy_(
                kept, [*(x for pair in new for x in pair), *flatten_state(after).values()]
            )

        graph, stream = torch.cuda.CUDAGraph(), torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for done in range(count):
                if done == capture_at:
                    with torch.cuda.graph(graph, stream=stream):
                        step()
                graph.replay() if done >= capture_at else step()
        torch.cuda.synchronize()
        return [pair.B @ pair.A for pair in params]

    for found, expected in zip(steps(8, 3), steps(8, 8), strict=True):
        assert_close(found.cpu().numpy(), expected.cpu().numpy(), rtol=1e-5)


def test_saved_on_a_device_and_loaded_again():
    model = on_device(make_model(dtype=torch.bfloat16))
    optimizer = ScaledAdamW(model, lr=1e-2)
    for t in range(3):
        step_on(model, optimizer, t)
    again = on_device(make_model(seed=1, dtype=torch.bfloat16))
    again.load_state_dict(model.state_dict())
    resumed = ScaledAdamW(again, lr=1e-2)
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for t in range(3):
        step_on(model, optimizer, t)
        step_on(again, resumed, t)
    assert same(values(model), values(again))


def test_from_a_cpu_to_a_device():
    """A state saved on a CPU goes on on a device."""
    model = make_model()
    optimizer = ScaledAdamW(model, lr=1e-2)
    train(model, optimizer, 3)
    moved = on_device(make_model())
    moved.load_state_dict(model.state_dict())
    resumed = ScaledAdamW(moved, lr=1e-2)
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    step_on(moved, resumed, 0)
    optimizer.zero_grad()
    loss_of(model, 0).backward()
    optimizer.step()
    for key, p in values(moved).items():
        assert_close(p.cpu().numpy(), values(model)[key].numpy(), rtol=1e-4, what=key)


def test_zero_optimizer_follows_its_model_to_a_device():
    """DeepSpeed brings the model there when the optimizer has been built; a resume comes after."""
    plain = ScaledAdamW(twin := make_model(), lr=1e-2)
    train(twin, plain, 2)
    saved = copy.deepcopy(plain.state_dict())
    twin = on_device(twin)
    plain = ScaledAdamW(twin, lr=1e-2)
    plain.load_state_dict(copy.deepcopy(saved))
    optimizer = ZeroOptimizer(ScaledAdamW(model := make_model(), lr=1e-2))
    model.load_state_dict(twin.state_dict())
    model = on_device(model)
    optimizer.load_state_dict(saved)
    for t in range(3):
        step_on(model, optimizer, t)
        step_on(twin, plain, t)
    assert same(values(model), values(twin))

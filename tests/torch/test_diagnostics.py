"""Figures of `diagnostics` against full matrices in float64 NumPy, at no cost for a step."""

import copy
import io
import math
import pickle
import subprocess
import sys
from contextlib import nullcontext

import numpy as np
import pytest
import torch
from models import CLASSES, LoRALinear, loss_of, make_model, pairs_in, same, train, values
from rich.console import Console
from torch.utils._python_dispatch import TorchDispatchMode

import rlora.torch
from rlora.core.layout import read_pairs
from rlora.pairing import Layout
from rlora.torch import ScaledAdamW, ScaledSGD, diagnostics_table, findings
from rlora.torch.monitor.diagnostics import MARKS, MEASURES
from rlora.torch.monitor.snapshot import Watch, read
from rlora.torch.optimizers.lora_optimizer import LoRAOptimizer
from rlora.torch.pairing.discovery import check_explicit

WIDE = [key for key in MEASURES if not key.startswith("lost")]
"""Figures of float32 factors, which lose no step in rounding."""

make = pytest.mark.parametrize("make", CLASSES.values(), ids=CLASSES)
NAMES = ("0 (default)", "2 (default)")


def watched_step(model, optimizer, steps=3):
    """A few steps, of which the last is looked at: figures, and the factors around that step."""
    train(model, optimizer, steps - 1)
    optimizer.watch(model)
    before = [[p.detach().double().numpy().copy() for p in pair] for pair in pairs_in(model)]
    train(model, optimizer, 1, start=steps - 1)
    after = [[p.detach().double().numpy().copy() for p in pair] for pair in pairs_in(model)]
    return optimizer.diagnostics(), before, after


def metrics(A, B, group):
    """Figures of ``A Aᵀ`` and ``Bᵀ B`` under the options of a group, with full matrices."""
    r, damping = len(A), group.get("damping", 0.0)
    floor = 10 * r * np.finfo(group.get("compute_dtype") or "float32").eps
    if group.get("placement", "before") != "before":
        floor = max(floor, 1e-6)
    eye, mode = np.eye(r), group.get("damping_mode", "relative")
    H = {"A": A @ A.T, "B": B.T @ B}
    if mode == "covariant":
        floored = H["A"] + floor * np.trace(H["A"]) / r * eye
        H["B"] = H["B"] + damping * np.linalg.inv(floored)
    for letter, S in H.items():
        mean = np.trace(S) / r
        added = {"relative": damping * mean, "absolute": damping, "covariant": 0.0}[mode]
        H[letter] = S + max(added, floor * mean) * eye
    return H


def expected_of(before, after, model, group):
    for name, (A0, B0), (A, B), layer in zip(
        NAMES, before, after, [x for x in model if isinstance(x, LoRALinear)], strict=True
    ):
        H = metrics(A0, B0, group)
        row = {}
        for letter, F in (("A", A0), ("B", B0)):
            sigma = np.linalg.svd(F, compute_uv=False)
            P = np.linalg.inv(H[letter])
            scalar = np.trace(P) / len(P) * np.eye(len(P))
            row[f"cond_{letter}"] = (sigma[0] / sigma[-1]) ** 2
            row[f"damped_cond_{letter}"] = np.linalg.cond(H[letter])
            row[f"anisotropy_{letter}"] = np.linalg.norm(P - scalar) / np.linalg.norm(P)
            low = np.linalg.eigvalsh(H[letter])[0]
            row[f"damped_{letter}"] = float(low > 2 * sigma[-1] ** 2)
        change = np.linalg.norm(B @ A - B0 @ A0)
        row["step"] = change / np.linalg.norm(B0 @ A0)
        # No layer of the test's own says its scaling: 1.
        row["step_in_weight"] = change / np.linalg.norm(layer.base.weight.double().numpy())
        row["step_A"] = np.linalg.norm(A - A0) / np.linalg.norm(A0)
        row["step_B"] = np.linalg.norm(B - B0) / np.linalg.norm(B0)
        yield name, row


def compare(numbers, expected):
    for name, row in expected:
        for key, value in row.items():
            # Condition numbers to 1e3 and changes of a part in 1e2 leave ten digits of float64;
            # norms of base weights are taken in float32.
            rel = 1e-6 if key == "step_in_weight" else 1e-9
            assert numbers[f"rlora/{name}/{key}"] == pytest.approx(value, rel=rel, abs=1e-12), key


@make
def test_every_figure_equals_brute_force(make):
    model = make_model()
    optimizer = make(model)
    numbers, before, after = watched_step(model, optimizer)
    compare(numbers, expected_of(before, after, model, optimizer.param_groups[0]))
    rows = {key.rpartition("/")[2] for key in numbers if key.startswith(f"rlora/{NAMES[0]}/")}
    assert rows == {*WIDE, *MARKS}
    assert all(isinstance(x, float) for x in numbers.values())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("options", [
    {"damping": 0.3, "damping_mode": "relative"},
    {"damping": 0.3, "damping_mode": "absolute"},
    {"damping": 0.3, "damping_mode": "covariant"},
    {"damping": 0.0, "compute_dtype": "float64"},
    {"damping": 0.0, "placement": "both"},
], ids=str)  # fmt: skip
def test_damping_of_every_kind(options, dtype):
    model = make_model(dtype=dtype)
    optimizer = ScaledAdamW(model, lr=1e-2, **options)
    numbers, before, after = watched_step(model, optimizer)
    group = dict(optimizer.param_groups[0])
    if dtype == torch.float64:
        group["compute_dtype"] = "float64"
    compare(numbers, expected_of(before, after, model, group))


def test_the_damping_is_that_of_the_factor_that_moves():
    """A and B in groups of their own: ``A Aᵀ`` is damped as B's group says."""
    model = make_model(bias=False)
    named = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
    groups = [
        {"params": [x for x in named if letter in x[0]], "damping": damping}
        for letter, damping in (("lora_A", 0.5), ("lora_B", 2.0))
    ]
    numbers = ScaledAdamW(groups, damping_mode="relative").diagnostics()
    for name, (a, b) in zip(NAMES, pairs_in(model), strict=True):
        A, B = a.detach().double().numpy(), b.detach().double().numpy()
        by_A, by_B = metrics(A, B, {"damping": 0.5}), metrics(A, B, {"damping": 2.0})
        for letter, H in (("A", by_B["A"]), ("B", by_A["B"])):
            found = numbers[f"rlora/{name}/damped_cond_{letter}"]
            assert found == pytest.approx(np.linalg.cond(H), rel=1e-9)


def test_the_summary_is_that_of_the_pairs():
    model = make_model()
    numbers, *_ = watched_step(model, ScaledAdamW(model, lr=1e-2))
    for key in WIDE:
        both = [numbers[f"rlora/{name}/{key}"] for name in NAMES]
        known = (min(both), sum(both) / 2, max(both))
        stats = tuple(numbers[f"rlora/{key}/{stat}"] for stat in ("min", "median", "max"))
        assert stats == known
    for key in MARKS:
        assert numbers[f"rlora/{key}/count"] == sum(numbers[f"rlora/{n}/{key}"] for n in NAMES)
    assert numbers["rlora/pairs"] == 2


def test_what_is_watched_follows_a_model_that_is_moved():
    """Its parameters are the same ones, in another dtype: what they were is kept in that."""
    model = make_model(dtype=torch.float32)
    optimizer = ScaledAdamW(model)
    watch, pairs = Watch(), optimizer._current_pairs()
    for dtype in (torch.float32, torch.float64):
        model.to(dtype)
        watch.note(pairs, optimizer.report)
        for old, new in zip(watch.before, pairs, strict=True):
            assert old.A.dtype == dtype
            assert torch.equal(old.A, new.A)


def test_without_a_watched_step_it_tells_of_the_factors_as_they_are():
    model = make_model()
    optimizer = ScaledAdamW(model, lr=1e-2)
    train(model, optimizer, 2)
    numbers = optimizer.diagnostics()
    state = [[p.detach().double().numpy() for p in pair] for pair in pairs_in(model)]
    for name, row in expected_of(state, state, model, optimizer.param_groups[0]):
        for key in ("cond_A", "cond_B", "damped_cond_B", "anisotropy_A"):
            assert numbers[f"rlora/{name}/{key}"] == pytest.approx(row[key], rel=1e-9)
    assert not [key for key in numbers if "step" in key]
    summary = optimizer.diagnostics(per_pair=False)
    assert summary == {key: x for key, x in numbers.items() if key in summary}
    assert not [key for key in summary if "default" in key]


class Counting(TorchDispatchMode):
    """Names of the operations that reach torch, and of those that bring numbers to the host."""

    def __init__(self):
        super().__init__()
        self.operations, self.reads = [], []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        self.operations.append(name)
        leaves = torch.utils._pytree.tree_leaves((args, kwargs, result))
        devices = {x.device.type for x in leaves if isinstance(x, torch.Tensor)}
        waits = name in ("_local_scalar_dense", "_linalg_eigh", "_linalg_svd", "nonzero")
        if len(devices) > 1 or waits:
            self.reads.append(name)
        return result


IDLE = ("view", "detach", "reshape", "alias", "_reshape_alias", "transpose", "slice", "unbind")


def operations(call):
    """Operations of a call; views and the profiler's marks are left out."""
    with Counting() as counting:
        call()
    return [op for op in counting.operations if op not in IDLE and "_record_function" not in op]


@make
def test_off_costs_not_one_operation_and_keeps_nothing(make):
    """A step does what its plans do, before anybody has watched and after; watching adds a copy."""
    model = make_model()
    optimizer = make(model)
    train(model, optimizer, 3)

    def plans_alone():
        with torch.no_grad():
            for plan in optimizer._current_plans():
                plan.run(optimizer)

    alone, never = operations(plans_alone), operations(optimizer.step)
    assert never == alone
    assert not optimizer._watching
    kept = set(vars(optimizer))
    optimizer.watch()
    optimizer.step()
    assert operations(optimizer.step) == ["_foreach_copy_", *alone]
    optimizer.unwatch()
    assert operations(optimizer.step) == alone
    assert set(vars(optimizer)) - kept <= {"_watching"}


@make
def test_looking_changes_no_bit(make):
    model = make_model()
    twin = copy.deepcopy(model)
    optimizer, other = make(model), make(twin)
    for t in range(4):
        optimizer.watch(model if t % 2 else None)
        train(model, optimizer, 1, start=t)
        optimizer.diagnostics()
        train(twin, other, 1, start=t)
    assert same(values(model), values(twin))
    assert str(optimizer.state_dict()) == str(other.state_dict())


@pytest.mark.filterwarnings("ignore:Dynamo", "ignore:`torch.jit.script_method`")
def test_a_compiled_step_is_as_it_was_when_nobody_watches():
    """As many graphs and calls in them as before anybody did."""
    from torch._dynamo.utils import counters

    seen = []
    for watched in (False, True):
        torch._dynamo.reset()
        model = make_model(bias=False)
        optimizer = ScaledSGD(model, lr=1e-2)
        if watched:
            optimizer.watch()
        train(model, optimizer, 1)
        optimizer.unwatch()
        counters.clear()
        step = torch.compile(lambda o=optimizer: o.step(), backend="eager")
        for t in range(2):
            optimizer.zero_grad()
            loss_of(model, t).backward()
            step()
        seen.append(dict(counters["stats"]))
    assert seen[0]["calls_captured"] > 0
    assert seen[0] == seen[1]


def test_the_host_reads_once():
    """On fake CUDA tensors of two ranks: one copy to the host, and no decomposition there."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    from rlora.cli.bench import device_ops

    with FakeTensorMode(), device_ops.without_guards():
        watch = Watch()
        pairs = [
            tuple(torch.empty(shape, device="cuda") for shape in ((r, 12), (9, r)))
            for r in (3, 5, 3)
        ]
        pairs, report = check_explicit(pairs, [p for pair in pairs for p in pair])
        watch.note(pairs, report)
        with Counting() as counting:
            list(read(watch))
    assert counting.reads == ["_to_copy"]
    assert len(counting.operations) > 20


def test_the_host_reads_once_for_a_real_optimizer(monkeypatch):
    """Whatever asks for numbers of a factor does it in `read`, which is called once."""
    from rlora.torch.monitor import diagnostics

    calls = []
    monkeypatch.setattr(diagnostics, "read", lambda *args: calls.append(1) or read(*args))
    model = make_model()
    optimizer = ScaledAdamW(model, lr=1e-2)
    optimizer.watch(model)
    train(model, optimizer, 1)
    with Counting() as counting:
        optimizer.diagnostics()
    assert len(calls) == 1
    assert "_local_scalar_dense" not in counting.operations


@make
def test_from_zero_and_with_nan(make):
    """B = 0 holds A still; a NaN is told of its own pair."""
    model = make_model(zero_B=True)
    optimizer = make(model)
    optimizer.watch()
    never_moves = isinstance(optimizer, rlora.torch.LoRASB)
    with pytest.warns(RuntimeWarning, match="B is zero") if never_moves else nullcontext():
        train(model, optimizer, 1)
    numbers = optimizer.diagnostics()
    mode = optimizer.param_groups[0].get("damping_mode", "relative")
    for name in NAMES:
        assert math.isnan(numbers[f"rlora/{name}/cond_B"])
        assert numbers[f"rlora/{name}/skipped_B"] == float(mode == "relative")
        assert numbers[f"rlora/{name}/step"] in (0.0, math.inf)
    with torch.no_grad():
        pairs_in(model)[0][0][1, 2] = math.nan
    with pytest.warns(RuntimeWarning, match=r"A of 0 \(default\), or its state, is not finite"):
        numbers = optimizer.diagnostics()
    assert numbers["rlora/nan_A/count"] == 0  # that step began before
    optimizer.watch()
    numbers = optimizer.diagnostics()
    assert numbers[f"rlora/{NAMES[0]}/nan_A"] == 1
    assert numbers[f"rlora/{NAMES[1]}/nan_A"] == 0
    assert math.isnan(numbers[f"rlora/{NAMES[0]}/cond_A"])
    assert numbers["rlora/cond_A/max"] == numbers[f"rlora/{NAMES[1]}/cond_A"]


def test_frozen_factors_and_missing_gradients():
    model = make_model()
    pairs = pairs_in(model)
    pairs[0][0].requires_grad_(False)
    optimizer = ScaledAdamW(model, lr=1e-2)
    optimizer.watch()
    loss_of(model).backward()
    pairs[1][1].grad = None
    optimizer.step()
    optimizer.zero_grad()  # what counts is what the step had
    numbers = optimizer.diagnostics()
    marks = [numbers[f"rlora/{name}/no_grad_{x}"] for name in NAMES for x in "AB"]
    assert marks == [1, 0, 0, 1]
    assert numbers[f"rlora/{NAMES[0]}/step_A"] == 0
    assert numbers[f"rlora/{NAMES[0]}/step_B"] > 0
    assert "A has no gradient: it stands still (1 of 2 pairs)" in findings(numbers)


def test_a_closure_may_make_the_gradients():
    """As Lightning does: there are none before the step."""
    model = make_model()
    optimizer = ScaledAdamW(model, lr=1e-2)
    optimizer.watch()

    def closure():
        optimizer.zero_grad()
        loss = loss_of(model)
        loss.backward()
        return loss

    optimizer.step(closure)
    assert optimizer.diagnostics()["rlora/no_grad_A/count"] == 0


@make
def test_copies_do_not_watch_and_go_on(make, tmp_path):
    """deepcopy, pickle and state_dict of a watched optimizer are those of any other."""
    model = make_model()
    optimizer = make(model)
    optimizer.watch(model)
    train(model, optimizer, 3)
    numbers = optimizer.diagnostics()
    for clone in (copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))):
        model_2, optimizer_2 = clone((model, optimizer))
        assert not optimizer_2._watching
        optimizer_2.watch(model_2)
        train(model_2, optimizer_2, 1, start=3)
        assert optimizer_2.diagnostics().keys() == numbers.keys()
    assert optimizer.diagnostics() == numbers
    torch.save(optimizer.state_dict(), tmp_path / "o.pt")
    resumed = make(model)
    resumed.load_state_dict(torch.load(tmp_path / "o.pt", weights_only=True))
    optimizer.load_state_dict(optimizer.state_dict())
    assert optimizer._watching


def test_pairs_may_come_and_go():
    model, extra = make_model(), make_model(seed=3, bias=False)
    optimizer = ScaledAdamW(model, lr=1e-2)
    optimizer.watch(model)
    train(model, optimizer, 1)
    new = [(f"new.{n}", p) for n, p in extra.named_parameters() if p.requires_grad]
    optimizer.add_param_group({"params": new})
    assert optimizer.diagnostics()["rlora/pairs"] == 2  # of the last step
    optimizer.step()
    numbers = optimizer.diagnostics()
    assert numbers["rlora/pairs"] == 4
    assert numbers["rlora/new.0 (default)/no_grad_A"] == 1
    del optimizer.param_groups[0]["params"][:2]  # the first pair's, as of a deleted adapter
    optimizer.step()
    numbers = optimizer.diagnostics()
    assert numbers["rlora/pairs"] == 3
    assert f"rlora/{NAMES[0]}/cond_A" not in numbers
    assert numbers["rlora/new.0 (default)/no_grad_A"] == 1


def test_a_model_may_be_moved_to_another_dtype():
    """Afterwards figures are of the new dtype: its rounding is what bounds the damped Gram."""
    model = make_model(bias=False, r=8)  # more than the 6 inputs of the first layer
    optimizer = ScaledSGD(model, lr=1e-3, damping=0.0)
    optimizer.watch(model)
    train(model, optimizer, 1)
    single = optimizer.diagnostics()
    model.double()
    optimizer.zero_grad()
    train(model, optimizer, 1)
    double = optimizer.diagnostics()
    for numbers, eps in ((single, 2**-23), (double, 2**-52)):
        assert 1 < numbers[f"rlora/{NAMES[0]}/damped_cond_A"] * 10 * 8 * eps < 8


def test_pairs_by_hand_and_kernels_have_names_and_figures():
    A, B = torch.randn(2, 3, 3, 3), torch.randn(5, 2, 1, 1)
    parameters = [A.requires_grad_(), B.requires_grad_()]
    optimizer = ScaledSGD(parameters, lr=0.1, pairs=[(A, B)])
    numbers = optimizer.diagnostics()
    expected = np.linalg.cond(A.detach().double().numpy().reshape(2, 27)) ** 2
    assert numbers["rlora/pairs[0]/cond_A"] == pytest.approx(expected, rel=1e-9)


def same_rows(one, many, name):
    """Rows of layers of one pair, and of as many pairs by hand."""
    rows = [{k: v for k, v in one.items() if k.startswith(f"rlora/{name}[{i}]/")} for i in range(3)]
    for i, row in enumerate(rows):
        assert len(row) == len(WIDE) - 1 + len(MARKS)  # no base weight is known
        for key, value in row.items():
            if "/grown_" in key:  # of the whole parameter, not of the layer
                continue
            other = many[f"rlora/pairs[{i}]/{key.rpartition('/')[2]}"]
            # The same numbers, from float32 steps of other shapes.
            assert value == pytest.approx(other, rel=1e-4, nan_ok=True), key


@pytest.mark.parametrize("layout", [
    Layout("(e r) n", "m (r e)", sizes={"e": 3}),
    Layout(blocks=(4, 5, 3)),
], ids=["experts", "blocks"])  # fmt: skip
def test_layers_of_one_pair_are_rows_of_their_own(layout):
    """As so many pairs by hand, with the numbers of the layer behind the name of the pair."""
    torch.manual_seed(0)
    A = torch.randn(6, 7)
    B = torch.randn(12, 2) if layout.blocks else torch.randn(8, 6)
    grads = torch.randn_like(A), torch.randn_like(B)
    ours = [p.clone().requires_grad_() for p in (A, B)]
    for p, g in zip(ours, grads, strict=True):
        p.grad = g
    views = layout.views(tuple(A.shape), tuple(B.shape))
    pairs = [
        tuple(x.clone().requires_grad_() for x in pair)
        for F in read_pairs(views, A, B)
        for pair in zip(*(x.reshape(-1, *x.shape[-2:]) for x in F), strict=True)
    ]
    split = [
        pair
        for F in read_pairs(views, *grads)
        for pair in zip(*(x.reshape(-1, *x.shape[-2:]) for x in F), strict=True)
    ]
    for pair, grad in zip(pairs, split, strict=True):
        for p, g in zip(pair, grad, strict=True):
            p.grad = g.clone()
    found = []
    for params, by_hand in ((ours, [(*ours, layout)]), ([p for x in pairs for p in x], pairs)):
        optimizer = ScaledSGD(params, lr=0.1, pairs=by_hand)
        optimizer.watch()
        optimizer.step()
        found.append(optimizer.diagnostics())
    assert found[0]["rlora/pairs"] == 3
    same_rows(*found, "pairs[0]")


def test_adaloras_diagonal():
    """The product is ``B diag(e) A``; the Grams are those of A and B."""
    torch.manual_seed(0)
    layer = torch.nn.Module()
    for name, shape in (("lora_A", (3, 7)), ("lora_B", (5, 3)), ("lora_E", (3, 1))):
        values = torch.randn(shape, dtype=torch.float64)
        layer.register_parameter(name, torch.nn.Parameter(values))
    optimizer = ScaledAdamW(layer, lr=0.1)
    optimizer.watch()
    full = []
    for _ in range(2):
        A, B, e = (getattr(layer, f"lora_{x}").detach().numpy().copy() for x in "ABE")
        full.append((B * e.T @ A, A, B))
        (layer.lora_B * layer.lora_E.T @ layer.lora_A).square().sum().backward()
        optimizer.step() if len(full) == 1 else None
    numbers = optimizer.diagnostics()
    (W0, A0, B0), (W, *_) = full
    (name,) = (pair.name for pair in optimizer.report)
    expected = {
        "cond_A": np.linalg.cond(A0) ** 2,
        "cond_B": np.linalg.cond(B0) ** 2,
        "step": np.linalg.norm(W - W0) / np.linalg.norm(W0),
    }
    for key, value in expected.items():
        assert numbers[f"rlora/{name}/{key}"] == pytest.approx(value, rel=1e-9)


def test_tied_pairs_are_one_row_whose_gradient_may_come_from_either():
    model = make_model(bias=False)
    other = make_model(seed=1, bias=False)
    other[0].lora_A, other[0].lora_B = model[0].lora_A, model[0].lora_B
    both = torch.nn.ModuleDict({"one": model, "two": other})
    optimizer = ScaledAdamW(list(both.named_parameters(remove_duplicate=True)), lr=1e-2)
    optimizer.watch()
    loss_of(other).backward()
    optimizer.step()
    numbers = optimizer.diagnostics()
    assert numbers["rlora/pairs"] == 3
    assert numbers["rlora/one.0 (default)/no_grad_A"] == 0
    assert numbers["rlora/one.2 (default)/no_grad_A"] == 1


def test_a_factor_that_has_become_a_dtensor_is_refused(tmp_path):
    """As accelerate puts DTensors in the places of parameters, for FSDP2."""
    from torch import distributed
    from torch.distributed.tensor import DTensor, Shard, init_device_mesh

    store = distributed.FileStore(str(tmp_path / "store"), 1)
    distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        model = make_model(bias=False)
        optimizer = ScaledAdamW(model, lr=1e-2)
        mesh = init_device_mesh("cpu", (1,))
        group = optimizer.param_groups[0]
        group["params"] = [
            torch.nn.Parameter(DTensor.from_local(p.detach(), mesh, [Shard(0)]))
            for p in group["params"]
        ]
        for look in (optimizer.watch, optimizer.diagnostics):
            with pytest.raises(rlora.ShardingError, match="DTensor of shape"):
                look()
    finally:
        distributed.destroy_process_group()


def test_the_scaling_and_the_base_of_a_peft_layer():
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    base = torch.nn.Sequential(torch.nn.Linear(6, 10), torch.nn.Tanh(), torch.nn.Linear(10, 8))
    model = get_peft_model(base, LoraConfig(r=4, lora_alpha=12, target_modules=["0", "2"]))
    optimizer = ScaledAdamW(model, lr=1e-2)
    optimizer.watch(model)
    weight = model.base_model.model[0].base_layer.weight.detach().clone()
    before = model.base_model.model[0].get_delta_weight("default").detach()
    model(torch.randn(5, 6)).square().mean().backward()
    optimizer.step()
    after = model.base_model.model[0].get_delta_weight("default").detach()
    found = optimizer.diagnostics()["rlora/base_model.model.0 (default)/step_in_weight"]
    # PEFT forms its own product in float32.
    assert found == pytest.approx(float((after - before).norm() / weight.norm()), rel=1e-5)


@pytest.mark.parametrize("adapter", ["default", "other"])
@pytest.mark.parametrize("scaling", [None, 0.5])
def test_a_step_in_the_weight_by_the_scaling_of_its_group(adapter, scaling):
    """The scaling of the layer, 3, unless the group has one of its own."""
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    base = torch.nn.Sequential(torch.nn.Linear(6, 10), torch.nn.Tanh(), torch.nn.Linear(10, 8))
    config = LoraConfig(r=4, lora_alpha=12, target_modules=["0", "2"], init_lora_weights=False)
    model = get_peft_model(base, config, adapter_name=adapter)
    named = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
    own = {} if scaling is None else {"scaling": scaling}
    optimizer = ScaledAdamW([{"params": named, **own}], lr=1e-2)
    layer = model.base_model.model[0]
    A, B = layer.lora_A[adapter].weight, layer.lora_B[adapter].weight
    optimizer.watch(model)
    before = B.detach() @ A.detach()
    model(torch.randn(5, 6)).square().mean().backward()
    optimizer.step()
    change = (scaling or 3.0) * (B @ A - before).norm() / layer.base_layer.weight.norm()
    found = optimizer.diagnostics()[f"rlora/base_model.model.0 ({adapter})/step_in_weight"]
    assert found == pytest.approx(change.item(), rel=1e-5)  # float32


def test_the_table_shows_every_pair_whole():
    model = make_model(zero_B=True)
    optimizer = ScaledAdamW(model, lr=1e-2, damping_mode="relative")
    optimizer.watch(model)
    train(model, optimizer, 1)
    numbers = optimizer.diagnostics()
    out = io.StringIO()
    Console(file=out, width=80).print(diagnostics_table(numbers))
    text = out.getvalue()
    assert "…" not in text
    for word in (
        *NAMES,
        "anisotropy",
        "skipped",
        "median of 2",
        f"{numbers['rlora/cond_A/median']:.2g}",
    ):
        assert word in text
    assert "B is zero or out of range: A stands still (2 of 2 pairs)" in text
    summary = diagnostics_table(optimizer.diagnostics(per_pair=False))
    assert summary.row_count == 2


def test_findings_need_a_reason():
    """A run in order has none; each of them can be made."""
    model = make_model()
    optimizer = ScaledAdamW(model, lr=1e-3)
    numbers, *_ = watched_step(model, optimizer)
    assert findings(numbers) == []
    for key, value, words in (
        ("nan_A/count", 1, "A has NaN"),
        ("damped_B/count", 2, "Gram of B (2 of 2 pairs)"),
        ("anisotropy_B/max", 0.005, "has no effect on A"),
        ("step_A/max", 5.4, "moved A by 5.4 times"),
    ):
        found = findings({**numbers, f"rlora/{key}": float(value)})
        assert len(found) == 1
        assert words in found[0]
    assert findings({**numbers, "rlora/step_B/max": math.inf}) == []  # from zero


def test_nothing_is_imported_before_it_is_needed():
    code = (
        "import sys, rlora.torch; print([m for m in ('rich', 'transformers') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_every_class_can_be_watched():
    assert all(hasattr(LoRAOptimizer, name) for name in ("watch", "unwatch", "diagnostics"))
    kinds = [getattr(rlora.torch, name) for name in rlora.torch.__all__]
    optimizers = [k for k in kinds if isinstance(k, type) and issubclass(k, torch.optim.Optimizer)]
    assert len(optimizers) > 10
    assert all(issubclass(kind, LoRAOptimizer) for kind in optimizers)


def test_growth_is_against_a_rate_in_a_tensor_as_against_a_number():
    found = []
    for lr in (0.1, torch.tensor(0.1)):
        torch.manual_seed(0)
        pair = torch.randn(4, 6, requires_grad=True), torch.randn(5, 4, requires_grad=True)
        optimizer = rlora.torch.ScaledAdamW(list(pair), lr=lr, pairs=[pair])
        optimizer.watch()
        for p in pair:
            p.grad = torch.randn_like(p)
        optimizer.step()
        found.append(optimizer.diagnostics()["rlora/grown_A/max"])
    assert found[1] == pytest.approx(found[0], rel=1e-5)  # 0.1 in float32

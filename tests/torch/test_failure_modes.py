"""Failures of optimizers of this kind, row by row; each test names its failure."""

import copy
import subprocess
import sys

import pytest
import torch
from models import CLASSES, LoRALinear, batch, loss_of, make_model, pairs_in, same, train, values
from torch import nn

import rlora
from rlora.torch import ScaledAdamW, ScaledSGD, find_pairs

make = pytest.mark.parametrize("make", CLASSES.values(), ids=CLASSES)
MODES = ("absolute", "relative", "covariant")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    "kind, mode, damping",
    [
        *((ScaledAdamW, mode, damping) for mode in MODES for damping in (1e-2, 1e-4, 1e-8)),
        # SGD's second step is 1/δ large by the formula; see the docs
        *((ScaledSGD, mode, 1e-1) for mode in MODES),
        (ScaledSGD, "absolute", 1e-2),
    ],
)
def test_zero_B(kind, mode, damping, dtype):
    """Rows 1, 6, 8: A is bit-unchanged at step 1, all stays finite in any dtype, the loss falls."""
    model = make_model(zero_B=True, dtype=dtype, bias=False)
    lr, share = (1e-2, 0.1) if kind is ScaledAdamW else (1e-3, 0.999)
    optimizer = kind(model, lr=lr, weight_decay=0.0, damping=damping, damping_mode=mode)
    before = values(model)
    losses = train_in_float32(model, optimizer, 1)
    for name, p in model.named_parameters():
        assert torch.equal(p, before[name]) == ("lora_B" not in name), name
    losses += train_in_float32(model, optimizer, 30)
    assert all(torch.isfinite(p).all() for p in model.parameters())
    assert losses[30] < share * losses[0]


def train_in_float32(model, optimizer, steps):
    """Losses of one batch: products of bfloat16 differ between processors, those of float32 do not.

    The gradients come in the parameters' own dtype.
    """
    x = torch.randn(16, 6, generator=torch.Generator().manual_seed(0))
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        wide = {name: p.float() for name, p in model.named_parameters()}
        y = torch.func.functional_call(model, wide, (x,))
        loss = (y - 0.3 * x.sum(-1, keepdim=True)).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def test_precision_settings_do_not_matter():
    """Row 9: autocast around the step, and reduced-precision products allowed."""
    results = []
    for setting in ("plain", "autocast", "medium"):
        model = make_model()
        optimizer = ScaledAdamW(model, lr=1e-2, placement="both")
        for t in range(3):
            optimizer.zero_grad()
            loss_of(model, t).backward()
            if setting == "autocast":
                with torch.autocast("cpu", dtype=torch.bfloat16):
                    optimizer.step()
            elif setting == "medium":
                torch.set_float32_matmul_precision("medium")
                try:
                    optimizer.step()
                    assert torch.get_float32_matmul_precision() == "medium"
                finally:
                    torch.set_float32_matmul_precision("highest")
            else:
                optimizer.step()
        results.append(values(model))
    assert same(results[0], results[1])
    assert same(results[0], results[2])


@make
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("where", ["gradient", "parameter"])
def test_a_bad_pair_stays_alone(make, bad, where):
    """Row 10: batched LAPACK raises for all when one member is bad; here the others never notice."""
    model = make_model()
    twin = copy.deepcopy(model)
    a, b = make(model), make(twin)
    for m in (model, twin):
        loss_of(m).backward()
    poisoned = pairs_in(model)[1][1]
    with torch.no_grad():
        (poisoned.grad if where == "gradient" else poisoned)[0, 0] = bad
    a.step()
    b.step()
    for (name, p), q in zip(model.named_parameters(), twin.parameters(), strict=True):
        if not name.startswith("2.lora"):
            # The batch has another member, which may move a product by its last bit.
            torch.testing.assert_close(p, q, rtol=1e-6, atol=1e-7, msg=name)


def test_tied_factor_is_refused():
    """Row 12: two pairs may not share a factor, by object or by memory."""
    A, B, C = (nn.Parameter(torch.randn(*s)) for s in ((2, 5), (4, 2), (4, 2)))
    with pytest.raises(rlora.PairingError, match="tied factor"):
        ScaledAdamW([A, B, C], pairs=[(A, B), (A, C)])
    model = nn.ModuleDict({"x": make_model(bias=False)[0], "y": make_model(bias=False)[0]})
    model["y"].lora_A["default"].weight = nn.Parameter(model["x"].lora_A["default"].weight.data)
    with pytest.raises(rlora.PairingError, match="shares its memory"):
        ScaledAdamW(model)


def test_pairs_do_not_depend_on_order_or_neighbours():
    """Row 13: any registration order, look-alike names, parameters in between."""
    model = make_model()
    named = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
    decoys = [
        ("0.not_lora_A.default.weight", nn.Parameter(torch.randn(4, 6))),
        ("0.lora_A_scale", nn.Parameter(torch.ones(4))),
        ("0.vera_lora_A", nn.Parameter(torch.randn(4, 6))),
    ]
    for p in (p for _, p in decoys):
        p.grad = torch.ones_like(p)
    results = []
    for order in (named, named[::-1], sorted(named), named[:2] + decoys + named[2:]):
        m = copy.deepcopy(model)
        mine = dict(m.named_parameters())
        optimizer = ScaledAdamW([(n, mine.get(n, p)) for n, p in order], lr=1e-2)
        assert len(optimizer.report) == 2
        loss_of(m).backward()
        optimizer.step()
        results.append(values(m))
    assert all(same(results[0], r) for r in results[1:3])
    for name, value in results[0].items():
        torch.testing.assert_close(results[3][name], value, rtol=1e-6, atol=1e-7)


def test_parameters_taken_out_of_a_group_do_not_shift_the_pairs():
    """Row 14: an adapter is deleted mid-training."""
    model = make_model(bias=False)
    optimizer = ScaledAdamW(model, lr=1e-2)
    train(model, optimizer, 2)
    twin, twin_optimizer = copy.deepcopy((model, optimizer))
    first = {id(p) for p in pairs_in(model)[0]}
    group = optimizer.param_groups[0]
    group["params"] = [p for p in group["params"] if id(p) not in first]
    for m in (model, twin):
        m.zero_grad()
        loss_of(m).backward()
    for p in pairs_in(twin)[0]:
        p.grad = None
    optimizer.step()
    twin_optimizer.step()
    assert same(values(model), values(twin))


@pytest.mark.parametrize("by_hand", [False, True])
def test_an_adapter_goes_and_another_comes(by_hand):
    """Row 14: names left behind in the group do not matter, and a generator will do as params."""
    old, new = make_model(bias=False), make_model(seed=5, bias=False)
    kept, gone = pairs_in(old)
    if by_hand:
        optimizer = ScaledAdamW([*kept, *gone], lr=1e-2, pairs=[kept, gone])
    else:
        optimizer = ScaledAdamW(old, lr=1e-2)
    train(old, optimizer, 1)
    group = optimizer.param_groups[0]
    group["params"] = [p for p in group["params"] if not any(p is q for q in gone)]
    if by_hand:
        added = {"params": (p for pair in pairs_in(new) for p in pair), "pairs": pairs_in(new)}
    else:
        trainable = ((f"new.{n}", p) for n, p in new.named_parameters() if p.requires_grad)
        added = {"params": trainable}
    optimizer.add_param_group(added)
    assert len(optimizer.report) == 3
    assert [len(g["params"]) for g in optimizer.param_groups] == [2, 4]
    train(new, optimizer, 2)
    assert all(p in optimizer.state for pair in pairs_in(new) for p in pair)


def test_swapped_parameters_are_found_by_position():
    """Row 22: accelerate exchanges all parameters of the groups for others."""
    model = make_model(bias=False)
    optimizer = ScaledAdamW(model, lr=1e-2)
    twin = copy.deepcopy(model)
    reference = ScaledAdamW(twin, lr=1e-2)
    new = copy.deepcopy(model)
    swap = dict(zip((id(p) for p in model.parameters()), new.parameters(), strict=True))
    for group in optimizer.param_groups:
        group["params"] = [swap[id(p)] for p in group["params"]]
    assert train(new, optimizer, 3) == train(twin, reference, 3)


@pytest.mark.parametrize(
    "shapes, match",
    [
        (((5, 2), (4, 2)), "does not fit"),
        (((2, 5), (2, 4)), "does not fit"),
        (((5,), (4, 2)), "does not fit"),
        (((2, 5), (4, 3)), "does not fit"),
        (((2, 0), (4, 2)), "does not fit"),
    ],
)
def test_pairs_that_do_not_fit_are_refused_at_construction(shapes, match):
    """Row 17, with the shapes in the message."""
    A, B = (nn.Parameter(torch.randn(*s)) for s in shapes)
    with pytest.raises(rlora.ShapeError, match=match) as caught:
        ScaledAdamW([A, B], pairs=[(A, B)])
    assert str(tuple(shapes[0])) in str(caught.value)


def test_convolutions_are_flattened():
    """Row 17: 4-D kernels; the Gram of A runs over all of its kernel."""
    torch.manual_seed(0)
    A, B = nn.Parameter(torch.randn(2, 3, 5, 5)), nn.Parameter(torch.randn(7, 2, 1, 1))
    flat = (
        nn.Parameter(A.detach().reshape(2, 75).clone()),
        nn.Parameter(B.detach().view(7, 2).clone()),
    )
    conv = ScaledAdamW([A, B], pairs=[(A, B)], lr=0.1, placement="both")
    matrix = ScaledAdamW(list(flat), pairs=[flat], lr=0.1, placement="both")
    for _ in range(3):
        A.grad, B.grad = torch.randn_like(A), torch.randn_like(B)
        flat[0].grad, flat[1].grad = A.grad.reshape(2, 75), B.grad.reshape(7, 2)
        conv.step()
        matrix.step()
    torch.testing.assert_close(A.detach().reshape(2, 75), flat[0].detach())
    torch.testing.assert_close(B.detach().view(7, 2), flat[1].detach())
    assert conv.state[A]["exp_avg"].shape == A.shape


@pytest.mark.parametrize("flags", [{}, {"fused": True}, {"foreach": True}], ids=str)
def test_convolutions_in_another_memory_format(flags):
    """A channels-last kernel has no matrix view: its Gram must follow it all the same."""
    torch.manual_seed(0)
    A, B = torch.randn(2, 3, 5, 5), torch.randn(7, 2, 1, 1)
    layouts = (torch.contiguous_format, torch.channels_last)
    pairs = [
        tuple(nn.Parameter(x.clone().to(memory_format=layout)) for x in (A, B))
        for layout in layouts
    ]
    optimizers = [ScaledAdamW(list(pair), pairs=[pair], lr=0.3, **flags) for pair in pairs]
    for _ in range(4):
        grads = torch.randn_like(A), torch.randn_like(B)
        for pair, optimizer in zip(pairs, optimizers, strict=True):
            for p, g in zip(pair, grads, strict=True):
                p.grad = g.clone()
            optimizer.step()
    for p, q in zip(*pairs, strict=True):
        torch.testing.assert_close(p.detach(), q.detach())


def test_replaced_parameters_are_the_ones_that_move():
    """Rows 14, 22: new objects at old places, over the same memory too."""
    model = make_model()
    twin = copy.deepcopy(model)
    optimizer, reference = ScaledAdamW(model, lr=1e-2), ScaledAdamW(twin, lr=1e-2)
    train(model, optimizer, 2)
    train(twin, reference, 2)
    fresh = {
        id(p): nn.Parameter(p.detach(), requires_grad=p.requires_grad) for p in model.parameters()
    }
    state = {fresh[id(p)]: s for p, s in optimizer.state.items()}
    optimizer.state.clear()
    optimizer.state.update(state)
    for group in optimizer.param_groups:
        group["params"] = [fresh[id(p)] for p in group["params"]]
    for module in model.modules():
        for name, p in list(module._parameters.items()):
            if p is not None:
                module._parameters[name] = fresh[id(p)]
    assert train(model, optimizer, 2, start=2) == train(twin, reference, 2, start=2)
    # A single plain parameter exchanged: the new one moves, the old one does not.
    head = model[3].bias
    model[3].bias = nn.Parameter(head.detach().clone())
    group = optimizer.param_groups[0]
    group["params"] = [model[3].bias if p is head else p for p in group["params"]]
    before = head.detach().clone()
    train(model, optimizer, 1)
    assert torch.equal(head, before)
    assert not torch.equal(model[3].bias, before)


def test_mixed_dtypes_in_a_pair_are_refused():
    """Row 18, at construction and when it happens later."""
    A, B = nn.Parameter(torch.randn(2, 5)), nn.Parameter(torch.randn(4, 2, dtype=torch.float64))
    with pytest.raises(rlora.NamespaceError, match=r"float32 on cpu and torch\.float64"):
        ScaledAdamW([A, B], pairs=[(A, B)])
    model = make_model()
    optimizer = ScaledAdamW(model, lr=1e-2)
    model[0].lora_B.to(torch.float64)
    before = values(model)
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    with pytest.raises(rlora.NamespaceError, match="one dtype"):
        optimizer.step()
    assert same(before, values(model))


@pytest.mark.parametrize("value, error", [
    (-1e-3, ValueError), (float("nan"), ValueError), (float("inf"), ValueError),
    ("1e-3", TypeError), (None, TypeError),
])  # fmt: skip
@pytest.mark.parametrize("per_group", [False, True])
def test_damping_is_validated(value, error, per_group):
    """Row 19, per group too."""
    model = make_model()
    if per_group:
        with pytest.raises(error, match="damping"):
            ScaledAdamW([{"params": model, "damping": value}])
    else:
        with pytest.raises(error, match="damping"):
            ScaledAdamW(model, damping=value)


@pytest.mark.parametrize("options", [
    {"lr": -1.0}, {"eps": -1.0}, {"betas": (1.0, 0.9)}, {"weight_decay": -1.0},
    {"placement": "beside"}, {"damping_mode": "mean"}, {"order": "sor"}, {"compute_dtype": "half"},
])  # fmt: skip
def test_hyperparameters_are_validated_at_construction(options):
    with pytest.raises(ValueError, match=r"[Ii]nvalid|must be"):
        ScaledAdamW(make_model(), **options)
    if "betas" not in options and "eps" not in options and "placement" not in options:
        with pytest.raises(ValueError, match=r"[Ii]nvalid|must be"):
            ScaledSGD(make_model(), **options)


def test_zero_damping_is_defined():
    model = make_model(zero_B=True)
    optimizer = ScaledAdamW(model, lr=1e-2, damping=0.0)
    train(model, optimizer, 10)
    assert all(torch.isfinite(p).all() for p in model.parameters())


@pytest.mark.parametrize("flags", [{}, {"fused": True}, {"foreach": True}], ids=str)
@pytest.mark.parametrize("layout", ["transposed", "strided", "flat buffer", "expanded gradient"])
def test_layouts(layout, flags):
    """Row 20: the same numbers, in the same storage, whatever the strides."""
    torch.manual_seed(0)
    a, b = torch.randn(4, 6), torch.randn(9, 4)
    g_a, g_b = torch.randn(4, 6), torch.randn(9, 4)
    if layout == "expanded gradient":
        g_a, g_b = torch.randn(4, 1).expand(4, 6), torch.ones(1, 1).expand(9, 4)
    reference = nn.Parameter(a.clone()), nn.Parameter(b.clone())
    if layout == "transposed":
        A, B = nn.Parameter(a.T.clone().T), nn.Parameter(b.T.clone().T)
    elif layout == "strided":
        A = nn.Parameter(torch.stack([a, a], -1)[..., 0])
        B = nn.Parameter(torch.stack([b, b], -1)[..., 0])
    else:
        buffer = torch.cat([a.flatten(), b.flatten(), torch.tensor([7.0])])
        A, B = nn.Parameter(buffer[:24].view(4, 6)), nn.Parameter(buffer[24:60].view(9, 4))
    for placement in ("before", "both"):
        one = ScaledAdamW([A, B], lr=0.1, pairs=[(A, B)], placement=placement, **flags)
        two = ScaledAdamW(list(reference), lr=0.1, pairs=[reference], placement=placement)
        pointers = A.data_ptr(), B.data_ptr()
        A.grad, B.grad = g_a, g_b
        reference[0].grad, reference[1].grad = g_a.clone(), g_b.clone()
        for _ in range(2):
            one.step()
            two.step()
        assert pointers == (A.data_ptr(), B.data_ptr())
        torch.testing.assert_close(A.detach(), reference[0].detach())
        torch.testing.assert_close(B.detach(), reference[1].detach())
    if layout == "flat buffer":
        assert buffer[60] == 7.0
        assert torch.equal(buffer[:24].view(4, 6), A.detach())


def test_moved_storage_is_noticed():
    """`model.to` and friends put new memory behind the same parameters between two steps."""
    model = make_model()
    twin = copy.deepcopy(model)
    a, b = ScaledAdamW(model, lr=1e-2), ScaledAdamW(twin, lr=1e-2)
    train(model, a, 2)
    train(twin, b, 2)
    for p in model.parameters():
        p.data = p.data.clone()
    assert train(model, a, 2, start=2) == train(twin, b, 2, start=2)
    assert same(values(model), values(twin))


def test_two_steps_on_the_same_gradients_precondition_once_each():
    """Row 21."""
    model = make_model(bias=False)
    optimizer = ScaledSGD(model, lr=1e-3, damping=0.1)
    loss_of(model).backward()
    start = values(model)
    optimizer.step()
    middle = values(model)
    optimizer.step()
    for name, p in model.named_parameters():
        if p.requires_grad:
            first, second = middle[name] - start[name], p.detach() - middle[name]
            torch.testing.assert_close(first, second, rtol=0.2, atol=1e-3, msg=name)


def test_sparse_complex_and_flat_are_refused_before_anything_moves():
    """Rows 17, 23."""
    table = nn.Embedding(7, 2, sparse=True)
    B = nn.Parameter(torch.randn(2, 7))
    optimizer = ScaledAdamW([table.weight, B], pairs=[(table.weight, B)])
    table(torch.tensor([1, 2])).sum().backward()
    before = table.weight.detach().clone()
    with pytest.raises(rlora.NamespaceError, match="sparse"):
        optimizer.step()
    assert torch.equal(before, table.weight)
    C, D = (nn.Parameter(torch.randn(*s, dtype=torch.complex64)) for s in ((2, 5), (4, 2)))
    with pytest.raises(rlora.NamespaceError, match="complex64"):
        ScaledAdamW([C, D], pairs=[(C, D)])
    flat = [("x.lora_A.default.weight", nn.Parameter(torch.randn(10)))]
    with pytest.raises(rlora.ShardingError, match="flattened"):
        ScaledAdamW([*flat, ("x.lora_B.default.weight", nn.Parameter(torch.randn(8)))])


def test_replicas_stay_bit_equal():
    """Row 24: the same steps in two processes' worth of objects give the same bits."""
    runs = []
    for _ in range(2):
        model = make_model(seed=4)
        train(model, ScaledAdamW(model, lr=1e-2, placement="both"), 10)
        runs.append(values(model))
    assert same(*runs)


@pytest.mark.parametrize("r, n, m", [(16, 4, 3), (1, 9, 9), (3, 1, 1), (8, 8, 1), (256, 64, 300)])
def test_extreme_shapes(r, n, m):
    """Row 6: r > min(m, n), r = 1, n = m = 1."""
    torch.manual_seed(0)
    A, B = nn.Parameter(torch.randn(r, n)), nn.Parameter(torch.zeros(m, r))
    optimizer = ScaledAdamW([A, B], lr=1e-2, pairs=[(A, B)])
    x, y = torch.randn(20, n), torch.randn(20, m)
    losses = []
    for _ in range(30):
        optimizer.zero_grad()
        loss = (x @ A.T @ B.T - y).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    assert torch.isfinite(A).all()


def test_nothing_to_pair_is_an_error_with_the_names():
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    with pytest.raises(rlora.PairingError, match=r"4 parameters: 0.weight, 0.bias, 1.weight and 1"):
        ScaledAdamW(model)
    with pytest.raises(rlora.PairingError, match=r"without names.*lambda: ScaledAdamW"):
        ScaledAdamW(make_model().parameters())
    with pytest.raises(rlora.PairingError, match="no LoRA pair"):
        ScaledAdamW([nn.Parameter(torch.ones(2, 2))], pairs=[])


@pytest.mark.parametrize("params, error", [
    ([], ValueError), (torch.ones(3, requires_grad=True), TypeError), ([3], TypeError),
])  # fmt: skip
def test_wrong_params(params, error):
    with pytest.raises(error):
        ScaledAdamW(params, pairs=[])


def test_pairs_by_hand_must_be_among_the_parameters():
    A, B, C = (nn.Parameter(torch.randn(*s)) for s in ((2, 5), (4, 2), (4, 2)))
    with pytest.raises(rlora.PairingError, match="B of pairs\\[0\\] is not among"):
        ScaledAdamW([A, B], pairs=[(A, C)])
    with pytest.raises(rlora.PairingError, match=r"must be \(A, B\)"):
        ScaledAdamW([A, B], pairs=[A])


def test_differentiable_is_refused():
    with pytest.raises(ValueError, match="differentiable"):
        rlora.torch.precondition(torch.optim.SGD)(make_model(), lr=0.1, differentiable=True)


def test_expert_stacks_need_the_model():
    """Row 26: PEFT's stacked experts have names and shapes of one large pair, and are several."""
    model = nn.ModuleDict({"x": LoRALinear(6, 10, 4), "experts": LoRALinear(6, 10, 4)})
    model["experts"].num_experts, model["experts"].parameter_name = 2, "weight"
    report = find_pairs(model.named_parameters())
    assert [pair.name for pair in report] == ["x (default)"]
    assert "stack of experts" in str(report)
    optimizer = ScaledAdamW(model)
    assert [pair.shape_b for pair in optimizer.report] == [(10, 4), (2, 10, 2)]
    optimizer.add_param_group({"params": [("late.bias", nn.Parameter(torch.ones(3)))]})
    assert [pair.shape_b for pair in optimizer.report] == [(10, 4), (2, 10, 2)]
    grouped = ScaledAdamW([{"params": model, "lr": 1e-2}])
    assert [pair.shape_b for pair in grouped.report] == [(10, 4), (2, 10, 2)]


def test_memory_is_not_leaked_by_a_copy():
    """Row 22: a deep copy must not keep the old model alive."""
    import gc
    import weakref

    model = make_model()
    optimizer = ScaledAdamW(model, lr=1e-2)
    train(model, optimizer, 1)
    kept = copy.deepcopy((model, optimizer))
    seen = weakref.ref(pairs_in(model)[0][0])
    del model, optimizer
    gc.collect()
    assert seen() is None
    assert kept[1].report


def test_step_without_a_scheduler_or_grad_leaves_no_state():
    model = make_model()
    optimizer = ScaledAdamW(model, lr=1e-2)
    optimizer.step()
    assert not optimizer.state
    x, _ = batch()
    assert model(x).shape == (16, 8)


@pytest.mark.skipif(
    not hasattr(torch.backends, "fp32_precision"), reason="torch before 2.9 has one setting"
)
def test_the_setting_for_all_of_torch_still_reaches_products_after_a_step():
    """Reading the setting of products gives the inherited one, which is not to be written there.

    In a process of its own: torch's test utilities, which some libraries import, freeze settings.
    """
    code = """
import torch
import rlora.torch
pair = [torch.nn.Parameter(torch.ones(shape)) for shape in ((2, 8), (6, 2))]
optimizer = rlora.torch.ScaledAdamW(pair, pairs=[tuple(pair)])
for p in pair:
    p.grad = torch.ones_like(p)
torch.backends.fp32_precision = "tf32"
optimizer.step()
for precision in ("tf32", "ieee", "none"):
    torch.backends.fp32_precision = precision
    assert torch.backends.cuda.matmul.fp32_precision == precision
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert not done.returncode, done.stderr[-2000:]


def test_a_step_in_another_thread_does_not_change_the_precision_of_this_one():
    """Torch has one setting for all threads: whoever is inside last puts it back."""
    code = """
import threading
import torch
from rlora.backends import get
from rlora.backends._torch_precision import _rounds_inputs
torch.set_float32_matmul_precision("medium")
backend, x = get("torch"), torch.ones(2, 2)
go, gone = threading.Event(), threading.Event()

def other():
    with backend.exact(x):
        go.set()
        gone.wait()

thread = threading.Thread(target=other)
thread.start()
go.wait()
with backend.exact(x):
    gone.set()
    thread.join()
    assert not _rounds_inputs()
assert _rounds_inputs()
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert not done.returncode, done.stderr[-2000:]

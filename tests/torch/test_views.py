"""Parameters that hold blocks, experts, transposed or tied factors: each as pairs of its own."""

import copy
import io

import pytest
import torch
from models import CLASSES, METHODS
from torch import nn

import rlora.torch
from rlora import PairingError
from rlora.pairing import Convention, Layout
from rlora.torch import LoRARite, ScaledAdamW, ScaledSGD

LAYOUTS = {
    "experts": (Layout("(e r) n", "m (r e)", sizes={"e": 3}), (6, 5), (4, 6)),
    "unequal blocks": (Layout(blocks=(4, 3, 5)), (6, 5), (12, 2)),
    "turned": (Layout("n r", "r m"), (5, 2), (2, 4)),
    "turned stack": (Layout("e n r", "e r m"), (3, 5, 2), (3, 2, 4)),
    "groups of a kernel": (Layout("(e r) n*", "(e m) r 1*"), (4, 5, 3), (8, 2, 1)),
}


def make_pair(name, dtype=torch.float64):
    layout, *shapes = LAYOUTS[name]
    g = torch.Generator().manual_seed(0)
    A, B = (nn.Parameter(torch.randn(s, generator=g, dtype=dtype) / 2) for s in shapes)
    return A, B, layout


def products(A, B, layout):
    """Every product that the stored tensors hold."""
    pairs = [(a.read(A), b.read(B)) for a, b in layout.views(tuple(A.shape), tuple(B.shape))]
    return [
        (x, y)
        for a, b in pairs
        for x, y in zip(a.reshape(-1, *a.shape[-2:]), b.reshape(-1, *b.shape[-2:]), strict=True)
    ]


def loss_of(pairs, t):
    g = torch.Generator().manual_seed(t)
    return sum(
        (b @ a - torch.randn(b.shape[0], a.shape[1], generator=g, dtype=a.dtype)).square().sum()
        for a, b in pairs
    )


@pytest.mark.parametrize("name", LAYOUTS)
@pytest.mark.parametrize("make", CLASSES.values(), ids=CLASSES)
def test_a_stored_pair_steps_as_the_pairs_in_it(make, name):
    """Every class, against an optimizer over a parameter of its own for each product."""
    A, B, layout = make_pair(name)
    alone = [
        tuple(nn.Parameter(x.detach().clone()) for x in pair) for pair in products(A, B, layout)
    ]
    stored = make([A, B], pairs=[(A, B, layout)])
    separate = make([p for pair in alone for p in pair], pairs=alone)
    for t in range(3):
        for optimizer, pairs in (
            (stored, lambda: products(A, B, layout)),
            (separate, lambda: alone),
        ):
            optimizer.zero_grad()
            loss_of(pairs(), t).backward()
            optimizer.step()
    for seen, own in zip(products(A, B, layout), alone, strict=True):
        for x, y in zip(seen, own, strict=True):
            # Batches of other members round differently, and some methods take roots of Grams
            # whose condition is about 1e3.
            torch.testing.assert_close(x, y, rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize("name", LAYOUTS)
@pytest.mark.parametrize("kind", [ScaledAdamW, LoRARite])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_resume_is_exact(kind, name, dtype):
    A, B, layout = make_pair(name, dtype)

    def run(A, B, optimizer, steps):
        for t in steps:
            optimizer.zero_grad()
            loss_of(products(A, B, layout), t).backward()
            optimizer.step()

    first = kind([A, B], lr=1e-2, pairs=[(A, B, layout)])
    run(A, B, first, range(3))
    file = io.BytesIO()
    torch.save(first.state_dict(), file)
    C, D = (nn.Parameter(p.detach().clone()) for p in (A, B))
    second = kind([C, D], lr=1e-2, pairs=[(C, D, layout)])
    file.seek(0)
    second.load_state_dict(torch.load(file, weights_only=True))
    run(A, B, first, range(3, 6))
    run(C, D, second, range(3, 6))
    assert torch.equal(A, C)
    assert torch.equal(B, D)


class AdaLoRALayer(nn.Module):
    def __init__(self):
        super().__init__()
        g = torch.Generator().manual_seed(1)
        shapes = {"lora_A": (3, 6), "lora_E": (3, 1), "lora_B": (5, 3)}
        for name, shape in shapes.items():
            p = nn.Parameter(torch.randn(shape, generator=g, dtype=torch.float64))
            setattr(self, name, nn.ParameterDict({"default": p}))


def test_a_diagonal_between_the_factors_is_in_no_metric():
    """``B E A``: the metric of A is ``Bᵀ B``, that of B ``A Aᵀ``; E is in no pair."""
    layer = AdaLoRALayer()
    A, E, B = (getattr(layer, f"lora_{letter}")["default"] for letter in "AEB")
    optimizer = ScaledSGD(layer, lr=0.1, damping=1e-2, damping_mode="absolute")
    assert [pair.diagonal for pair in optimizer.report] == ["lora_E.default"]
    for _ in range(3):
        optimizer.zero_grad()
        (B @ (E * A) - 1).square().sum().backward()
        a, e, b = (p.detach().numpy().copy() for p in (A, E, B))
        g_a, g_e, g_b = (p.grad.numpy().copy() for p in (A, E, B))
        optimizer.step()
        eye = 1e-2 * torch.eye(3, dtype=torch.float64).numpy()
        H_A, H_B = b.T @ b + eye, a @ a.T + eye
        inverse = torch.linalg.inv
        for p, old, d in (
            (A, a, inverse(torch.tensor(H_A)).numpy() @ g_a),
            (E, e, g_e),
            (B, b, g_b @ inverse(torch.tensor(H_B)).numpy()),
        ):
            torch.testing.assert_close(
                p.detach(), torch.tensor(old - 0.1 * d), rtol=1e-10, atol=1e-12
            )


def test_a_diagonal_of_zeros_leaves_the_factors_alone():
    layer = AdaLoRALayer()
    A, E, B = (getattr(layer, f"lora_{letter}")["default"] for letter in "AEB")
    nn.init.zeros_(E)
    before = A.detach().clone(), B.detach().clone()
    optimizer = ScaledAdamW(layer, lr=0.1, weight_decay=0.0)
    (B @ (E * A) - 1).square().sum().backward()
    optimizer.step()
    assert torch.equal(A, before[0])
    assert torch.equal(B, before[1])
    assert E.abs().min() > 0


@pytest.mark.parametrize("kind", METHODS.values(), ids=METHODS)
def test_methods_refuse_a_diagonal_by_name(kind):
    with pytest.raises(PairingError, match=r"diagonal lora_E\.default stands between"):
        kind(AdaLoRALayer(), lr=0.1)


class Tied(nn.Module):
    """An embedding's pair, and the same memory transposed for the head, as two more parameters."""

    def __init__(self):
        super().__init__()
        g = torch.Generator().manual_seed(2)
        a, b = (torch.randn(s, generator=g, dtype=torch.float64) for s in ((2, 7), (5, 2)))
        self.embed, self.head = nn.Module(), nn.Module()
        self.embed.lora_embedding_A = nn.ParameterDict({"default": nn.Parameter(a)})
        self.embed.lora_embedding_B = nn.ParameterDict({"default": nn.Parameter(b)})
        for letter, p in (("A", b.T), ("B", a.T)):
            linear = nn.Linear(p.shape[1], p.shape[0], bias=False)
            linear.weight = nn.Parameter(p)
            setattr(self.head, f"lora_{letter}", nn.ModuleDict({"default": linear}))

    def losses(self, t):
        a, b = self.embed.lora_embedding_A["default"], self.embed.lora_embedding_B["default"]
        c, d = self.head.lora_A["default"].weight, self.head.lora_B["default"].weight
        return loss_of([(a, b)], t), loss_of([(c, d)], t + 100)


@pytest.mark.parametrize("kind", [ScaledAdamW, LoRARite])
def test_tied_storage_is_updated_once_with_both_gradients(kind):
    tied = Tied()
    optimizer = kind(tied, lr=1e-2)
    assert len(optimizer.report) == 1
    assert optimizer.report.tied == {
        "head.lora_A.default.weight": "embed.lora_embedding_B.default",
        "head.lora_B.default.weight": "embed.lora_embedding_A.default",
    }
    a, b = (
        nn.Parameter(getattr(tied.embed, f"lora_embedding_{x}")["default"].detach().clone())
        for x in "AB"
    )
    reference = kind([a, b], lr=1e-2, pairs=[(b, a, Layout("n r", "r m"))])
    for t in range(4):
        optimizer.zero_grad()
        reference.zero_grad()
        sum(tied.losses(t)).backward()
        (loss_of([(a, b)], t) + loss_of([(b.T, a.T)], t + 100)).backward()
        optimizer.step()
        reference.step()
    torch.testing.assert_close(tied.embed.lora_embedding_A["default"], a, rtol=0, atol=1e-12)
    torch.testing.assert_close(tied.head.lora_A["default"].weight, b.T, rtol=0, atol=1e-12)
    twin = copy.deepcopy(optimizer)
    assert twin.report.tied == optimizer.report.tied


@pytest.mark.parametrize("by_order", [False, True])
@pytest.mark.parametrize("kind", [ScaledAdamW, ScaledSGD, LoRARite])
def test_tied_storage_is_updated_once_where_the_pairs_are_given(kind, by_order):
    a, b = torch.randn(2, 6, dtype=torch.float64), torch.randn(5, 2, dtype=torch.float64)
    one, other, alone = ([nn.Parameter(x) for x in (a, b)] for _ in range(3))
    alone = [nn.Parameter(p.detach().clone()) for p in alone]
    pairs = "by_order" if by_order else [tuple(one), tuple(other)]
    optimizer = kind([*one, *other], lr=1e-2, pairs=pairs)
    assert len(optimizer.report) == 1
    assert optimizer.report.tied == {"pairs[1][0]": "pairs[0][0]", "pairs[1][1]": "pairs[0][1]"}
    reference = kind(alone, lr=1e-2, pairs=[tuple(alone)])
    for t in range(4):
        for p, q, x in zip(one, other, alone, strict=True):
            p.grad, q.grad = torch.randn_like(x), torch.randn_like(x) if t else None
            x.grad = p.grad + q.grad if t else p.grad
        optimizer.step()
        reference.step()
    for p, x in zip(one, alone, strict=True):
        torch.testing.assert_close(p, x, rtol=0, atol=1e-12)


@pytest.mark.parametrize("kind", [ScaledAdamW, ScaledSGD])
def test_a_pair_by_hand_is_tied_to_one_that_has_names(kind):
    a, b = torch.randn(2, 6, dtype=torch.float64), torch.randn(5, 2, dtype=torch.float64)
    one, other = ([nn.Parameter(x) for x in (a, b)] for _ in range(2))
    alone = [nn.Parameter(x.clone()) for x in (a, b)]
    optimizer = kind([("q.lora_A", one[0]), ("q.lora_B", one[1])], lr=1e-2)
    optimizer.add_param_group({"params": other, "pairs": [tuple(other)]})
    assert optimizer.report.tied == {"q.lora_A": "pairs[0][0]", "q.lora_B": "pairs[0][1]"}
    reference = kind(alone, lr=1e-2, pairs=[tuple(alone)])
    for _ in range(3):
        for p, q, x in zip(one, other, alone, strict=True):
            p.grad, q.grad = torch.randn_like(x), torch.randn_like(x)
            x.grad = p.grad + q.grad
        optimizer.step()
        reference.step()
    for p, x in zip(one, alone, strict=True):
        torch.testing.assert_close(p, x, rtol=0, atol=1e-12)


MINE = Convention("mine", "reduce", "expand", (Layout("n r", "r m"),))


@pytest.mark.parametrize(
    "pairs",
    [
        MINE,
        [MINE],
        [("q.reduce", "q.expand", Layout("n r", "r m"))],
        lambda named: [(name, name.replace("reduce", "expand"), MINE.layouts[0])
                       for name in named if name.endswith("reduce")],
    ],
    ids=["convention", "conventions", "names", "callable"],
)  # fmt: skip
def test_pairs_of_ones_own(pairs):
    model = nn.Module()
    model.q = nn.Module()
    model.q.reduce = nn.Parameter(torch.randn(6, 2))
    model.q.expand = nn.Parameter(torch.randn(2, 5))
    for kind in (ScaledAdamW, LoRARite):
        report = kind(model, lr=1e-2, pairs=pairs).report
        assert [(pair.shape_a, pair.shape_b) for pair in report] == [((2, 6), (5, 2))]
    assert len(rlora.torch.find_pairs(model, pairs=pairs)) == 1
    with pytest.raises(PairingError, match="no LoRA pair"):
        ScaledAdamW(model)


def test_a_factor_of_two_layers_is_refused_with_both_names():
    model = nn.ModuleDict({name: nn.Module() for name in "xy"})
    A = nn.Parameter(torch.randn(2, 5))
    for layer in model.values():
        layer.lora_A, layer.lora_B = A, nn.Parameter(torch.randn(4, 2))
    with pytest.raises(PairingError, match="x and y share a factor"):
        ScaledAdamW(model)

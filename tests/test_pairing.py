"""Names propose, shapes decide; tests/layouts/ has the real libraries."""

import os
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given, strategies as st

from rlora import PairingError, ShapeError, find_pairs
from rlora.pairing import Convention, Layout, conventions

NAMES = {
    "PEFT": ("{}.lora_A.default.weight", "{}.lora_B.default.weight"),
    "PEFT saved": ("base_model.model.{}.lora_A.weight", "base_model.model.{}.lora_B.weight"),
    "loralib": ("{}.lora_A", "{}.lora_B"),
    "kohya": ("lora_unet_{}.lora_down.weight", "lora_unet_{}.lora_up.weight"),
    "kohya split": ("lora_unet_{}.lora_down.0.weight", "lora_unet_{}.lora_up.0.weight"),
    "diffusers": ("unet.{}.lora.down.weight", "unet.{}.lora.up.weight"),
    "diffusers, old": ("{}.to_q_lora.down.weight", "{}.to_q_lora.up.weight"),
    "torchtune": ("{}.lora_a.weight", "{}.lora_b.weight"),
    "NeMo": ("{}.adapter.linear_in.weight", "{}.adapter.linear_out.weight"),
    "NeMo, canonical": (
        "{}.adapter.adapter_q.linear_in.weight",
        "{}.adapter.adapter_q.linear_out.weight",
    ),
}
TURNED = {
    "PEFT embedding": ("{}.lora_embedding_B.default", "{}.lora_embedding_A.default"),
    "flax, mlx": ("{}.lora_a", "{}.lora_b"),
    "flax variables": ("{}.lora_a.value", "{}.lora_b.value"),
    "Keras": ("{}.lora_kernel_a", "{}.lora_kernel_b"),
    "Keras embedding": ("{}.lora_embeddings_a", "{}.lora_embeddings_b"),
    "qwix": ("{}.kernel_lora_a", "{}.kernel_lora_b"),
}
STACKED = {
    "torchtune experts": (
        ("{}.lora_up_a", (3, 20, 4)),
        ("{}.lora_up_b", (3, 4, 30)),
    ),
    "mlx switch": (("{}.lora_a", (3, 4, 20)), ("{}.lora_b", (3, 30, 4))),
    "levanter": (("{}.lora_A.weight", (3, 4, 20)), ("{}.lora_B.weight", (3, 30, 4))),
    "qwix, batched": (("{}.w_lora_a", (3, 20, 4)), ("{}.w_lora_b", (3, 4, 30))),
}


def tensors(*shapes):
    return [np.zeros(shape) for shape in shapes]


@pytest.mark.parametrize("m", [20, 30, 5])
@pytest.mark.parametrize("names", [("lora_A", "lora_B"), ("lora_down", "lora_up")])
@pytest.mark.parametrize("lead", [(), (3,)], ids=["matrices", "stacks"])
def test_layers_of_ones_own_may_be_turned(names, m, lead):
    """``x @ A @ B`` keeps the roles of A and B, and of a square weight the low rank."""
    named = dict(zip(names, tensors((*lead, 20, 4), (*lead, 4, m)), strict=True))
    (pair,) = find_pairs(named)
    assert (pair.a, pair.b) == names
    assert (pair.shape_a, pair.shape_b, pair.rank) == ((*lead, 4, 20), (*lead, m, 4), 4)
    straight = dict(zip(names, tensors((*lead, 4, 20), (*lead, m, 4)), strict=True))
    (pair,) = find_pairs(straight)
    assert (pair.shape_a, pair.shape_b, pair.rank) == ((*lead, 4, 20), (*lead, m, 4), 4)


def test_weights_of_modules_lie_one_way():
    """A linear layer has (out, in): at a rank above the sides too, as over a head of two classes."""
    named = {"q.lora_A.weight": np.zeros((8, 4)), "q.lora_B.weight": np.zeros((4, 8))}
    (pair,) = find_pairs(named)
    assert (pair.shape_a, pair.shape_b, pair.rank) == ((8, 4), (4, 8), 8)


def test_a_high_rank_is_no_reason_to_turn_factors():
    """Merged blocks of query and value, without the module that tells them."""
    assert not find_pairs({"q.lora_A": np.zeros((8, 16)), "q.lora_B": np.zeros((16, 4))}).pairs


@pytest.mark.parametrize("suffix", ["", ".weight"])
def test_convolutions_that_are_no_product_are_refused(suffix):
    """1 x 1 down and 3 x 3 up: read with their roles turned they would be two groups."""
    shapes = {"lora_down": (4, 8, 1, 1), "lora_up": (16, 4, 3, 3)}
    report = find_pairs({name + suffix: np.zeros(shape) for name, shape in shapes.items()})
    assert not report.pairs
    assert len(report.refused) == 2


@pytest.mark.parametrize("library", NAMES)
def test_layouts(library):
    named = {}
    for layer in ("layers.0.q_proj", "layers.1.q_proj", "layers.10.q_proj"):
        a, b = (pattern.format(layer) for pattern in NAMES[library])
        named[b], named[a] = tensors((30, 4), (4, 20))
    named["head.weight"] = np.zeros((2, 2))
    report = find_pairs(named)
    assert len(report) == 3
    assert report.plain == ("head.weight",)
    assert not report.refused
    assert [(pair.a, pair.b) for pair in report] == [
        tuple(pattern.format(f"layers.{k}.q_proj") for pattern in NAMES[library])
        for k in (0, 1, 10)
    ]
    for pair in report:
        assert (pair.shape_a, pair.shape_b, pair.rank) == ((4, 20), (30, 4), 4)


@pytest.mark.parametrize("library", TURNED)
def test_turned_layouts(library):
    names = [pattern.format("layers.0.q") for pattern in TURNED[library]]
    (pair,) = find_pairs(dict(zip(names, tensors((20, 4), (4, 30)), strict=True)))
    assert (pair.shape_a, pair.shape_b) == ((4, 20), (30, 4))
    a, b = np.random.default_rng(0).normal(size=(20, 4)), np.eye(4, 30)
    ((A, B),) = pair.read(a, b)
    assert np.array_equal(B @ A, (a @ b).T)


@pytest.mark.parametrize("library", STACKED)
def test_stacked_layouts(library):
    (pair,) = find_pairs({name.format("layers.0"): np.zeros(s) for name, s in STACKED[library]})
    assert (pair.shape_a, pair.shape_b) == ((3, 4, 20), (3, 30, 4))
    assert "3 of 30 x 20, rank 4" in str(find_pairs({
        name.format("layers.0"): np.zeros(s) for name, s in STACKED[library]
    }))  # fmt: skip


def test_a_square_pair_is_read_as_its_library_writes_it():
    """If both ways fit, the smaller side is the rank; if the sides are equal, the name decides."""
    for a, b in (((4, 20), (20, 4)), ((20, 4), (4, 20))):
        (pair,) = find_pairs(dict(zip(("q.lora_a", "q.lora_b"), tensors(a, b), strict=True)))
        assert pair.rank == 4
    square = tensors((6, 6), (6, 6))
    (turned,) = find_pairs(dict(zip(("q.lora_a", "q.lora_b"), square, strict=True)))
    (plain,) = find_pairs(dict(zip(("q.lora_A", "q.lora_B"), square, strict=True)))
    assert not turned.views[0][0].is_plain
    assert plain.views[0][0].is_plain


@pytest.mark.parametrize("as_plug_in", [False, True])
def test_conventions_of_ones_own_come_before_the_known_ones(as_plug_in, monkeypatch):
    """A square pair fits both ways: whose layouts come first decides."""
    mine = Convention("mine", "lora_a", "lora_b")
    named = dict(zip(("q.lora_a", "q.lora_b"), tensors((6, 6), (6, 6)), strict=True))
    if as_plug_in:
        monkeypatch.setattr(conventions, "_plugins", lambda: (mine,))
    (pair,) = find_pairs(named, pairs=None if as_plug_in else mine)
    assert pair.views[0][0].is_plain


@pytest.mark.parametrize(
    "name, why",
    [
        ("q.hada_w1_a", "LoHa"),
        ("q.lokr_w2_b", "LoKr"),
        ("q.vera_lambda_d.default", "VeRA"),
        ("q.poly_lora_A.default", "Poly"),
        ("q.randlora_lambda.default", "RandLoRA"),
    ],
)
def test_other_adapters_are_refused_by_name(name, why):
    report = find_pairs({name: np.zeros((4, 4)), "q.weight": np.zeros((4, 4))})
    assert why in report.refused[name]
    assert report.plain == ("q.weight",)


def test_adalora_has_a_diagonal():
    named = {
        f"q.lora_{x}.default": np.zeros(s)
        for x, s in zip("AEB", ((4, 20), (4, 1), (30, 4)), strict=True)
    }
    report = find_pairs(named)
    assert [pair.diagonal for pair in report] == ["q.lora_E.default"]
    assert report.plain == ("q.lora_E.default",)
    named["q.lora_E.default"] = np.zeros((3, 1))
    assert "does not fit rank 4" in find_pairs(named).refused["q.lora_A.default"]


def test_axes_in_parentheses_behind_a_star():
    """A stack with any leading axes: as the same pattern without parentheses, which is one axis."""
    shapes = (2, 3, 12, 64), (2, 3, 4, 128, 3)
    (pair,) = Layout("b* (e r) n", "b* e m r").views(*shapes)
    (plain,) = Layout("b* e r n", "b* e m r").views((2, 3, 4, 3, 64), shapes[1])
    assert [view.shape for view in pair] == [view.shape for view in plain]


def test_known_layers_and_names_of_ones_own():
    named = {"q.lora_A": np.zeros((8, 20)), "q.lora_B": np.zeros((30, 8)), "x": np.zeros(3)}
    experts = Layout("(e r) n", "m (r e)", sizes={"e": 2})
    (pair,) = find_pairs(named, known={"q": experts})
    assert (pair.shape_a, pair.shape_b) == ((2, 4, 20), (2, 30, 4))
    report = find_pairs(named, known={"q": "a ReLU stands between"})
    assert report.refused["q.lora_A"] == "a ReLU stands between"
    assert "refused, unless frozen, is updated without preconditioning" in str(report)
    assert "refused, " not in str(find_pairs(named, known={"q": experts}))
    unsolved = find_pairs(named, known={"q": Layout("(e r) n", "m (r e)")}).refused
    assert "size of e or r is not known" in unsolved["q.lora_A"]
    (given,) = find_pairs(named, pairs=[("q.lora_A", "q.lora_B", experts)])
    assert given.views == pair.views
    with pytest.raises(PairingError, match="'y', of the pair 'x' and 'y', is not among"):
        find_pairs(named, pairs=[("x", "y")])
    with pytest.raises(ShapeError, match=r"'x' and 'q\.lora_B' does not fit"):
        find_pairs(named, pairs=[("x", "q.lora_B")])


@pytest.mark.parametrize(
    "body, warns",
    [
        ("from rlora.pairing import Convention\nOURS = Convention('x', 'reduce', 'expand')", False),
        ("OURS = 3", True),
        ("OURS = ['x', 'reduce', 'expand']", True),
        ("1 / 0", True),
    ],
)
def test_plug_ins_bring_conventions(tmp_path, body, warns):
    """By an entry point, in a process of its own; a broken one is left out with a warning."""
    (tmp_path / "theirs.py").write_text(body)
    info = tmp_path / "theirs-1.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: theirs\nVersion: 1\n")
    (info / "entry_points.txt").write_text("[rlora.conventions]\nx = theirs:OURS\n")
    code = (
        "import numpy as np, rlora\n"
        "named = {'q.reduce': np.zeros((4, 20)), 'q.expand': np.zeros((30, 4))}\n"
        "print(len(rlora.find_pairs(named)))"
    )
    run = subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, "PYTHONPATH": str(tmp_path)},
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert run.stdout.strip() == ("0" if warns else "1")
    assert ("plug-in x = theirs:OURS is left out" in run.stderr) == warns


@pytest.mark.parametrize("name", [
    "x.vera_lora_A", "x.poly_lora_A", "x.lora_A_log", "mylora_A.weight", "lora_Afoo.weight",
    "x.lora_alpha", "hada_w1_a", "lokr_w1",
])  # fmt: skip
def test_look_alikes_are_no_factors(name):
    report = find_pairs({name: np.zeros((4, 20)), name.replace("A", "B"): np.zeros((30, 4))})
    assert len(report) == 0


@given(st.permutations(range(8)))
def test_order_does_not_matter(order):
    named = []
    for k in range(4):
        a, b = tensors((2 + k, 9), (7, 2 + k))
        named += [(f"l.{k}.lora_A.x.weight", a), (f"l.{k}.lora_B.x.weight", b)]
    report = find_pairs([named[i] for i in order])
    assert {(p.a, p.b) for p in report} == {
        (f"l.{k}.lora_A.x.weight", f"l.{k}.lora_B.x.weight") for k in range(4)
    }


def test_adapters_never_cross():
    named = {}
    for adapter, r in (("first", 4), ("second", 4)):
        named[f"q.lora_A.{adapter}.weight"], named[f"q.lora_B.{adapter}.weight"] = tensors(
            (r, 9), (7, r)
        )
    report = find_pairs(named)
    assert [(p.a, p.b) for p in report] == [
        (f"q.lora_A.{x}.weight", f"q.lora_B.{x}.weight") for x in ("first", "second")
    ]
    one = find_pairs(named, adapter="second")
    assert [p.name for p in one] == ["q (second)"]
    assert "belongs to adapter 'first'" in one.refused["q.lora_A.first.weight"]


@pytest.mark.parametrize(
    "a, b, why",
    [
        ((4, 20), None, "is not among the parameters"),
        ((8, 20), (30, 4), "share no rank"),
        ((20, 5), (4, 30), "share no rank"),
        ((20,), (30, 4), "not two matrices"),
        ((0, 20), (30, 0), "not two matrices"),
        ((2, 4, 20), (3, 30, 4), "share no rank"),
    ],
)
def test_refusals_say_why(a, b, why):
    named = {"q.lora_A.weight": np.zeros(a)}
    if b is not None:
        named["q.lora_B.weight"] = np.zeros(b)
    report = find_pairs(named)
    assert len(report) == 0
    assert why in report.refused["q.lora_A.weight"]
    assert why in str(report)


@pytest.mark.parametrize("sibling", ["lora_mid", "lora_diag"])
def test_three_factor_variants_are_refused_by_name(sibling):
    down, up = ("lora_down", "lora_up") if sibling == "lora_mid" else ("lora_A", "lora_B")
    shapes = {f"q.{down}.weight": (4, 20), f"q.{up}.weight": (30, 4), f"q.{sibling}.weight": (4, 1)}
    report = find_pairs({name: np.zeros(shape) for name, shape in shapes.items()})
    assert len(report) == 0
    assert len(report.refused) == 2


def test_shapes_overrule_the_words():
    """Some call the fan-out factor "down"; where only the other reading fits, it is taken."""
    report = find_pairs(
        {"q.lora_down.weight": np.zeros((30, 4)), "q.lora_up.weight": np.zeros((4, 20))}
    )
    assert [(p.a, p.b) for p in report] == [("q.lora_up.weight", "q.lora_down.weight")]


def test_convolutions():
    report = find_pairs(
        {"c.lora_A.weight": np.zeros((4, 3, 5, 5)), "c.lora_B.weight": np.zeros((8, 4, 1, 1))}
    )
    assert report.pairs[0].shape_a == (4, 75)
    assert report.pairs[0].shape_b == (8, 4)
    grouped = find_pairs(
        {"c.lora_A.weight": np.zeros((4, 3, 5, 5)), "c.lora_B.weight": np.zeros((8, 2, 1, 1))}
    )
    assert (grouped.pairs[0].shape_a, grouped.pairs[0].shape_b) == ((2, 2, 75), (2, 4, 2))


def test_two_tensors_of_one_name():
    with pytest.raises(PairingError, match="two tensors have the name 'x'"):
        find_pairs([("x", np.zeros(2)), ("x", np.zeros(2))])


@pytest.mark.parametrize("size", [0, -1])
def test_sizes_of_a_layout_are_at_least_one(size):
    with pytest.raises(ShapeError, match=f"at least 1, got e={size}"):
        Layout("(e r) n", "m (r e)", sizes={"e": size})


def test_rows_that_are_no_blocks_of_one_rank_are_refused():
    """The last row of A would be in no pair."""
    with pytest.raises(ShapeError, match=r"\(5, 6\) and B of shape \(7, 2\) do not have 2 blocks"):
        Layout(blocks=(4, 3)).views((5, 6), (7, 2))


@pytest.mark.parametrize("shapes", [((0, 5), (4, 0)), ((2, 0), (4, 2)), ((2, 5), (0, 2))])
def test_axes_of_a_layout_are_not_empty(shapes):
    with pytest.raises(ShapeError, match=r"an axis of 0 is not \("):
        Layout().views(*shapes)


@pytest.mark.parametrize("side, patterns", [("a", ("(", "b")), ("b", ("a", "(?P<x>"))])
def test_a_pattern_that_is_no_regular_expression(side, patterns):
    with pytest.raises(PairingError, match=rf"^{side}='\(.*' of the convention 'x' must be"):
        Convention("x", *patterns)


def test_a_string_for_pairs_shows_all_that_may_be_given():
    with pytest.raises(PairingError, match=r"pairs of tensors or 'by_order' too.*'byorder'"):
        find_pairs({}, pairs="byorder")


def test_a_model_is_sent_to_the_function_for_models():
    torch = pytest.importorskip("torch")
    with pytest.raises(
        TypeError, match=r"got a Sequential; give a model to rlora\.torch\.find_pairs"
    ):
        find_pairs(torch.nn.Sequential(torch.nn.Linear(2, 2)))


@pytest.mark.parametrize("name", ["value", "weight", "policy"])
def test_an_adapter_may_have_the_name_of_a_parameter(name):
    """PEFT's are modules with a weight each, flax's have a value at the end."""
    named = {f"q.lora_A.{name}.weight": np.ones((2, 6)), f"q.lora_B.{name}.weight": np.ones((5, 2))}
    assert [pair.adapter for pair in find_pairs(named)] == [name]
    named = {"q.lora_a.value": np.ones((6, 2)), "q.lora_b.value": np.ones((2, 5))}
    assert [pair.adapter for pair in find_pairs(named)] == [None]

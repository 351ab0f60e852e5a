"""`findings` and warnings for runs that go wrong, and silence for sound ones."""

import copy
import io
import math
import warnings

import numpy as np
import pytest
import torch
from models import CLASSES, METHODS, LoRALinear, loss_of, make_model, pairs_in, train
from rich.console import Console
from torch import nn

from rlora.torch import (
    LoRASB,
    RACLoRA,
    ScaledAdamW,
    ScaledProdigy,
    ScaledSGD,
    diagnostics_table,
    findings,
)
from rlora.torch.monitor.diagnostics import MARKS, summary
from rlora.torch.monitor.format import GROWN, in_common
from rlora.torch.monitor.run_warnings import look_on_the_host
from rlora.torch.monitor.snapshot import GRACE

make = pytest.mark.parametrize("make", CLASSES.values(), ids=CLASSES)


def about(words, numbers):
    return [sentence for sentence in findings(numbers) if words in sentence]


def set_largest(p, value):
    with torch.no_grad():
        p.view(-1)[3] = value


@make
def test_growth_is_the_largest_entry_against_what_adamw_can_reach(make):
    model = make_model()
    optimizer = make(model)
    optimizer.watch()
    start = [[float(p.detach().abs().max()) for p in pair] for pair in pairs_in(model)]
    rates = [0.01, 0.02, 0.005]
    for t, rate in enumerate(rates):
        optimizer.param_groups[0]["lr"] = rate
        train(model, optimizer, 1, start=t)
    numbers = optimizer.diagnostics()
    reach = sum(rates) + GRACE * rates[0]
    for name, pair, old in zip(("0 (default)", "2 (default)"), pairs_in(model), start, strict=True):
        for letter, p, x in zip("AB", pair, old, strict=True):
            expected = float(p.detach().abs().max()) / (x + reach)
            assert numbers[f"rlora/{name}/grown_{letter}"] == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("lr", [1e-2, torch.tensor(1e-2)], ids=["number", "tensor"])
def test_a_factor_that_grows_is_named(lr):
    model = make_model()
    optimizer = ScaledAdamW(model, lr=lr)
    optimizer.watch()
    train(model, optimizer, 2)
    assert not about("grown", optimizer.diagnostics())
    B = pairs_in(model)[1][1]
    set_largest(B, 2 * GROWN * (float(B.detach().abs().max()) + (GRACE + 3) * 1e-2))
    numbers = optimizer.diagnostics()
    (found,) = about("grown", numbers)
    assert "B of 2 (default) has grown" in found
    assert "AdamW's steps" in found
    (found,) = about("grown", optimizer.diagnostics(per_pair=False))
    assert found.startswith("B has grown")


@pytest.mark.parametrize("zero_B", [True, False])
@pytest.mark.parametrize("lr", [1e-3, 1e-2])
def test_sound_runs_are_not_said_to_grow(zero_B, lr):
    model = make_model(zero_B=zero_B)
    optimizer = ScaledAdamW(model, lr=lr)
    optimizer.watch(model)
    for t in range(30):
        train(model, optimizer, 1, start=t)
        if t in (0, 1, 2, 5, 29):
            assert not about("grown", optimizer.diagnostics())


@pytest.mark.parametrize(
    ("kind", "m", "n", "r"),
    [("AdaPreLoRA", 768, 2, 8), ("LoRARite", 2, 2, 16), ("AltLoRA", 2, 2, 16)],
)
def test_methods_that_grow_in_a_null_space_are_named(kind, m, n, r):
    """Noisy least squares with a target of rank 1: entries end at 13 to 55 times AdamW's."""
    torch.manual_seed(0)
    target = torch.randn(m, 1) @ torch.randn(1, n) * (8 / n) ** 0.5
    A = nn.Parameter(torch.randn(r, n) / n**0.5)
    B = nn.Parameter(torch.zeros(m, r))
    optimizer = METHODS[kind]([A, B], lr=4e-3, pairs=[(A, B)])
    optimizer.watch()
    for _ in range(200):
        X = torch.randn(n, 32)
        error = B @ (A @ X) - target @ X - 0.5 * torch.randn(m, 32)
        optimizer.zero_grad()
        (0.5 * (error**2).sum() / 32).backward()
        optimizer.step()
    assert about("grown", optimizer.diagnostics())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_steps_lost_in_rounding_are_named(dtype):
    """Next to 1 bfloat16 has no number nearer than 2^-8, and float16 none nearer than 2^-11.

    Only bfloat16 is rounded at random.
    """
    pair = [nn.Parameter(torch.ones(shape, dtype=dtype)) for shape in ((4, 8), (6, 4))]

    def watched(lr, gradient=1.0, rounded=False, columns=8):
        optimizer = ScaledAdamW(pair, lr=lr, stochastic_rounding=rounded, pairs=[tuple(pair)])
        optimizer.watch()
        for p in pair:
            p.grad = torch.full_like(p, gradient)
        pair[0].grad[:, columns:] = 0  # as of tokens that are in no batch
        optimizer.step()
        return optimizer.diagnostics()

    bad = watched(1e-5)
    if dtype == torch.float32:
        assert "rlora/lost_A/max" not in bad
        assert not about("lost in rounding", bad)
        return
    assert bad["rlora/lost_A/max"] == bad["rlora/lost_B/min"] == 1
    assert [x.split(" as it")[0] for x in about("lost in rounding", bad)] == [
        f"a step has left 100% of {letter}" for letter in "BA"
    ]
    assert watched(1e-5, rounded=True)["rlora/lost_A/max"] == (dtype == torch.float16)
    assert watched(torch.tensor(1e-5))["rlora/lost_A/max"] == 1
    assert watched(1e-5, columns=2)["rlora/lost_A/max"] == 1  # of what has a gradient
    assert watched(torch.tensor(0.0))["rlora/lost_A/max"] == 0
    for sound in (watched(0.0), watched(1e-5, 0.0), watched(4.0), watched(4.0, columns=1)):
        assert sound["rlora/lost_A/max"] == sound["rlora/lost_B/max"] == 0
        assert not about("lost in rounding", sound)


def test_r_above_a_side_is_named():
    model = nn.Sequential(LoRALinear(6, 10, 4), nn.Tanh(), LoRALinear(10, 3, 4))
    numbers = ScaledAdamW(model).diagnostics()
    assert [numbers[f"rlora/wide_{x}/count"] for x in "AB"] == [0, 1]
    (found,) = about("r is above", numbers)
    assert "r is above m, the outputs of the layer" in found
    assert "(1 of 2 pairs, first 2 (default))" in found
    narrow = nn.Sequential(LoRALinear(3, 10, 4))
    assert about("r is above n, the inputs of the layer", ScaledAdamW(narrow).diagnostics())
    equal = nn.Sequential(LoRALinear(4, 4, 4))
    assert not about("r is above", ScaledAdamW(equal).diagnostics())


@make
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_state_that_is_not_finite_is_named(make, value):
    """In whatever array of the state it is; and once, in a warning."""
    model = make_model()
    optimizer = make(model)
    train(model, optimizer, 2)
    good = optimizer.diagnostics()
    assert good["rlora/bad_state_A/count"] == good["rlora/bad_state_B/count"] == 0
    pair = pairs_in(model)[1]
    owners = [
        (letter, key)
        for letter, p in zip("AB", pair, strict=True)
        for key, x in optimizer.state[p].items()
        if torch.is_tensor(x) and x.is_floating_point()
    ]
    assert owners or type(optimizer).__name__ in ("RACLoRA", "RefLoRA")  # without momentum
    for letter, key in owners:
        state = optimizer.state[pair["AB".index(letter)]]
        before = state[key].clone()
        state[key][(0,) * before.ndim] = value
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)
            numbers = optimizer.diagnostics()
        assert numbers[f"rlora/2 (default)/bad_state_{letter}"] == 1, key
        assert numbers[f"rlora/bad_state_{letter}/count"] == 1
        (found,) = about("state of", numbers)
        assert f"the state of {letter} has NaN or inf" in found
        assert "first 2 (default)" in found
        state[key].copy_(before)
    assert ("nan" in optimizer._told) == bool(owners)


HUNDREDFOLD = {"ScaledSGD": ScaledSGD, **{k: METHODS[k] for k in ("RefLoRA", "LoRAProSGD")}}


@pytest.mark.parametrize("kind", HUNDREDFOLD.values(), ids=HUNDREDFOLD)
@pytest.mark.parametrize("look", ["diagnostics", "state_dict"])
@pytest.mark.filterwarnings("ignore:overflow:RuntimeWarning")
def test_a_run_that_has_become_nan_says_so_once(kind, look):
    model = make_model()
    optimizer = kind(model, lr=30.0)
    for t in range(40):
        train(model, optimizer, 1, start=t)
        if not all(torch.isfinite(p).all() for pair in pairs_in(model) for p in pair):
            break
    else:
        pytest.fail("the run was meant to diverge")
    match = rf"^{kind.__name__}: [AB] of [02] \(default\), or its state, is not finite"
    with pytest.warns(RuntimeWarning, match=match) as seen:
        getattr(optimizer, look)()
    assert [w.filename for w in seen] == [__file__]
    optimizer.diagnostics()  # a second warning would be an error
    optimizer.state_dict()


@make
def test_a_sound_run_is_saved_without_a_word(make):
    model = make_model()
    optimizer = make(model)
    optimizer.state_dict()
    train(model, optimizer, 2)
    optimizer.state_dict()
    assert "nan" not in optimizer._told
    assert "nan" not in copy.deepcopy(optimizer)._told


def test_saving_does_not_wait_for_an_accelerator(monkeypatch):
    """On fake CUDA tensors nothing is asked for."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    from rlora.cli.bench import device_ops

    with FakeTensorMode(), device_ops.without_guards():
        A, B = (torch.empty(s, device="cuda", requires_grad=True) for s in ((3, 12), (9, 3)))
        optimizer = ScaledAdamW([A, B], pairs=[(A, B)])
        asked = []
        monkeypatch.setattr(
            "rlora.torch.monitor.run_warnings.peaks", lambda tensors: asked.extend(tensors) or []
        )
        look_on_the_host(optimizer)
        assert not asked


def test_lora_sb_without_its_start():
    model = make_model(zero_B=True)
    optimizer = LoRASB(model, lr=1e-2)
    optimizer.watch(model)
    match = r"B is zero in 2 of 2 pairs, the first 0 \(default\).*method='lora_sb'\)"
    with pytest.warns(RuntimeWarning, match=match):
        train(model, optimizer, 1)
    train(model, optimizer, 2, start=1)  # once
    assert about("nothing has moved", optimizer.diagnostics())
    sound = make_model()
    optimizer = LoRASB(sound, lr=1e-2)
    optimizer.watch(sound)
    train(sound, optimizer, 3)
    assert not about("nothing has moved", optimizer.diagnostics())


def test_others_may_begin_from_zero():
    for name, kind in METHODS.items():
        if name != "LoRASB":
            model = make_model(zero_B=True, bias=False)
            optimizer = kind(model)
            optimizer.watch(model)
            train(model, optimizer, 1)
            assert not about("nothing has moved", optimizer.diagnostics()), name


@pytest.mark.parametrize("show", [diagnostics_table, findings])
def test_what_is_no_figures_is_refused(show):
    optimizer = ScaledAdamW(make_model())
    with pytest.raises(TypeError, match=r"got ScaledAdamW; give optimizer.diagnostics\(\)"):
        show(optimizer)
    with pytest.raises(TypeError, match="got list"):
        show([1.0])
    with pytest.raises(ValueError, match="with a key 'rlora/pairs', got keys 'loss'"):
        show({"loss": 1.0})


def test_names_of_peft_fit_into_the_table():
    """At 80 columns every factor has one line; what is left out of the names stands below."""
    keys = "base_model.model.model.layers.{}.{}"
    layers = [keys.format(i, x) for i in (0, 11) for x in ("self_attn.q_proj", "mlp.gate_proj")]
    tensors = [
        (f"{layer}.lora_{x}.default.weight", nn.Parameter(torch.randn(shape)))
        for layer in layers
        for x, shape in (("A", (3, 7)), ("B", (5, 3)))
    ]
    table = diagnostics_table(ScaledAdamW(tensors).diagnostics())
    out = io.StringIO()
    Console(file=out, width=80).print(table)
    lines = out.getvalue().splitlines()
    text = out.getvalue()
    for word in ("0.self_attn.", "11.mlp.", "gate_proj", "base_model.model.model.layers (default)"):
        assert word in text
    rows = lines.index(next(line for line in lines if "median" in line))
    assert rows == 4 + 2 * len(layers)
    assert [line.split()[1] for line in lines[3 : rows - 1]] == ["A", "B"] * len(layers)
    assert "base_model" not in "\n".join(lines[:rows])


def test_the_summary_has_the_middle_of_several_and_passes_over_nan():
    values = {"a": 30.0, "b": math.nan, "c": 1.0, "d": 2.0}
    rows = {name: {**dict.fromkeys(MARKS, 0.0), "step": x} for name, x in values.items()}
    found = summary(rows)
    assert [found[f"rlora/step/{key}"] for key in ("min", "median", "max")] == [1.0, 2.0, 30.0]


def test_a_pair_on_the_host_is_named_behind_one_that_is_elsewhere():
    away = tuple(torch.empty(x, device="meta", requires_grad=True) for x in ((2, 3), (4, 2)))
    here = torch.ones(2, 3, requires_grad=True), torch.full((4, 2), math.nan, requires_grad=True)
    optimizer = ScaledSGD([*away, *here], lr=0.1, pairs=[away, here])
    with pytest.warns(RuntimeWarning, match=r"B of pairs\[1\], or its state"):
        look_on_the_host(optimizer)


@pytest.mark.parametrize("frozen, told", [("A", 0), ("B", 1)])
def test_the_factor_that_stays_is_that_of_the_groups_option(frozen, told):
    model = make_model(zero_B=True, bias=False)
    optimizer = RACLoRA(model, frozen=frozen)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        train(model, optimizer, 1)
    assert ["never moves B" in str(x.message) for x in caught] == [True] * told


def test_a_step_without_gradients_does_not_put_it_on_the_rate():
    model = make_model(bias=False)
    optimizer = ScaledAdamW(model)
    optimizer.watch()
    optimizer.step()
    numbers = optimizer.diagnostics()
    assert about("has no gradient", numbers)
    assert not about("nothing has moved", numbers)


def test_a_zero_factor_is_told_of_at_a_start_alone():
    model = make_model(zero_B=True, bias=False)
    optimizer, later = (RACLoRA(model, frozen="B", adam=True) for _ in range(2))
    with pytest.warns(RuntimeWarning, match="never moves B"):
        train(model, optimizer, 1)
    later.load_state_dict(optimizer.state_dict())
    train(model, later, 1)


@pytest.mark.parametrize("kind, same", [(ScaledAdamW, False), (ScaledProdigy, True)])
def test_covariant_damping_of_a_fixed_factor_as_the_class_has_it(kind, same):
    """Classes of methods see gradients alone, and not which factor is frozen."""
    found = []
    for fixed in (False, True):
        model = make_model(bias=False)
        model.requires_grad_(False)
        for A, B in pairs_in(model):
            A.requires_grad_(True)
            B.requires_grad_(not fixed)
        optimizer = kind(model, damping_mode="covariant", damping=1.0)
        found.append(optimizer.diagnostics()["rlora/damped_cond_B/max"])
    assert (found[0] == found[1]) == same


def test_growth_is_against_the_highest_rate_of_several_groups():
    grown = []
    for others in ([], [{"lr": 0.05}], [{"lr": 0.05}, {"lr": 0.1}]):
        torch.manual_seed(0)
        layers = [LoRALinear(6, 5, 2) for _ in range(1 + len(others))]
        groups = [
            {"params": list(layer.named_parameters()), **options}
            for layer, options in zip(layers, [{"lr": 0.1}, *others], strict=True)
        ]
        optimizer = ScaledAdamW(groups)
        optimizer.watch()
        torch.stack([layer(torch.ones(3, 6)).square().sum() for layer in layers]).sum().backward()
        optimizer.step()
        numbers = optimizer.diagnostics()
        name = next(iter(optimizer.report)).name
        grown.append(numbers[f"rlora/{name}/grown_A"])
    assert grown[1:] == [grown[0], grown[0]]


@pytest.mark.parametrize("names, expected", [
    (["a.b.q (x)", "a.b.k (x)"], ("a.b.", " (x)")),
    (["a.b.q (x)", "a.c.k (y)"], ("a.", "")),
    (["a.b.q", "a.b.q.k"], ("a.b.", "")),
    (["q (v1.5)", "k (v1.5)"], ("", "")),
    (["a.q (v1.5)[0]"], ("a.", " (v1.5)[0]")),
    (["pairs[0]", "pairs[1]"], ("", "")),
    ([], ("", "")),
])  # fmt: skip
def test_what_names_have_in_common(names, expected):
    assert in_common(names) == expected


def test_no_figure_of_growth_without_watching():
    model = make_model()
    optimizer = ScaledAdamW(model)
    assert not [key for key in optimizer.diagnostics() if "grown" in key]
    loss_of(model).backward()
    assert np.isfinite(list(optimizer.diagnostics().values())).all()

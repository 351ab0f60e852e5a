"""Changes between two steps: what a checkpoint of that moment holds, and what counts from then on.

The oracle is a run without the checkpoint, or torch's AdamW.
"""

import copy
import inspect
import pickle

import pytest
import torch
from torch import nn

import rlora
import rlora.torch
from rlora import Factors, ShapeError, ShardingError
from rlora.torch import method_classes

METHODS = pytest.mark.parametrize("name", method_classes.__all__)
ALL = pytest.mark.parametrize("name", ["ScaledAdamW", "ScaledSGD", *method_classes.__all__])


def layers(count, dtype=torch.float64):
    """(name, parameter) of so many pairs of one shape."""
    g = torch.Generator().manual_seed(0)
    named = []
    for i in range(count):
        A, B = (
            torch.randn(3, 6, generator=g, dtype=dtype),
            torch.randn(5, 3, generator=g, dtype=dtype),
        )
        named += [(f"{i}.lora_A", nn.Parameter(A / 2)), (f"{i}.lora_B", nn.Parameter(B / 4))]
    return named


def set_grads(named, t):
    for name, p in named:
        g = torch.Generator().manual_seed(100 * t + 10 * int(name[0]) + "AB".index(name[-1]))
        p.grad = torch.randn(p.shape, generator=g, dtype=p.dtype)


def train(optimizer, named, steps):
    for t in steps:
        set_grads(named, t)
        optimizer.step()


def same(one, other):
    return all(torch.equal(p, q) for (_, p), (_, q) in zip(one, other, strict=True))


@pytest.mark.parametrize("options", [{}, {"placement": "before"}, {"amsgrad": True}])
@pytest.mark.parametrize("narrow", [torch.bfloat16, torch.float16])
def test_counters_do_not_have_a_narrow_default_dtype(options, narrow):
    """256 + 1 is 256 in bfloat16, and 2048 + 1 is 2048 in float16: torch's counters are float32."""
    named = layers(2, torch.float32)
    before = torch.get_default_dtype()
    torch.set_default_dtype(narrow)
    try:
        optimizer = rlora.torch.ScaledAdamW(named, lr=1e-3, **options)
        train(optimizer, named[:2], range(3))  # the second pair has never had a gradient
        saved = optimizer.state_dict()["state"]
    finally:
        torch.set_default_dtype(before)
    assert len(saved) == 4
    for held in saved.values():
        assert held["step"].dtype == torch.float32


@ALL
def test_a_checkpoint_after_a_pair_has_left_the_groups(name):
    """Names and entries of what is there now; loaded by name, each goes to its owner."""
    kind = getattr(rlora.torch, name)
    options = {"momentum": 0.9} if name == "ScaledSGD" else {}
    named = layers(3)
    optimizer = kind(named, lr=1e-2, **options)
    train(optimizer, named, range(3))
    gone = {p for _, p in named[:2]}
    for group in optimizer.param_groups:
        group["params"] = [p for p in group["params"] if p not in gone]
    for p in gone:
        optimizer.state.pop(p, None)
    saved = copy.deepcopy(optimizer.state_dict())
    assert saved["param_groups"][0]["param_names"] == [n for n, _ in named[2:]]

    twins = [(n, nn.Parameter(p.detach().clone())) for n, p in named[2:]]
    swapped = twins[2:] + twins[:2]
    resumed = kind(swapped, lr=1e-2, **options)
    resumed.load_state_dict(saved)
    train(optimizer, named[2:], [3, 4])
    train(resumed, swapped, [3, 4])
    for (_, p), (_, q) in zip(named[2:], twins, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-12, atol=1e-14)  # stacked in another order


@METHODS
def test_a_scaling_that_is_changed_counts_from_the_next_step(name):
    """And a checkpoint changes nothing: s belongs to the layer, not to the memory of training."""
    kind = getattr(rlora.torch, name)

    def run(*, edited=False, resumed=False):
        named = layers(2)
        optimizer = kind(named, lr=1e-2, scaling=1.0)
        for t in range(8):
            if t == 3 and edited:
                optimizer.param_groups[0]["scaling"] = 4.0
            if t == 5 and resumed:
                saved = copy.deepcopy(optimizer.state_dict())
                optimizer = kind(named, lr=1e-2, scaling=1.0)
                optimizer.load_state_dict(saved)
            train(optimizer, named, [t])
        return named, optimizer

    (plain, _), (edited, optimizer), (resumed, _) = (
        run(),
        run(edited=True),
        run(edited=True, resumed=True),
    )
    assert same(edited, resumed)
    with_s = any("scaling" in key.split(".") for held in optimizer.state.values() for key in held)
    counts = with_s and name != "GraftAdamW"  # whose directions have the size of Adam's
    assert same(edited, plain) != counts


@METHODS
def test_a_pair_that_is_moved_to_another_group_has_the_scaling_of_that(name):
    def run(*, moved):
        named = layers(2)
        groups = [{"params": named[:2], "scaling": 1.0}, {"params": named[2:], "scaling": 4.0}]
        optimizer = getattr(rlora.torch, name)(groups, lr=1e-2)
        train(optimizer, named, range(2))
        one, other = optimizer.param_groups
        if moved:
            one["params"], other["params"] = [], [*other["params"], *one["params"]]
        else:
            one["scaling"] = 4.0
        train(optimizer, named, range(2, 5))
        return named

    for (_, p), (_, q) in zip(run(moved=True), run(moved=False), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-12, atol=1e-14)  # on one stack, or on two


@METHODS
def test_a_scaling_out_of_range_is_refused_before_anything_moves(name):
    named = layers(2)
    optimizer = getattr(rlora.torch, name)(named, lr=1e-2, scaling=1.0)
    train(optimizer, named, range(2))
    state = copy.deepcopy(optimizer.state_dict()["state"])
    values = [(n, p.detach().clone()) for n, p in named]
    optimizer.param_groups[0]["scaling"] = -1.0
    with pytest.raises(ValueError, match="scaling"):
        train(optimizer, named, [2])
    assert same(named, values)
    now = optimizer.state_dict()["state"]
    assert all(torch.equal(x, now[i][key]) for i, held in state.items() for key, x in held.items())


def test_a_scaling_of_a_later_group_is_refused_before_the_first_counts():
    named = layers(2)
    groups = [{"params": named[:2]}, {"params": named[2:]}]
    optimizer = rlora.torch.LoRAMuon(groups, lr=1e-2, scaling=1.0)
    train(optimizer, named, range(2))
    for group, s in zip(optimizer.param_groups, (4.0, 1e39), strict=True):
        group["scaling"] = s
    with pytest.raises(ValueError, match="above what float32 holds"):
        train(optimizer, named, [2])
    kept = [x for held in optimizer.state.values() for k, x in held.items() if "scaling" in k]
    assert len(kept) == 2
    assert all(float(x) == 1.0 for x in kept)


@pytest.mark.parametrize("name", ["LoRAFA", "LoRASB", "LoRAMuon"])
def test_a_scaling_that_is_changed_counts_in_a_compiled_step(name):
    results = []
    for compiled in (False, True):
        torch._dynamo.reset()
        named = layers(2)
        optimizer = getattr(rlora.torch, name)(named, lr=1e-2, scaling=1.0)
        step = torch.compile(optimizer.step, backend="eager") if compiled else optimizer.step
        for t in range(4):
            if t == 2:
                optimizer.param_groups[0]["scaling"] = 4.0
            set_grads(named, t)
            step()
        results.append(named)
    torch._dynamo.reset()
    for (_, p), (_, q) in zip(*results, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-10, atol=1e-12)  # float64, summed otherwise


def test_a_save_does_not_change_the_run():
    """Not even while somebody has taken a pair out of its group for a moment."""
    results = []
    for saved in (False, True):
        named = layers(2)
        optimizer = rlora.torch.LoRARite(named, lr=1e-2)
        train(optimizer, named, range(2))
        group = optimizer.param_groups[0]
        whole = group["params"]
        group["params"] = whole[2:]
        held = {p: optimizer.state.pop(p) for p in whole[:2]}  # torch saves none of others
        if saved:
            optimizer.state_dict()
        group["params"] = whole
        optimizer.state.update(held)
        train(optimizer, named, [2, 3])
        results.append(named)
        assert len(optimizer.report.pairs) == 2
    assert same(*results)


def test_a_save_after_others_have_put_their_parameters_in_the_place_of_pairs():
    """Saving refuses nothing, and the next step says what is wrong, as often as it is asked."""
    named = layers(2)
    optimizer = rlora.torch.ScaledAdamW(named, lr=1e-2)
    train(optimizer, named, range(2))
    group = optimizer.param_groups[0]
    flat = nn.Parameter(torch.cat([p.detach().view(-1) for _, p in named]))
    group["params"] = [flat]
    optimizer.state.clear()
    optimizer.state_dict()
    flat.grad = torch.ones_like(flat)
    for _ in range(2):
        with pytest.raises(rlora.ShardingError, match="ZeRO"):
            optimizer.step()
    group["params"] = [p for _, p in named]
    assert optimizer.state_dict()["param_groups"][0]["param_names"] == [n for n, _ in named]


def test_a_method_of_ones_own_does_not_notice_autocast():
    def init(params, scaling=1.0):
        return ()

    def update(grads, state, params):
        moves = {k: Factors(p.B.mT @ (p.B @ grads[k].A), grads[k].B) for k, p in params.items()}
        return moves, state

    def mine():
        return rlora.chain(rlora.Transform(init, update))

    kind, results = rlora.torch.optimizer_class(mine), []
    for lower in (False, True):
        named = layers(2, torch.float32)
        optimizer = kind(named, lr=1e-2)
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=lower):
            train(optimizer, named, range(2))
        results.append(named)
    assert same(*results)


@pytest.mark.parametrize("options", [{}, {"foreach": True}, {"placement": "before"}])
def test_an_optimizer_and_the_one_that_loaded_its_state_count_apart(options):
    named, twins = layers(2), layers(2)
    first = torch.optim.AdamW(named, lr=1e-2)
    train(first, named, range(3))
    second = rlora.torch.ScaledAdamW(twins, lr=1e-2, **options)
    second.load_state_dict(first.state_dict())
    for t in range(3, 6):
        train(first, named, [t])
        train(second, twins, [t])
    assert {float(held["step"]) for held in first.state.values()} == {6.0}
    assert {float(held["step"]) for held in second.state.values()} == {6.0}


def tied():
    """Two layers whose factors share memory as two parameters each, as PEFT ties embeddings."""
    named = [(f"q.lora_{name[-1]}", p) for name, p in layers(1)]
    return nn.ParameterDict(
        {key.replace(".", "_"): p for key, p in named}
        | {key.replace("q.", "k_"): nn.Parameter(p.data) for key, p in named}
    )


@pytest.mark.parametrize("name", ["ScaledAdamW", "ScaledSGD", "LoRARite", "LoRAPlus"])
@pytest.mark.parametrize("how", ["move", "copy"])
def test_tied_factors_that_come_apart_are_stepped_each(how, name):
    """As by an optimizer that is built afterwards; `Module.to` and `deepcopy` untie parameters."""

    def named(model):
        return [(key.replace("_", ".", 1), p) for key, p in model.items()]

    def grads(model, t):
        g = torch.Generator().manual_seed(t)
        for p in model.values():
            p.grad = torch.randn(p.shape, generator=g, dtype=torch.float64).to(p.dtype)

    model = tied()
    optimizer = getattr(rlora.torch, name)(named(model), lr=1e-2)
    assert len(optimizer.report.tied) == 2
    if how == "copy":
        model, optimizer = copy.deepcopy((model, optimizer))
    else:
        model.to(torch.float32)
    other = copy.deepcopy(model)
    fresh = getattr(rlora.torch, name)(named(other), lr=1e-2)
    grads(model, 0)
    with pytest.warns(RuntimeWarning, match=r"lora_A was tied to .\.lora_A and has memory of its"):
        optimizer.step()
    assert optimizer.report.tied == {}
    grads(other, 0)
    fresh.step()
    for t in (1, 2):
        for run, some in ((model, optimizer), (other, fresh)):
            grads(run, t)
            some.step()
    for p, q in zip(model.values(), other.values(), strict=True):
        torch.testing.assert_close(p, q, rtol=0, atol=1e-6 if how == "move" else 1e-14)


@pytest.mark.parametrize("name", ["ScaledAdamW", "ScaledSGD", "LoRAPlus", "LoRARite"])
def test_a_rank_cut_in_the_same_memory_is_refused(name):
    named = layers(2)
    optimizer = getattr(rlora.torch, name)(named, lr=1e-2, **MOMENTUM.get(name, {}))
    train(optimizer, named, range(2))
    for key, p in named:
        p.grad, p.data = None, p.data[:2] if key.endswith("A") else p.data[:, :2]
    before = [p.detach().clone() for _, p in named]
    set_grads(named, 2)
    with pytest.raises(ShardingError, match="has become one of"):
        optimizer.step()
    assert all(torch.equal(p, old) for (_, p), old in zip(named, before, strict=True))


MOMENTUM = {"ScaledSGD": {"momentum": 0.9}}


NONSENSE = {
    "weight_decay": -1.0,
    "betas": (0.9, 1.5),
    "damping": float("nan"),
    "lr": -1.0,
    "damping_mode": "abs",
    "placement": "foo",
    "compute_dtype": "float16",
}


@pytest.mark.parametrize(
    "name, option",
    [
        (name, option)
        for name in ["ScaledAdamW", "ScaledSGD", *method_classes.__all__]
        for option in NONSENSE
        if option in inspect.signature(getattr(rlora.torch, name)).parameters
    ],
)
@pytest.mark.parametrize("how", ["step", "load"])
def test_an_option_that_makes_no_sense_is_refused_before_anything_moves(how, name, option):
    """One of the last group, set by hand after a step, or in a file."""
    named = layers(2)
    optimizer = getattr(rlora.torch, name)([{"params": named[:2]}, {"params": named[2:]}], lr=1e-2)
    train(optimizer, named, range(1))
    before, saved = [p.detach().clone() for _, p in named], optimizer.state_dict()
    set_grads(named, 1)
    group = (optimizer.param_groups if how == "step" else saved["param_groups"])[1]
    group[option] = NONSENSE[option]
    word = "b2|betas" if option == "betas" else option.split("_")[0]
    with pytest.raises((ValueError, TypeError), match=word):
        optimizer.step() if how == "step" else optimizer.load_state_dict(saved)
    assert all(torch.equal(p, old) for (_, p), old in zip(named, before, strict=True))


OTHERS = ["Adamax", "RMSprop", "Adagrad", "Adadelta", "ASGD", "Adafactor", "Rprop"]


@pytest.mark.parametrize("name", ["ScaledAdamW", "LoRARite", "LoRAPlus", "LoRAMuon"])
@pytest.mark.parametrize("other", OTHERS)
def test_the_state_of_others_of_torch_is_refused(other, name):
    """They count steps under AdamW's name, beside moments of their own."""
    named = layers(1)
    theirs = getattr(torch.optim, other)([p for _, p in named], lr=1e-3)
    train(theirs, named, range(2))
    optimizer = getattr(rlora.torch, name)(named, lr=1e-3)
    with pytest.raises((ShapeError, ValueError, TypeError)):
        optimizer.load_state_dict(theirs.state_dict())
    assert not optimizer.state


class Told(nn.Module):
    """A layer that says its s, and the number of its experts."""

    def __init__(self, seed, adapter):
        super().__init__()
        g = torch.Generator().manual_seed(seed)
        self.lora_A, self.lora_B = nn.ModuleDict(), nn.ModuleDict()
        self.lora_A[adapter] = nn.Linear(5, 6, bias=False)
        self.lora_B[adapter] = nn.Linear(6, 7, bias=False)
        self.scaling, self.num_experts, self.parameter_name = {adapter: 8.0}, 2, "weight"
        self.weight = nn.Parameter(torch.zeros(7, 5), requires_grad=False)
        for p in (self.lora_A[adapter].weight, self.lora_B[adapter].weight):
            p.data = torch.randn(p.shape, generator=g)


@ALL
@pytest.mark.parametrize("how", ["names", "model", "names, the model in a group"])
def test_an_adapter_of_a_later_layer_has_the_layout_and_s_that_the_layer_says(how, name):
    """As for an optimizer that is built after it."""
    if name == "LoRASB":
        pytest.skip("it has factors of its own")
    kind, ends = getattr(rlora.torch, name), []
    for fresh in (True, False):
        model = nn.ModuleDict({"first": Told(0, "one")})
        if not fresh:
            given = [{"params": model}] if how.endswith("group") else model
            optimizer = kind(given, lr=1e-2)
        new = nn.ModuleDict() if how == "model" else model
        new["late"] = Told(1, "two")
        added = [(key, p) for key, p in new.named_parameters() if ".two." in key]
        if fresh:
            optimizer = kind(new, lr=1e-2)
        else:
            optimizer.add_param_group({"params": new if how == "model" else added, "lr": 1e-2})
        pairs = [pair for pair in optimizer.report if "two" in pair.name]
        assert [pair.rank for pair in pairs] == [3]  # and not one product of rank 6
        for t in range(3):
            for key, p in added:
                g = torch.Generator().manual_seed(10 * t + len(key))
                p.grad = torch.randn(p.shape, generator=g)
            optimizer.step()
        ends.append([p.detach().clone() for _, p in added])
    for x, y in zip(*ends, strict=True):
        # float32; stacks of other sizes are summed in another order.
        torch.testing.assert_close(x, y, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("way", ["deepcopy", "pickle"])
@ALL
def test_a_copy_after_other_parameters_have_come_into_the_groups(name, way):
    """Libraries put other tensors, with the state, in the places of parameters."""
    named = layers(2)
    optimizer = getattr(rlora.torch, name)(named, lr=1e-2)
    train(optimizer, named, range(2))
    group = optimizer.param_groups[0]
    for i, (n, p) in enumerate(named):
        group["params"][i] = q = nn.Parameter(p.detach().clone())
        if p in optimizer.state:
            optimizer.state[q] = optimizer.state.pop(p)
        named[i] = n, q
    clone = copy.deepcopy if way == "deepcopy" else lambda x: pickle.loads(pickle.dumps(x))
    copied, twins = clone((optimizer, named))
    train(optimizer, named, [2, 3])
    train(copied, twins, [2, 3])
    assert same(named, twins)


@pytest.mark.parametrize("tie", [False, True])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@ALL
def test_factors_of_the_other_16_bit_dtype_do_not_notice_autocast(name, dtype, tie):
    """Autocast refuses to stack them."""
    other, results = {torch.float16, torch.bfloat16} - {dtype}, []
    for lower in (False, True):
        named = layers(2, dtype)
        if tie:
            named += [(n.replace("0", "2"), nn.Parameter(p.data)) for n, p in named[:2]]
        optimizer = getattr(rlora.torch, name)(named, lr=1e-2)
        with torch.autocast("cpu", dtype=next(iter(other)), enabled=lower):
            train(optimizer, named, range(2))
            optimizer.state_dict()
        results.append(named)
    assert same(*results)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@ALL
def test_a_learning_rate_in_float64_with_an_axis_does_not_widen_a_step(name, dtype):
    results = []
    for lr in (torch.tensor(1e-2, dtype=torch.float64), torch.tensor([1e-2], dtype=torch.float64)):
        named = layers(2, dtype)
        train(getattr(rlora.torch, name)(named, lr=lr), named, range(3))
        results.append(named)
    assert same(*results)


@pytest.mark.parametrize("shape", [(2,), (2, 1, 1)])
@ALL
def test_several_rates_in_one_group_are_refused(name, shape):
    """Torch looks at the one of the constructor alone; a stack of two layers would take them."""
    named = layers(2)
    optimizer = getattr(rlora.torch, name)(named, lr=1e-2)
    optimizer.param_groups[0]["lr"] = torch.full(shape, 1e-2)
    before = [p.detach().clone() for _, p in named]
    with pytest.raises(rlora.ShapeError, match="one number for all of a group"):
        train(optimizer, named, range(1))
    assert all(torch.equal(p, x) for (_, p), x in zip(named, before, strict=True))

"""The next step uses `optimizer.state` as it stands, for every class and however it got there.

The oracle is another optimizer that was never used: fresh, or loaded with the state in question.
"""

import copy
import gc
import warnings
import weakref
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import pytest
import torch
from models import CLASSES, LoRALinear, loss_of, make_model, pairs_in, same, train, values
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_state_dict,
    set_state_dict,
)

import rlora
import rlora.torch
from rlora import Factors
from rlora.core.state import flatten_state, unflatten_state
from rlora.torch import RACLoRA, precondition
from rlora.torch.step import method_batch

make = pytest.mark.parametrize("make", CLASSES.values(), ids=CLASSES)
CONSTANT = {"scaling", "0.scaling", "inverse", "frame"}
"""Entries that a method was given, not ones that it accumulates."""


def tensors(optimizer):
    """(state of a parameter, key, tensor), without constants."""
    return [
        (held, key, x)
        for held in optimizer.state.values()
        for key, x in held.items()
        if isinstance(x, torch.Tensor) and key not in CONSTANT
    ]


def clear(optimizer, model):
    optimizer.state.clear()


def pop_factors(optimizer, model):
    for p in (p for pair in pairs_in(model) for p in pair):
        optimizer.state.pop(p, None)


def pop_one_factor(optimizer, model):
    for p in pairs_in(model)[0][:1]:
        optimizer.state.pop(p, None)


def zero_in_place(optimizer, model):
    for _, _, x in tensors(optimizer):
        x.zero_()


def zero_by_others(optimizer, model):
    for held, key, x in tensors(optimizer):
        held[key] = torch.zeros_like(x)


def double_in_place(optimizer, model):
    for _, key, x in tensors(optimizer):
        if key.endswith(("mu", "exp_avg", "momentum_buffer")):
            x.mul_(2)


def away_and_back(optimizer, model):
    """As an offload to a CPU does."""
    for held, key, x in tensors(optimizer):
        held[key] = x.cpu().clone()


def data_away_and_back(optimizer, model):
    """As recipes that move an optimizer to another device do: the tensors stay the same objects."""
    for _, _, x in tensors(optimizer):
        x.data = x.data.cpu().clone()


def data_of_zeros(optimizer, model):
    for _, _, x in tensors(optimizer):
        x.data = torch.zeros_like(x)


def turned_around(optimizer, model):
    """Each layer has the state of the next one of its shapes."""
    alike = {}
    for p, held in optimizer.state.items():
        alike.setdefault((p.shape, *held), []).append(p)
    for members in alike.values():
        states = [optimizer.state[p] for p in members]
        for p, held in zip(members, states[1:] + states[:1], strict=True):
            optimizer.state[p] = held


def another_dict(optimizer, model):
    optimizer.state = copy.copy(optimizer.state)
    for p, held in optimizer.state.items():
        optimizer.state[p] = {key: copy.deepcopy(x) for key, x in held.items()}


def never_used(make, model, optimizer):
    """A copy of the model, and an optimizer that was loaded with the state alone."""
    twin = copy.deepcopy(model)
    other = make(twin)
    successor = dict(zip(model.parameters(), twin.parameters(), strict=True))
    for p, held in optimizer.state.items():
        other.state[successor[p]] = copy.deepcopy(held)
    for group, old in zip(other.param_groups, optimizer.param_groups, strict=True):
        group.update({k: copy.deepcopy(value) for k, value in old.items() if k != "params"})
    return twin, other


def assert_same_states(one, other):
    found, expected = one.state_dict()["state"], other.state_dict()["state"]
    assert found.keys() == expected.keys()
    for i, held in expected.items():
        assert found[i].keys() == held.keys()
        for key, x in held.items():
            torch.testing.assert_close(found[i][key], x, rtol=0, atol=0)


CHANGES = (
    clear, pop_factors, pop_one_factor, zero_in_place, zero_by_others, double_in_place,
    away_and_back, data_away_and_back, data_of_zeros, turned_around, another_dict,
)  # fmt: skip


def equal_layers():
    """Layers of one shape, which lie on one stack: each is another's neighbour in memory."""
    torch.manual_seed(0)
    model = nn.Sequential(*(LoRALinear(n, m, 4) for n, m in ((6, 6), (6, 6), (6, 6), (6, 8))))
    for _, B in pairs_in(model):
        nn.init.normal_(B, std=0.3)
    return model


@make
@pytest.mark.parametrize(
    "make_it",
    [make_model, partial(make_model, dtype=torch.bfloat16), equal_layers],
    ids=["float32", "bfloat16", "equal layers"],
)
def test_the_next_step_uses_what_is_in_the_state(make, make_it):
    """And later checkpoints hold what later steps have made of it."""
    model = make_it()
    optimizer = make(model)
    train(model, optimizer, 3)
    for k, change in enumerate(CHANGES):
        change(optimizer, model)
        twin, other = never_used(make, model, optimizer)
        for t in (2 * k, 2 * k + 1):
            train(model, optimizer, 1, start=t)
            train(twin, other, 1, start=t)
            assert same(values(model), values(twin)), change.__name__
            assert all(p.isfinite().all() for p in model.parameters()), change.__name__
        assert_same_states(optimizer, other)


@make
def test_a_cleared_state_is_a_fresh_start(make):
    model = make_model()
    optimizer = make(model)
    train(model, optimizer, 3)
    optimizer.state.clear()
    twin = copy.deepcopy(model)
    other = make(twin)
    train(model, optimizer, 3)
    train(twin, other, 3)
    assert same(values(model), values(twin))
    assert_same_states(optimizer, other)


@pytest.mark.parametrize("portion", [1, method_batch.PORTION])
@pytest.mark.parametrize("name", ["lora_rite", "lora_plus", "riemannion", "alt_lora", "lora_sb"])
def test_replaced_tensors_against_the_functional_method(name, portion, monkeypatch):
    """Each moment of a pair is halved, here in the state of a function and there in the class's."""
    monkeypatch.setattr(method_batch, "PORTION", portion)
    torch.manual_seed(0)
    pairs = [
        (torch.randn(2, 6, dtype=torch.float64), torch.randn(5, 2, dtype=torch.float64))
        for _ in range(3)
    ]
    tensors = [p.requires_grad_() for pair in pairs for p in pair]
    method = getattr(rlora, name)()
    kind = rlora.torch.optimizer_class(getattr(rlora, name))
    optimizer = kind(tensors, lr=1e-2, pairs=pairs)
    params = [Factors(*(p.detach().clone() for p in pair)) for pair in pairs]
    state = method.init(params)
    for t in range(4):
        for p in tensors:
            p.grad = torch.randn_like(p)
        grads = [Factors(a.grad, b.grad) for a, b in pairs]
        if t == 2:
            flat = flatten_state(state)
            halved = {k: x / 2 if "mu" in k.split(".") else x for k, x in flat.items()}
            state = unflatten_state(halved, state)
            for p in tensors:
                held = optimizer.state[p]
                held.update({k: x / 2 for k, x in held.items() if "mu" in k.split(".")})
        optimizer.step()
        params, state = rlora.step(method, params, grads, state, 1e-2)
    for pair, expected in zip(pairs, params, strict=True):
        for p, x in zip(pair, expected, strict=True):
            torch.testing.assert_close(p.detach(), x, rtol=0, atol=1e-12)  # other order of sums


def test_a_tensor_of_another_shape_is_refused_before_anything_moves(monkeypatch):
    monkeypatch.setattr(method_batch, "PORTION", 1)
    model = make_model()
    optimizer = CLASSES["LoRARite"](model)
    train(model, optimizer, 1)
    before = values(model)
    for A, _ in pairs_in(model)[1:]:
        optimizer.state[A]["mu"] = torch.zeros(3)
    with pytest.raises(rlora.ShapeError, match=r"\(3,\) as 'mu'.*expected.*\(4, 10\)"):
        train(model, optimizer, 1)
    assert same(before, values(model))


@pytest.mark.parametrize("name", ["adamw", "LoRARite"])
def test_a_refused_state_stays_as_it_was_put_there(name):
    """Entries before the wrong one have not been taken over by halves."""
    model = make_model()
    optimizer = CLASSES[name](model)
    train(model, optimizer, 2)
    sides = [[optimizer.state[pair[side]] for pair in pairs_in(model)] for side in (0, 1)]
    key = next(key for key in sides[0][0] if key in ("mu", "exp_avg"))
    for first, last in sides:
        first[key] = torch.full_like(first[key], 0.5)
        last[key] = torch.zeros(3)
    given = [held[key] for side in sides for held in side]
    with pytest.raises(rlora.ShapeError, match=r"\(3,\) as"):
        train(model, optimizer, 1)
    assert all(x is y for x, y in zip([h[key] for side in sides for h in side], given, strict=True))


# --- torch.distributed.checkpoint -----------------------------------------------------------------


def freeze(letter):
    def of(model):
        for pair in pairs_in(model):
            pair["AB".index(letter)].requires_grad_(False)

    return of


def all_of_it(model):
    """Nothing is frozen."""


def with_options(kind, **options):
    return lambda m: getattr(rlora.torch, kind)(m, lr=1e-2, **options)


STATELESS = {
    "ScaledSGD": with_options("ScaledSGD"),
    "LoRAProSGD momentum": with_options("LoRAProSGD", momentum=0.9),
    "RefLoRA momentum": with_options("RefLoRA", momentum=0.9),
    "LoRAMuon without": with_options("LoRAMuon", b1=0.0),
    "AdaPreLoRA without": with_options("AdaPreLoRA", betas=(0.0, 0.999)),
    "RACLoRA Adam": with_options("RACLoRA", adam=True),
    "RACLoRA B": with_options("RACLoRA", frozen="B"),
    "LoRAProAdamW full": with_options("LoRAProAdamW", mode="full"),
    "LoRARite all": with_options("LoRARite", balance=True, escape=True, max_norm=1.0),
    "rounded": with_options("LoRARite", stochastic_rounding=True),
    "ScaledAdamW rounded": with_options("ScaledAdamW", stochastic_rounding=True),
}


@pytest.mark.parametrize("maker", (CLASSES | STATELESS).values(), ids=CLASSES | STATELESS)
@pytest.mark.parametrize("frozen", [all_of_it, freeze("A"), freeze("B")], ids=["", "A", "B"])
def test_get_and_set_state_dict_go_on_bit_for_bit(maker, frozen):
    """By parameter and flat, with a bfloat16 model, whose roundings nothing may change."""
    if maker in (CLASSES["OPLoRA"], CLASSES["Riemannion"]) and frozen is not all_of_it:
        pytest.skip("its momentum is of the pair, and torch loads no state of a frozen parameter")
    model = make_model(dtype=torch.bfloat16)
    frozen(model)
    optimizer = maker(model)
    train(model, optimizer, 3)
    forms = [StateDictOptions(flatten_optimizer_state_dict=flat) for flat in (False, True)]
    saved = [copy.deepcopy(get_state_dict(model, optimizer, options=form)) for form in forms]
    at_the_save = values(model)
    expected = train(model, optimizer, 2, start=3)
    for form, (weights, state) in zip(forms, saved, strict=True):
        again = make_model(seed=9, dtype=torch.bfloat16)
        frozen(again)
        resumed = maker(again)
        set_state_dict(
            again, resumed, model_state_dict=weights, optim_state_dict=state, options=form
        )
        assert same(at_the_save, values(again))
        assert train(again, resumed, 2, start=3) == expected
        assert same(values(model), values(again))


@make
def test_every_entry_of_a_state_lies_in_order(make):
    """Torch's full checkpoints broadcast it as it lies, to processes that have made it in order."""
    model = make_model()
    optimizer = make(model)
    train(model, optimizer, 1)
    assert all(x.is_contiguous() for _, _, x in tensors(optimizer))


@make
@pytest.mark.parametrize("full", [False, True])
def test_a_parameter_that_never_had_a_gradient_does_not_stop_a_resume(make, full):
    model = make_model()
    model.append(nn.Identity())
    model[4].unused = nn.Parameter(torch.ones(3))
    optimizer = make(model)
    train(model, optimizer, 2)
    if full and not any(x.ndim for held in optimizer.state.values() for x in held.values()):
        pytest.skip("torch asks for the device of arrays in the state, and there are none")
    form = StateDictOptions(full_state_dict=full, cpu_offload=full)
    saved, state = copy.deepcopy(get_state_dict(model, optimizer, options=form))
    again = copy.deepcopy(model)
    resumed = make(again)
    put = partial(set_state_dict, again, resumed, model_state_dict=saved, optim_state_dict=state)
    if isinstance(optimizer, torch.optim.NAdam):  # its first state is not known: as torch's own
        with pytest.raises(RuntimeError, match=r"Missing optimizer state .*unused"):
            put(options=form)
        return
    put(options=form)
    for m, o in ((model, optimizer), (again, resumed)):
        m.zero_grad()
        m[4].unused.grad = torch.ones(3)  # its first
        o.step()
    assert torch.equal(model[4].unused, again[4].unused)
    assert train(again, resumed, 2, start=2) == train(model, optimizer, 2, start=2)


@pytest.mark.parametrize(
    "options, begins",
    [
        ({"momentum": 0.9}, ["momentum_buffer"]),
        ({"momentum": 0.0}, []),
        ({"momentum": 0.9, "dampening": 0.5}, None),
    ],
)
def test_the_first_momentum_is_that_of_the_group(options, begins):
    """No gradient has come. Under dampening torch begins with a whole one: no zeros do."""
    pairs = [[nn.Parameter(torch.randn(shape)) for shape in [(2, 4), (3, 2)]] for _ in range(2)]
    groups = [{"params": pairs[0], "momentum": 0.9}, {"params": pairs[1], **options}]
    optimizer = rlora.torch.precondition(torch.optim.SGD)(groups, lr=0.1, pairs=pairs)
    for p in pairs[0]:
        p.grad = torch.ones_like(p)
    optimizer.step()
    found = optimizer.state_dict()["state"].get(2)
    assert (found if found is None else list(found)) == begins


def test_a_frozen_factor_has_no_state_in_a_file():
    """Beside one that waits for its first gradient, whose first state is there."""
    pairs = [[nn.Parameter(torch.randn(shape)) for shape in [(2, 4), (3, 2)]] for _ in range(2)]
    frozen, _ = pairs[1]
    frozen.requires_grad_(False)
    optimizer = rlora.torch.ScaledAdamW([p for pair in pairs for p in pair], pairs=pairs)
    for p in pairs[0]:
        p.grad = torch.ones_like(p)
    optimizer.step()
    assert sorted(optimizer.state_dict()["state"]) == [0, 1, 3]


class Counting(torch.optim.Adam):
    """Begins its own state beside Adam's, where there is none yet."""

    def step(self, closure=None):
        params = [p for group in self.param_groups for p in group["params"] if p.grad is not None]
        first = [p for p in params if not self.state[p]]
        super().step(closure)
        for p in first:
            self.state[p]["seen"] = torch.zeros(())
        for p in params:
            self.state[p]["seen"] += 1


def test_a_class_with_a_step_of_its_own_has_no_first_state_that_is_known():
    """That of the class of torch below it would be taken for a whole one."""
    model = make_model()
    optimizer = precondition(Counting)(model, lr=1e-2)
    freeze("A")(model)  # of a state, and without one now
    train(model, optimizer, 1)
    for a, _ in pairs_in(model):
        a.requires_grad_(True)
    again = copy.deepcopy(model)
    resumed = precondition(Counting)(again, lr=1e-2)
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert train(again, resumed, 2, start=1) == train(model, optimizer, 2, start=1)
    assert same(values(model), values(again))
    assert [int(resumed.state[p]["seen"]) for p in pairs_in(again)[0]] == [2, 3]


def test_what_a_pair_has_once_follows_the_factor_that_trains():
    """A frozen meanwhile, and freed again: the moments of the product go on."""
    model, twin = make_model(dtype=torch.float64), make_model(dtype=torch.float64)
    maker = with_options("LoRAProAdamW", mode="full")
    optimizer, other = maker(model), maker(twin)
    A, B = pairs_in(model)[0]
    for o, m in ((optimizer, model), (other, twin)):
        train(m, o, 2)
    freeze("A")(model)
    for t in (2, 3):
        train(model, optimizer, 1, start=t)
        twin.zero_grad()
        loss_of(twin, t % 3).backward()  # its A has no gradient, but is not frozen
        for a, _ in pairs_in(twin):
            a.grad = None
        other.step()
    assert "mu" in optimizer.state[B]
    assert "mu" not in optimizer.state[A]
    for a, _ in pairs_in(model):
        a.requires_grad_(True)
    for o, m in ((optimizer, model), (other, twin)):
        train(m, o, 2, start=4)
    assert "mu" in optimizer.state[A]
    assert "mu" not in optimizer.state[B]
    assert same(values(model), values(twin))


# --- a learning rate of 0 -------------------------------------------------------------------------

DECAYED = {
    "LoRARite balanced": with_options("LoRARite", balance=True, weight_decay=0.1),
    "Riemannion decayed": with_options("Riemannion", weight_decay=0.1),
    "LoRAMuon decayed": with_options("LoRAMuon", weight_decay=0.1),
    "LoRAFA after": with_options("LoRAFA", weight_decay=0.1, decay="after", eps_form="hf"),
    "LoRAProAdamW full": with_options("LoRAProAdamW", mode="full", weight_decay=0.1),
    "ScaledSGD decayed": with_options("ScaledSGD", weight_decay=0.1, momentum=0.9),
}
ALL = CLASSES | DECAYED


@pytest.mark.parametrize("maker", ALL.values(), ids=ALL)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.filterwarnings("ignore:.*lora_sb:RuntimeWarning")  # B is 0
def test_a_rate_of_0_moves_nothing(maker, dtype):
    """From a fresh start, from B = 0, and in mid-run; as a number and as a tensor."""
    number, tensor = 0.0, torch.tensor(0.0)
    for zero_B, zeros in ((False, (number, tensor)), (True, (tensor, number))):
        # No head in float16: torch's own Adam divides by an eps of 0 there.
        model = make_model(dtype=dtype, zero_B=zero_B, bias=dtype != torch.float16)
        optimizer = maker(model)
        for steps in (0, 3):
            train(model, optimizer, steps)
            rates = [group["lr"] for group in optimizer.param_groups]
            before = values(model)
            for t, lr in enumerate((*zeros, zeros[0])):
                for group in optimizer.param_groups:
                    group["lr"] = lr
                train(model, optimizer, 1, start=t)
            for group, rate in zip(optimizer.param_groups, rates, strict=True):
                group["lr"] = rate
            assert same(before, values(model))


@pytest.mark.parametrize("maker", ALL.values(), ids=ALL)
def test_a_rate_of_0_rounds_nothing(maker):
    model = make_model(dtype=torch.bfloat16)
    options = {} if maker in DECAYED.values() else {"stochastic_rounding": True}
    optimizer = maker(model, **options)
    for group in optimizer.param_groups:
        group["lr"], group["stochastic_rounding"] = 0.0, True
    before = values(model)
    train(model, optimizer, 5)
    assert same(before, values(model))


# --- schedulers -----------------------------------------------------------------------------------

CYCLES = {
    "OneCycleLR": lambda o: torch.optim.lr_scheduler.OneCycleLR(o, 1e-2, total_steps=10),
    "CyclicLR": lambda o: torch.optim.lr_scheduler.CyclicLR(
        o, 1e-3, 1e-2, step_size_up=5, cycle_momentum=True
    ),
}


@pytest.mark.parametrize("cycle", CYCLES.values(), ids=CYCLES)
@make
def test_a_schedule_of_momentum_counts_or_is_refused(make, cycle):
    """The momentum that is cycled is the one the method takes, or torch says that there is none."""
    model = make_model()
    optimizer = make(model)
    options = getattr(optimizer, "_options", {"betas": 0, "momentum": 0})
    if not {"betas", "momentum"} & options.keys() or not optimizer.param_groups[0].get(
        "adam", True
    ):
        with pytest.raises(ValueError, match="must support momentum"):
            cycle(optimizer)
        extra = nn.Parameter(torch.ones(3))  # the parent's own numbers are still there
        optimizer.add_param_group({"params": [("extra", extra)]})
        train(model, optimizer, 1)
        return
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        schedule = cycle(optimizer)
        seen = set()
        for _ in range(4):
            train(model, optimizer, 1)
            schedule.step()
            group = optimizer.param_groups[0]
            if hasattr(optimizer, "_chosen"):
                chosen = optimizer._chosen(group)
                seen.add(chosen.get("b1", chosen.get("momentum")))
            else:
                seen.add(group["betas"][0] if "betas" in group else group["momentum"])
    assert len(seen) > 1


def test_a_schedule_of_momentum_counts_where_adam_is_asked_for():
    """RACLoRA has Adam on request, and its betas do nothing without."""
    optimizer = RACLoRA(make_model(), adam=True, betas=(0.5, 0.9))
    CYCLES["OneCycleLR"](optimizer)
    assert optimizer.param_groups[0]["betas"] == (0.95, 0.9)


# --- methods of a parent beside `step` ------------------------------------------------------------


class Averaging(torch.optim.Optimizer):
    """Steps at y, between z and its average x, and shows x on request, as schedule-free ones do."""

    def __init__(self, params, lr=1e-2, beta=0.9):
        super().__init__(params, {"lr": lr, "beta": beta, "train_mode": True, "k": 0})

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            assert group["train_mode"]
            group["k"] += 1
            for y in (p for p in group["params"] if p.grad is not None):
                if "z" not in self.state[y]:
                    self.state[y]["z"] = torch.clone(y)
                z = self.state[y]["z"]
                y.lerp_(end=z, weight=1 / group["k"])
                y.add_(y.grad, alpha=-group["lr"] * (1 - group["beta"] * (1 - 1 / group["k"])))
                z.sub_(y.grad, alpha=group["lr"])

    @torch.no_grad()
    def eval(self):
        self.turn(False, lambda beta: 1 - 1 / beta)

    @torch.no_grad()
    def train(self):
        self.turn(True, lambda beta: 1 - beta)

    def turn(self, mode, weight):
        for group in self.param_groups:
            if group["train_mode"] != mode:
                for p in group["params"]:
                    if "z" in self.state[p]:
                        p.lerp_(end=self.state[p]["z"], weight=weight(group["beta"]))
                group["train_mode"] = mode

    def gradients_too(self):
        return [p.grad.dtype for group in self.param_groups for p in group["params"]]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_other_methods_of_the_parent(dtype):
    """`eval` and `train` see factors as wide as the state; the factors get the rounded result."""
    model = nn.Sequential(LoRALinear(6, 10, 4, dtype), nn.Tanh(), LoRALinear(10, 8, 4, dtype))
    optimizer = precondition(Averaging)(model)
    train(model, optimizer, 4)
    y = values(model)
    expected = {
        name: p.detach().float().lerp(optimizer.state[p]["z"], 1 - 1 / 0.9).to(dtype)
        for name, p in model.named_parameters()
        if p in optimizer.state
    }
    grads = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    optimizer.eval()
    assert len(expected) == 4
    x = values(model)
    assert all(torch.equal(x[name], expected[name]) for name in expected)
    assert not optimizer.param_groups[0]["train_mode"]
    assert {s["z"].dtype for s in optimizer.state.values()} == {torch.float32}
    optimizer.train()
    back = values(model)
    for name in y:
        # two roundings, the first of which is carried back by 1 / (1 - beta) of its size
        torch.testing.assert_close(back[name], y[name], rtol=0, atol=20 * torch.finfo(dtype).eps)
    assert all(
        torch.equal(p.grad, g)
        for p, g in zip((p for p in model.parameters() if p.grad is not None), grads, strict=True)
    )
    assert set(optimizer.gradients_too()) == {torch.float32}
    optimizer.zero_grad()
    optimizer.eval()
    assert optimizer.param_groups[0]["k"] == 4
    optimizer.train()
    train(model, optimizer, 1)


def test_state_that_a_parent_makes_at_once_is_wide_too():
    model = make_model(dtype=torch.bfloat16, bias=False)
    optimizer = precondition(torch.optim.Adagrad)(model, lr=1e-2)
    train(model, optimizer, 2)
    assert {s["sum"].dtype for s in optimizer.state.values()} == {torch.float32}


def test_what_a_partner_kept_stays_there_when_another_entry_is_refused():
    """The s of LoRA-Pro, which A keeps until it is frozen."""
    model = make_model()
    optimizer = CLASSES["LoRAProAdamW"](model)
    train(model, optimizer, 2)
    A, B = pairs_in(model)[0]
    kept, mu = optimizer.state[A]["scaling"], optimizer.state[B]["mu"]
    A.requires_grad_(False)
    A.grad = None
    optimizer.state[B]["mu"] = torch.zeros(3)
    with pytest.raises(rlora.ShapeError, match=r"\(3,\)"):
        train(model, optimizer, 1)
    assert optimizer.state[A]["scaling"] is kept
    optimizer.state[B]["mu"] = mu
    train(model, optimizer, 1)
    assert "scaling" not in optimizer.state[A]
    assert optimizer.state[B]["scaling"] == kept


@pytest.mark.parametrize("scaling", ["0", [], -1.0, 1e300])
def test_a_saved_s_that_is_none_is_refused_before_anything_is_loaded(scaling):
    model = make_model()
    optimizer = CLASSES["LoRARite"](model)
    lr = optimizer.param_groups[0]["lr"]
    train(model, optimizer, 1)
    saved = optimizer.state_dict()
    saved["param_groups"][0] |= {"scaling": scaling, "lr": 0.5}
    with pytest.raises((TypeError, ValueError), match="scaling"):
        optimizer.load_state_dict(saved)
    assert optimizer.param_groups[0]["lr"] == lr
    train(model, optimizer, 1)


@pytest.mark.parametrize("name", ["LoRARite", "LoRAPlus", "ScaledAdamW"])
def test_pairs_without_a_gradient_have_no_state(name):
    """As of experts and adapters that are not in use; it begins with their first step."""
    pairs = [[nn.Parameter(torch.randn(shape)) for shape in [(2, 4), (3, 2)]] for _ in range(2)]
    optimizer = getattr(rlora.torch, name)([p for pair in pairs for p in pair], lr=0.1, pairs=pairs)
    for count, used in enumerate([pairs[:1], pairs], 1):
        for p in (p for pair in used for p in pair):
            p.grad = torch.ones_like(p)
        optimizer.step()
        (a1, _), (a2, b2) = pairs
        key = "step" if name == "ScaledAdamW" else "count"
        assert float(optimizer.state[a1][key].max()) == count
        if count == 1:
            assert not optimizer.state.get(a2)
            assert not optimizer.state.get(b2)
        else:
            assert float(optimizer.state[a2][key].max()) == 1


@make
def test_what_is_dropped_leaves_memory_at_once(make):
    """As torch's own optimizers do: a sweep of runs in one process needs no collection."""
    model = make_model()
    optimizer = make(model)
    train(model, optimizer, 2)
    first = next(iter(pairs_in(model)[0]))
    first.grad = None  # another plan
    optimizer.step()
    kept = [weakref.ref(optimizer), *map(weakref.ref, model.parameters())]
    gc.collect()
    gc.disable()
    try:
        del model, optimizer, first
        assert [x() for x in kept] == [None] * len(kept)
    finally:
        gc.enable()


@make
def test_optimizers_of_several_threads_step_at_once(make):
    """Bit for bit as one after the other: they share nothing."""
    alone, beside = make_model(), [make_model() for _ in range(4)]
    train(alone, make(alone), 4)

    def run(model):
        train(model, make(model), 4)

    with ThreadPoolExecutor(len(beside)) as pool:
        list(pool.map(run, beside))
    for model in beside:
        assert same(values(model), values(alone))


def test_an_option_that_is_set_during_a_step_stays():
    """As by another thread; the parent sees the options as they were."""
    outside = []

    class Meddling(torch.optim.SGD):
        def step(self, closure=None):
            outside[0]["lr"] = 5e-3
            assert self.param_groups[0]["lr"] == 1e-2
            self.param_groups[0]["momentum"] = 0.5
            return super().step(closure)

    model = make_model()
    optimizer = precondition(Meddling)(model, lr=1e-2)
    outside += optimizer.param_groups
    train(model, optimizer, 1)
    (group,) = optimizer.param_groups
    assert (group["lr"], group["momentum"]) == (5e-3, 0.5)


def test_moments_of_kernels_that_come_back_in_another_layout():
    """Kernels run through memory without a look at strides: those of a state are the factor's."""
    kernels = []
    for change in (False, True):
        g = torch.Generator().manual_seed(0)

        def draw(*shape, g=g):
            x = torch.randn(shape, generator=g)
            return x.contiguous(memory_format=torch.channels_last)

        A, B = nn.Parameter(draw(4, 3, 3, 3)), nn.Parameter(draw(6, 4, 1, 1))
        optimizer = rlora.torch.ScaledAdamW([("0.lora_A", A), ("0.lora_B", B)], lr=1e-2)
        for t in range(4):
            A.grad, B.grad = draw(4, 3, 3, 3), draw(6, 4, 1, 1)
            optimizer.step()
            if change and t == 1:
                for held in optimizer.state.values():
                    for x in held.values():
                        x.data = x.data.clone(memory_format=torch.contiguous_format)
        kernels.append((A.detach(), B.detach()))
    for found, expected in zip(*kernels, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=0)

"""The step on stacks of small factors against that over lists alone, which is its oracle.

``fused=False`` keeps to lists: torch's loop over tensors, in the same arithmetic.
"""

import numpy as np
import pytest
import torch

import rlora
import rlora.torch
from rlora import Factors, ShapeError
from rlora.torch.step.kernels import AdamW
from rlora.torch.step.listwise import ListStep
from rlora.torch.step.stacks import StackedAdamW
from rlora.torch.step.standins import StandIns

SHAPES = [(70, 50, 5), (40, 600, 5), (70, 50, 5), (12000, 30, 4), (700, 640, 64), (30, 20, 3)]
"""(m, n, r): stacks of several and of one, and with 12000 x 4 and 64 x 640 large factors."""


def make_pairs(dtype=torch.float64):
    rng = np.random.default_rng(0)
    return [
        (
            torch.tensor(rng.standard_normal((r, n)) / n**0.5, dtype=dtype, requires_grad=True),
            torch.zeros((m, r), dtype=dtype, requires_grad=True),
        )
        for m, n, r in SHAPES
    ]


def make_optimizer(pairs, kind=rlora.torch.ScaledAdamW, **options):
    return kind([p for pair in pairs for p in pair], lr=1e-2, pairs=pairs, **options)


def set_gradients(pairs, step, missing=()):
    rng = np.random.default_rng(step)
    for i, pair in enumerate(pairs):
        for side, p in enumerate(pair):
            p.grad = torch.tensor(rng.standard_normal(p.shape), dtype=p.dtype)
            if (i, side) in missing:
                p.grad = None


def works(optimizer):
    """The work of the first plan."""
    return [type(work) for work in optimizer._plans[1][0].batches]


def distance(x, y):
    return float((x.double() - y.double()).abs().max() / y.double().abs().max().clamp(min=1e-300))


def assert_same(ours, theirs, one, other, bound):
    for p, q in zip(sum(ours, ()), sum(theirs, ()), strict=True):
        assert distance(p.detach(), q.detach()) <= bound
        assert one.state[p].keys() == other.state[q].keys()
        for name, held in one.state[p].items():
            assert distance(held, other.state[q][name]) <= bound


OPTIONS = [
    {},
    {"placement": "before"},
    {"placement": "after", "weight_decay": 0.1},
    {"order": "gauss_seidel"},
    {"amsgrad": True, "maximize": True},
    {"damping_mode": "relative", "damping": 1e-3},
    {"weight_decay": 0.0, "betas": (0.9, 0.999)},
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_equals_the_step_over_lists(options):
    """Float64, 20 steps with gradients that come and go: rounding alone, about 1e-14."""
    ours, theirs = make_pairs(), make_pairs()
    one, other = make_optimizer(ours, **options), make_optimizer(theirs, fused=False, **options)
    for step in range(20):
        missing = {(step % 6, step % 2), ((step + 2) % 6, 0)}
        for pairs, optimizer in ((ours, one), (theirs, other)):
            set_gradients(pairs, step, missing)
            optimizer.step()
    assert set(works(one)) == {StackedAdamW}
    assert set(works(other)) == {ListStep}
    assert_same(ours, theirs, one, other, 1e-12)


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-4), (torch.bfloat16, 2e-2)])
def test_narrow_factors(dtype, bound):
    """After 20 steps within some roundings of the factors: 2^-24 and 2^-8 each."""
    ours, theirs = make_pairs(dtype), make_pairs(dtype)
    one, other = make_optimizer(ours), make_optimizer(theirs, fused=False)
    for step in range(20):
        for pairs, optimizer in ((ours, one), (theirs, other)):
            set_gradients(pairs, step)
            optimizer.step()
    assert set(works(one)) == {StackedAdamW}
    assert all(one.state[p]["exp_avg"].dtype == torch.float32 for p in sum(ours, ()))
    assert_same(ours, theirs, one, other, bound)


def test_bits_are_drawn_as_over_lists():
    """Large factors and stacks alike; sums in another order change the last digits of few."""
    ours, theirs = make_pairs(torch.bfloat16), make_pairs(torch.bfloat16)
    one, other = make_optimizer(ours), make_optimizer(theirs, fused=False)
    for pairs, optimizer in ((ours, one), (theirs, other)):
        for step in range(2):
            set_gradients(pairs, step)
            optimizer.step()
    for p, q in zip(sum(ours, ()), sum(theirs, ()), strict=True):
        assert (p == q).double().mean() > 0.99


@pytest.mark.parametrize("options", [{}, {"fused": False}], ids=str)
def test_a_learning_rate_with_an_axis(options):
    """As torch's AdamW takes it."""
    ours, theirs = make_pairs(), make_pairs()
    one, other = make_optimizer(ours, **options), make_optimizer(theirs, fused=False)
    one.param_groups[0]["lr"] = torch.tensor([1e-2], dtype=torch.float64)
    for step in range(3):
        for pairs, optimizer in ((ours, one), (theirs, other)):
            set_gradients(pairs, step)
            optimizer.step()
    assert_same(ours, theirs, one, other, 1e-12)


def test_a_single_layer_equals_itself_in_a_stack():
    """Other factors in a stack have no effect on a factor."""
    together, alone = make_pairs(), make_pairs()[2:3]
    one, other = make_optimizer(together), make_optimizer(alone)
    for step in range(5):
        set_gradients(together, step)
        for p, q in zip(alone[0], together[2], strict=True):
            p.grad = q.grad.clone()
        one.step()
        other.step()
    for p, q in zip(alone[0], together[2], strict=True):
        assert distance(p.detach(), q.detach()) <= 1e-13


def test_a_nan_stays_in_its_pair():
    pairs, clean = make_pairs(), make_pairs()
    one, other = make_optimizer(pairs), make_optimizer(clean)
    for step in range(3):
        for some, optimizer in ((pairs, one), (clean, other)):
            set_gradients(some, step)
            if some is pairs:
                some[0][0].grad[0, 0] = torch.nan
            optimizer.step()
    for pair, expected in zip(pairs[1:], clean[1:], strict=True):
        assert all(torch.equal(p, q) for p, q in zip(pair, expected, strict=True))


def test_a_state_made_good_again_counts():
    """Nothing of a step that was not finite stays outside of parameters and state."""
    pairs, clean = make_pairs(), make_pairs()
    one, other = make_optimizer(pairs), make_optimizer(clean)
    start = [p.detach().clone() for p in sum(pairs, ())]
    set_gradients(pairs, 0)
    pairs[0][0].grad.fill_(torch.inf)
    one.step()
    with torch.no_grad():
        for p, x in zip(sum(pairs, ()), start, strict=True):
            p.copy_(x)
            for held in one.state[p].values():
                held.zero_()
    for some, optimizer in ((pairs, one), (clean, other)):
        set_gradients(some, 1)
        optimizer.step()
    assert all(torch.equal(p, q) for p, q in zip(sum(pairs, ()), sum(clean, ()), strict=True))


def test_gradients_are_left_alone():
    pairs = make_pairs()
    optimizer = make_optimizer(pairs)
    set_gradients(pairs, 0)
    before = [p.grad.clone() for p in sum(pairs, ())]
    optimizer.step()
    assert all(torch.equal(p.grad, g) for p, g in zip(sum(pairs, ()), before, strict=True))


@pytest.mark.parametrize("options", [{"foreach": True}, {"fused": False}])
def test_another_implementation_is_torchs(options):
    pairs = make_pairs()
    optimizer = make_optimizer(pairs, **options)
    set_gradients(pairs, 0)
    optimizer.step()
    assert set(works(optimizer)) == {ListStep}


@pytest.mark.parametrize("placement", ["before", "both", "after"])
def test_gradients_in_another_order_of_memory(placement):
    """As those of a transposed product: the kernel looks at no strides."""
    ours, theirs = make_pairs(), make_pairs()
    one = make_optimizer(ours, placement=placement)
    other = make_optimizer(theirs, placement=placement, fused=False)
    for step in range(3):
        for pairs, optimizer in ((ours, one), (theirs, other)):
            set_gradients(pairs, step)
            for p in sum(pairs, ()):
                p.grad = p.grad.mT.contiguous().mT
            optimizer.step()
    assert set(works(one)) == {StackedAdamW}
    assert_same(ours, theirs, one, other, 1e-12)


@pytest.mark.parametrize(
    "change", [{"amsgrad": True}, {"foreach": True}, {"lr": torch.tensor(3e-2).double()}], ids=str
)
def test_an_option_changed_between_steps_counts(change):
    ours, theirs = make_pairs(), make_pairs()
    one, other = make_optimizer(ours), make_optimizer(theirs, fused=False)
    for step in range(4):
        for pairs, optimizer in ((ours, one), (theirs, other)):
            if step == 2:
                optimizer.param_groups[0].update(change)
                if "foreach" not in change:  # torch's loop asks for a maximum only from its start
                    optimizer.state.clear()
            set_gradients(pairs, step)
            optimizer.step()
    assert_same(ours, theirs, one, other, 1e-12)


@pytest.mark.parametrize("kind", [rlora.torch.ScaledAdamW, rlora.torch.LoRARite])
def test_a_state_keeps_no_memory_of_others(kind):
    """Factors leave a stack one by one; what stays of them is as large as they are."""
    pairs = [tuple(p for p in pair) for _ in range(4) for pair in make_pairs()[:1]]
    optimizer = kind([p for pair in pairs for p in pair], lr=1e-2, pairs=pairs)
    for left in range(len(pairs)):
        set_gradients(pairs, left, {(i, side) for i in range(left) for side in (0, 1)})
        optimizer.step()
    entries = [x for held in optimizer.state.values() for x in held.values()]
    storages = {x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in entries}
    assert sum(storages.values()) == sum(x.nbytes for x in entries)


def test_a_capture_that_would_lay_out_the_step_is_refused(monkeypatch):
    pairs = make_pairs()
    optimizer = make_optimizer(pairs)
    set_gradients(pairs, 0)
    before = [p.detach().clone() for pair in pairs for p in pair]
    with monkeypatch.context() as patch:
        patch.setattr(torch.cuda, "is_available", lambda: True)
        patch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
        with pytest.raises(RuntimeError, match="make an eager step as they are now, then capture"):
            optimizer.step()
        assert all(map(torch.equal, before, (p for pair in pairs for p in pair)))
        assert not optimizer.state


def test_a_state_of_another_shape_is_refused():
    """Broadcasting would have taken it."""
    pairs = make_pairs()
    optimizer = make_optimizer(pairs)
    for step in range(2):
        set_gradients(pairs, step)
        optimizer.step()
    A = pairs[0][0]
    before = A.detach().clone()
    optimizer.state[A]["exp_avg"] = torch.zeros(1, 1, dtype=A.dtype)
    with pytest.raises(ShapeError, match=r"\(1, 1\) as 'exp_avg'.*expected.*\(5, 50\)"):
        optimizer.step()
    assert torch.equal(A, before)


def test_a_state_in_a_plain_dict_is_filled():
    pairs = make_pairs()
    optimizer = make_optimizer(pairs)
    optimizer.state = {}
    set_gradients(pairs, 0)
    optimizer.step()
    assert optimizer.state.keys() == set(sum(pairs, ()))


def test_a_step_of_the_users_own_is_what_runs():
    """A subclass of AdamW whose step does something else keeps it."""
    calls = []

    class Counted(torch.optim.AdamW):
        def step(self, closure=None):
            calls.append(len(self.param_groups[0]["params"]))
            return super().step(closure)

    pairs = make_pairs()
    optimizer = make_optimizer(pairs, rlora.torch.precondition(Counted))
    set_gradients(pairs, 0)
    optimizer.step()
    assert calls == [2 * len(SHAPES)]


def test_factors_in_two_groups():
    """Each with its own rate: stepped over lists."""
    ours, theirs = make_pairs(), make_pairs()
    found = []
    for pairs, options in ((ours, {}), (theirs, {"fused": False})):
        sides = zip(*pairs, strict=True)
        groups = [{"params": list(x), "lr": lr} for x, lr in zip(sides, (1e-2, 3e-2), strict=True)]
        optimizer = rlora.torch.ScaledAdamW(groups, pairs=pairs, **options)
        set_gradients(pairs, 0)
        optimizer.step()
        found.append(optimizer)
    assert_same(ours, theirs, *found, 1e-13)


@pytest.mark.parametrize("name", ["step", "_init_group"])
def test_a_placement_behind_a_step_of_the_users_own_is_refused(name):
    """It may use the parameters' values, which stand-ins behind it do not have; before it, anything works."""
    own = type("Own", (torch.optim.AdamW,), {name: lambda self, *args: None})
    kind = rlora.torch.precondition(own)
    for placement in ("both", "after"):
        with pytest.raises(ValueError, match="AdamW with torch's own step, not over"):
            make_optimizer(make_pairs(), kind, placement=placement)
    make_optimizer(make_pairs(), kind)


class WithAStepOfItsOwn(torch.optim.AdamW):
    """AdamW, which nothing tells from an optimizer that uses what its parameters are."""

    def step(self, closure=None):
        return super().step(closure)


@pytest.mark.parametrize("options", [{}, {"amsgrad": True, "weight_decay": 0.1}], ids=str)
def test_stand_ins_give_the_numbers_of_the_lists(options):
    """Float64, 20 steps with gradients that come and go: rounding alone, about 1e-14."""
    kinds = rlora.torch.precondition(WithAStepOfItsOwn), rlora.torch.precondition(torch.optim.AdamW)
    runs = make_pairs(), make_pairs()
    optimizers = [
        make_optimizer(pairs, kind, fused=False, **options)
        for pairs, kind in zip(runs, kinds, strict=True)
    ]
    for step in range(20):
        missing = {(step % 6, step % 2), ((step + 2) % 6, 0)}
        for pairs, optimizer in zip(runs, optimizers, strict=True):
            set_gradients(pairs, step, missing)
            optimizer.step()
    assert [x._kernel for x in optimizers] == [StandIns, AdamW]
    assert_same(*runs, *optimizers, 1e-12)


def test_grams_go_to_their_own_factors():
    """As in Llama: B of one shape for A of several, so that stacks are no run in the list."""
    torch.manual_seed(0)
    shapes = [(8, 10), (8, 12), (16, 10)]  # n, m
    pairs = [[torch.randn(4, n), torch.randn(m, 4)] for n, m in shapes]
    start = [Factors(*(p.double().numpy() for p in pair)) for pair in pairs]
    pairs = [[torch.nn.Parameter(p.clone()) for p in pair] for pair in pairs]
    optimizer = make_optimizer(pairs)
    set_gradients(pairs, 0)
    wide = [Factors(*(p.grad.double().numpy() for p in pair)) for pair in pairs]
    optimizer.step()
    method = rlora.scaled_adamw()
    wanted, _ = rlora.step(method, start, wide, method.init(start), 1e-2)
    for pair, old, new in zip(pairs, start, wanted, strict=True):
        for p, x, y in zip(pair, old, new, strict=True):
            moved, right = p.detach().double().numpy() - x, y - x
            # float32, of directions that one step of Adam has put to 1 and -1.
            np.testing.assert_allclose(moved, right, atol=1e-3 * np.abs(right).max())


def test_adam_of_gradients_in_another_order_of_memory():
    """As a transposed product leaves them: torch's fused kernel looks at no strides."""
    torch.manual_seed(0)
    pair = Factors(torch.randn(4, 6), torch.randn(5, 4))
    grads = Factors(torch.randn(4, 6), torch.randn(5, 4))
    turned = Factors(*(g.mT.contiguous().mT for g in grads))
    method = rlora.lora_plus()
    (plain, _), (other, _) = (method.update(g, method.init(pair), pair) for g in (grads, turned))
    for x, y in zip(plain, other, strict=True):
        torch.testing.assert_close(x, y)


@pytest.mark.parametrize("placement", ["before", "both", "after"])
def test_large_factors_in_another_order_of_memory(placement):
    """Too large for a stack they are read where they lie; the kernel looks at no strides."""

    def run(turned):
        torch.manual_seed(0)
        A, B = torch.randn(4, 12000) / 100, torch.randn(11000, 4) / 100
        if turned:
            A, B = (x.mT.contiguous().mT for x in (A, B))
        pair = torch.nn.Parameter(A), torch.nn.Parameter(B)
        optimizer = make_optimizer([pair], placement=placement)
        for step in range(2):
            torch.manual_seed(step)
            for p in pair:
                p.grad = torch.randn(p.shape)
            optimizer.step()
        return [p.detach() for p in pair]

    for x, y in zip(run(turned=True), run(turned=False), strict=True):
        torch.testing.assert_close(x, y)


@pytest.mark.parametrize("placement", ["both", "after"])
def test_a_rate_of_0_moves_nothing_along_what_is_not_finite(placement):
    """As the first step of a warm-up after an overflow."""
    pair = torch.randn(4, 6, requires_grad=True), torch.randn(5, 4, requires_grad=True)
    before = [p.detach().clone() for p in pair]
    optimizer = rlora.torch.ScaledAdamW(list(pair), lr=0.0, pairs=[pair], placement=placement)
    pair[0].grad, pair[1].grad = torch.full((4, 6), torch.nan), torch.randn(5, 4)
    optimizer.step()
    assert all(torch.equal(p, x) for p, x in zip(pair, before, strict=True))

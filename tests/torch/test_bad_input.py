"""Bad input gives an error that says what came, and leaves parameters and state as they were."""

import copy

import numpy as np
import pytest
import torch
from models import CLASSES, METHODS, loss_of, make_model, pairs_in, same, train, values
from torch import nn

import rlora
import rlora.torch
from rlora import Factors, NamespaceError, PairingError, ShapeError
from rlora.torch import LoRARite, ScaledAdamW

every = pytest.mark.parametrize("make", CLASSES.values(), ids=CLASSES)


def everything(model, optimizer):
    """Parameters and state, copied."""
    state = optimizer.state_dict()["state"]
    tensors = {(i, k): x for i, held in state.items() for k, x in held.items()}
    return values(model), {
        key: x.clone() if isinstance(x, torch.Tensor) else x for key, x in tensors.items()
    }


def assert_refused(model, optimizer, act, error, match):
    before = everything(model, optimizer)
    with pytest.raises(error, match=match):
        act()
    after = everything(model, optimizer)
    for old, new in zip(before, after, strict=True):
        assert old.keys() == new.keys()
        for key in old:
            torch.testing.assert_close(new[key], old[key], rtol=0, atol=0)


@every
def test_sparse_gradients(make):
    model = make_model()
    optimizer = make(model)
    train(model, optimizer, 1)
    a, _ = pairs_in(model)[1]
    loss_of(model).backward()
    a.grad = a.grad.to_sparse()
    assert_refused(model, optimizer, optimizer.step, NamespaceError, "has a sparse gradient")


@every
def test_a_closure_that_raises(make):
    model = make_model()
    optimizer = make(model)
    train(model, optimizer, 1)

    def closure():
        loss_of(model).backward()
        msg = "out of data"
        raise OSError(msg)

    assert_refused(model, optimizer, lambda: optimizer.step(closure), OSError, "out of data")


@every
def test_state_of_a_model_with_other_ranks(make):
    model, other = make_model(), make_model(r=3)
    optimizer, saved = make(model), make(other)
    train(model, optimizer, 1)
    train(other, saved, 1)
    if not any(k != "step" for held in saved.state.values() for k in held):
        pytest.skip("keeps no state that has a shape")
    state = saved.state_dict()
    if not any(isinstance(x, torch.Tensor) and 3 in x.shape for x in _tensors(state["state"])):
        pytest.skip("no tensor of the state has the rank in its shape")
    assert_refused(
        model, optimizer, lambda: optimizer.load_state_dict(state), ShapeError, "was the rank"
    )


def _tensors(state):
    return [x for held in state.values() for x in held.values()]


@every
def test_state_of_another_model(make):
    model, other = make_model(), make_model(bias=False)
    optimizer, saved = make(model), make(other)
    train(model, optimizer, 1)
    train(other, saved, 1)
    load = lambda: optimizer.load_state_dict(saved.state_dict())  # noqa: E731
    assert_refused(model, optimizer, load, ValueError, "of other parameters")


@pytest.mark.parametrize("kind", [ScaledAdamW, LoRARite])
def test_a_state_that_torch_refuses_late(kind):
    """It looks for the step when the old state is gone; the load puts that back."""
    model = make_model()
    optimizer = kind(model, lr=1e-2)
    train(model, optimizer, 1)
    state = copy.deepcopy(optimizer.state_dict())
    state["state"][5].pop("step")
    load = lambda: optimizer.load_state_dict(state)  # noqa: E731
    assert_refused(
        model, optimizer, load, ShapeError, "exp_avg_sq and no step, which this optimizer"
    )
    state["state"][5]["step"] = "one"
    assert_refused(model, optimizer, lambda: optimizer.load_state_dict(state), ValueError, "float")
    train(model, optimizer, 1)


@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
def test_state_of_a_method_is_not_that_of_scaled_adamw(method):
    model, other = make_model(), make_model()
    optimizer, saved = ScaledAdamW(model), method(other, lr=1e-3)
    train(model, optimizer, 1)
    train(other, saved, 1)
    if all(p not in saved.state or not saved.state[p] for pair in pairs_in(other) for p in pair):
        pytest.skip("keeps no state of pairs")
    load = lambda: optimizer.load_state_dict(saved.state_dict())  # noqa: E731
    assert_refused(model, optimizer, load, ShapeError, "state of another optimizer")


LOADS = {**METHODS, "ScaledAdamW": ScaledAdamW, "SGD": torch.optim.SGD, "AdamW": torch.optim.AdamW}


def foreign(name, **options):
    """An optimizer after a step, and its pair."""
    g = torch.Generator().manual_seed(0)
    a, b = (torch.randn(shape, generator=g).requires_grad_() for shape in ((2, 6), (5, 2)))
    given = {} if name in ("SGD", "AdamW") else {"pairs": [(a, b)]}
    optimizer = LOADS[name]([a, b], lr=1e-3, **given, **options)
    a.grad, b.grad = torch.ones_like(a), torch.ones_like(b)
    optimizer.step()
    return optimizer, (a, b)


@pytest.mark.parametrize("name", LOADS)
def test_the_state_of_any_other_optimizer_is_refused_or_goes_on(name):
    """Never an error at the step; what a class does not keep is refused, and less than it keeps."""
    saved, theirs = foreign(name)
    accepted = set()
    for kind in METHODS.keys() | {"ScaledAdamW"}:
        optimizer, pair = foreign(kind)
        try:
            optimizer.load_state_dict(copy.deepcopy(saved.state_dict()))
        except ShapeError as error:
            assert "another optimizer" in str(error)  # noqa: PT017
            continue
        accepted.add(kind)
        optimizer.step()
        held = {key for p in pair for key, x in optimizer.state.get(p, {}).items() if x is not None}
        along = {x: optimizer.param_groups[0][x] for x in ("momentum",) if x in optimizer.defaults}
        fresh, own = foreign(kind, **along)
        assert held <= {key for p in own for key in fresh.state.get(p, {})}, kind
        for p, q in zip(theirs, own, strict=True):  # counted steps with a moment of 0 go too far
            lacks = fresh.state[q].keys() - saved.state.get(p, {}).keys()
            # What belongs to a pair as a whole may begin anew.
            assert not saved.state.get(p) or lacks <= {"scaling", "inverse"}, kind
        assert all(p.isfinite().all() for p in pair)
    assert {"AdamW": "ScaledAdamW", "SGD": "RefLoRA"}.get(name, name) in accepted


def test_a_state_comes_with_the_options_that_it_needs():
    """Momentum that the saved group has, and this one does not have yet."""
    models = make_model(), make_model()
    with_momentum = rlora.torch.LoRAProSGD(models[0], lr=1e-3, momentum=0.9)
    train(models[0], with_momentum, 2)
    models[1].load_state_dict(models[0].state_dict())
    without = rlora.torch.LoRAProSGD(models[1], lr=1e-3)
    without.load_state_dict(copy.deepcopy(with_momentum.state_dict()))
    train(models[0], with_momentum, 1)
    train(models[1], without, 1)
    assert same(values(models[0]), values(models[1]))


class OwnState(torch.optim.AdamW):
    """Keeps what torch's AdamW does not."""

    @torch.no_grad()
    def step(self, closure=None):
        for p in (p for group in self.param_groups for p in group["params"]):
            if p.grad is not None:
                held = self.state[p]
                held["step"] = held.get("step", torch.tensor(0.0)) + 1
                held["momentum_buffer"] = p.grad.clone()
                p.sub_(p.grad, alpha=1e-3)


def test_the_state_of_a_parent_of_ones_own_is_loaded():
    model = make_model()
    optimizer = rlora.torch.precondition(OwnState)(model)
    train(model, optimizer, 1)
    saved = copy.deepcopy(optimizer.state_dict())
    optimizer.load_state_dict(saved)
    held = optimizer.state_dict()["state"]
    assert all(
        torch.equal(held[i]["momentum_buffer"], x["momentum_buffer"])
        for i, x in saved["state"].items()
    )


@pytest.mark.parametrize("value", [(1e-8, 1e-8), "1e-8", -1.0])
def test_eps_of_adamw_is_one_number(value):
    optimizer = ScaledAdamW(make_model())
    with pytest.raises((TypeError, ValueError), match="eps"):
        optimizer.add_param_group({"params": [torch.nn.Parameter(torch.ones(2))], "eps": value})


@pytest.mark.parametrize("kind", [ScaledAdamW, LoRARite])
@pytest.mark.refuses("a loop of one's own", "meta tensors, sparse and complex gradients")
def test_meta_tensors(kind):
    with torch.device("meta"):
        model = make_model()
    optimizer = kind(model, lr=1e-3)  # a model may be built before its values are loaded
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    with pytest.raises(NamespaceError, match="on the meta device and has no values"):
        optimizer.step()
    assert not optimizer.state


@pytest.mark.parametrize("kind", [ScaledAdamW, LoRARite])
def test_factors_on_two_devices(kind):
    model = make_model()
    layer = model[0].lora_A["default"]
    layer.weight = nn.Parameter(torch.empty(4, 6, device="meta"))
    report = kind(model, lr=1e-3).report
    assert len(report) == 1
    assert "on meta and torch.float32 on cpu" in report.refused["0.lora_A.default.weight"]
    a, b = nn.Parameter(torch.ones(2, 5)), nn.Parameter(torch.ones(4, 2, device="meta"))
    with pytest.raises(NamespaceError, match="bring both to one dtype and device"):
        kind([a, b], lr=1e-3, pairs=[(a, b)])


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@every
def test_a_bad_gradient_does_not_touch_another_pair(make, value):
    """The other pair moves as if alone: rtol for batches of another size, which round otherwise."""
    model, alone = make_model(bias=False), make_model(bias=False)
    optimizer = make(model)
    reference = make(alone)
    for m in (model, alone):
        loss_of(m).backward()
    pairs_in(model)[0][1].grad[0, 0] = value
    optimizer.step()
    reference.step()
    for p, q in zip(pairs_in(model)[1], pairs_in(alone)[1], strict=True):
        assert torch.isfinite(p).all()
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6)


# --- the functional methods -----------------------------------------------------------------------

GOOD = Factors(np.ones((2, 5)), np.ones((4, 2)))
BAD = {
    "one-dimensional": (Factors(np.ones(5), np.ones((4, 2))), ShapeError, "must be a matrix"),
    "mismatched": (Factors(np.ones((3, 5)), np.ones((4, 2))), ShapeError, "do not fit"),
    "two libraries": (Factors(np.ones((2, 5)), torch.ones(4, 2)), NamespaceError, "two libraries"),
    "complex": (
        Factors(np.ones((2, 5), complex), np.ones((4, 2), complex)),
        NamespaceError,
        "real",
    ),
    "two devices": (
        Factors(torch.ones(2, 5), torch.ones(4, 2, device="meta")),
        NamespaceError,
        "devices cpu and meta",
    ),
    "no arrays": (Factors([[1.0]], [[1.0]]), ShapeError, "must be a matrix"),
    "no pair": (np.ones((2, 5)), PairingError, "expected Factors"),
}


@pytest.mark.parametrize("name", rlora.methods.__all__)
@pytest.mark.parametrize("what", BAD)
def test_bad_factors(name, what):
    params, error, match = BAD[what]
    with pytest.raises(error, match=match):
        getattr(rlora, name)().init(params)


AS_GRADIENTS = {
    "one-dimensional": (ShapeError, r"has shape \(5,\) where its parameter has \(2, 5\)"),
    "mismatched": (ShapeError, r"has shape \(3, 5\) where its parameter has \(2, 5\)"),
    "two libraries": (NamespaceError, "two libraries"),
    "complex": (NamespaceError, "real"),
    "two devices": (NamespaceError, "two libraries"),  # torch's, and the factors are NumPy's
    "no arrays": (ShapeError, "must be an array as its parameter is, got list"),
    "no pair": (PairingError, "must be collections of one structure"),
}


@pytest.mark.parametrize("name", rlora.methods.__all__)
@pytest.mark.parametrize("what", BAD)
def test_bad_gradients(name, what):
    grads, (error, match) = BAD[what][0], AS_GRADIENTS[what]
    method = getattr(rlora, name)()
    params = Factors(GOOD.A.copy(), GOOD.B.copy())
    state = method.init(params)
    copies = {key: np.array(x) for key, x in rlora.flatten_state(state).items()}
    with pytest.raises(rlora.RLoraError, match=match) as caught:
        rlora.step(method, params, grads, state, 0.1)
    assert caught.type is error
    assert np.array_equal(params.A, GOOD.A)
    assert np.array_equal(params.B, GOOD.B)
    for key, x in rlora.flatten_state(state).items():
        assert np.array_equal(x, copies[key])


def test_a_method_whose_update_gives_another_state():
    """As `chain` refuses it; a method need not be one."""
    zeros = rlora.core.moments.zeros

    def changing_lora() -> rlora.Transform:
        return rlora.Transform(
            lambda params, scaling=1.0: {"mu": zeros(params)},
            lambda grads, state, params: (grads, {"nu": state["mu"]}),
        )

    pair = [torch.randn(2, 5, requires_grad=True), torch.randn(3, 2, requires_grad=True)]
    optimizer = rlora.torch.optimizer_class(changing_lora)(pair, pairs=[pair])
    for p in pair:
        p.grad = torch.ones_like(p)
    before = [p.detach().clone() for p in pair]
    with pytest.raises(ShapeError, match=r"fields of its init's: .*'nu'.* expected .*'mu'"):
        optimizer.step()
    assert all(map(torch.equal, pair, before))


@pytest.mark.parametrize("kind", [rlora.torch.ScaledAdamW, rlora.torch.LoRARite])
@pytest.mark.parametrize("bad", [{"lr": "1e-3"}, {"betas": ("9e-1", "0.99")}, {"eps": "1e-8"}])
def test_numbers_that_came_as_text_are_named(kind, bad):
    """As YAML reads 1e-3: torch itself only says that it cannot compare."""
    (name,) = bad
    with pytest.raises(TypeError, match=rf"{name} must be a real number.*write 1.0e-3"):
        kind(make_model(), **bad)
    with pytest.raises(TypeError, match=r"lr must be a real number.*write 1.0e-3"):
        rlora.torch.precondition(torch.optim.SGD)(make_model(), "1e-3")


@pytest.mark.parametrize("kind", [rlora.torch.ScaledAdamW, rlora.torch.LoRARite])
@pytest.mark.parametrize("bad, match", [(("0.9", "0.99"), "betas"), ((0.9, 1.5), r"in \[0, 1\)")])
def test_betas_of_a_group_are_checked_at_construction(kind, bad, match):
    params = list(make_model().named_parameters())
    with pytest.raises((TypeError, ValueError), match=match):
        kind([{"params": params, "betas": bad}])


def test_betas_of_another_optimizer_are_its_own_business():
    """It may have none, or more than two, of any meaning."""

    class Own(torch.optim.Optimizer):
        def __init__(self, params, lr=1e-3, betas=None):
            super().__init__(params, {"lr": lr, "betas": betas})

        def step(self, closure=None):
            pass

    for betas in (None, (0.9, 2.0, 3.0)):
        kind = rlora.torch.precondition(Own)
        assert kind(make_model(), betas=betas).param_groups[0]["betas"] == betas


@pytest.mark.parametrize("betas", [(0.9, 0.99, 0.999), (0.9,), 0.9, "0.9,0.99"], ids=repr)
@pytest.mark.parametrize("kind", [ScaledAdamW, LoRARite])
def test_betas_are_two(kind, betas):
    with pytest.raises(TypeError, match=r"betas must be two numbers, as in \(0.9, 0.999\), got"):
        kind(make_model(), lr=1e-3, betas=betas)


def test_what_a_method_gives_is_no_method():
    with pytest.raises(TypeError, match=r"as rlora\.lora_rite, got a Transform; do not"):
        rlora.torch.optimizer_class(rlora.lora_rite())


@every
@pytest.mark.parametrize("name", ["lr", "weight_decay"])
@pytest.mark.parametrize("value", [None, 1j, "1e-3"])
def test_values_that_are_no_numbers(make, name, value):
    model = make_model()
    if name not in make(model).param_groups[0]:
        pytest.skip("has no such option")
    kind = type(make(model))
    if not issubclass(kind, (torch.optim.AdamW, torch.optim.SGD)) and not isinstance(value, str):
        pytest.skip("what its parent takes is not known")
    with pytest.raises(TypeError, match=f"{name} must be a real number, got"):
        kind(model, **{name: value})


@every
@pytest.mark.parametrize("flag", ["maximize", "amsgrad", "foreach", "fused"])
def test_values_that_are_no_flags(make, flag):
    """Found before a step has moved anything."""
    model = make_model()
    optimizer = make(model)
    train(model, optimizer, 1)
    if flag not in optimizer.param_groups[0]:
        pytest.skip("has no such option")
    optimizer.param_groups[0][flag] = "yes"
    loss_of(model).backward()
    known = "True or False" if flag in ("maximize", "amsgrad") else "True, False or None"
    assert_refused(model, optimizer, optimizer.step, TypeError, f"{flag} must be {known}")


@pytest.mark.parametrize("flag", ["maximize", "amsgrad"])
@pytest.mark.parametrize("value", [None, 1, "yes"])
def test_flags_of_a_constructor(flag, value):
    with pytest.raises(TypeError, match=f"{flag} must be True or False"):
        ScaledAdamW(make_model(), **{flag: value})


def test_flags_of_numpy():
    optimizer = ScaledAdamW(make_model(), maximize=np.True_, foreach=np.False_)
    assert [optimizer.param_groups[0][flag] for flag in ("maximize", "foreach")] == [True, False]
    with pytest.raises(TypeError, match="foreach must be True, False or None"):
        ScaledAdamW(make_model(), foreach=0)


@pytest.mark.parametrize("kind", METHODS.values(), ids=METHODS)
def test_factors_in_two_groups_are_refused_at_once(kind):
    named = list(make_model().named_parameters())
    groups = [{"params": [x for x in named if key in x[0]]} for key in ("lora_A", "lora_B")]
    with pytest.raises(PairingError, match="are in two parameter groups"):
        kind(groups, lr=1e-3)


@pytest.mark.parametrize("kind", [set, frozenset])
def test_a_set_of_parameters_is_refused(kind):
    """Its order is another in each run; views of a dict are sets to Python, and have an order."""
    A, B = torch.ones(2, 6, requires_grad=True), torch.ones(5, 2, requires_grad=True)
    named = {"q.lora_A": A, "q.lora_B": B}
    for params in (kind([A, B]), [{"params": kind([A, B])}], kind(named.items())):
        with pytest.raises(TypeError, match="got a set"):
            ScaledAdamW(params, pairs=[(A, B)])
    assert len(ScaledAdamW(named.items()).report) == 1

"""Parameters from whatever can be gone through once, and methods called by keyword as torch's are."""

import inspect
from operator import itemgetter

import pytest
import torch
from models import CLASSES, METHODS, make_model, pairs_in, same, train, values

from rlora.torch import ScaledAdamW, ScaledSGD

FORMS = {
    "generator": lambda model: (x for x in model.named_parameters() if x[1].requires_grad),
    "iterator": lambda model: iter(list(model.named_parameters())),
    "items": lambda model: dict(model.named_parameters()).items(),
    "filter": lambda model: filter(lambda x: x[1].requires_grad, model.named_parameters()),
    "zip": lambda model: zip(*zip(*model.named_parameters(), strict=True), strict=True),
    "group of zip": lambda model: ({"params": x} for x in [FORMS["zip"](model)]),
    "groups of one": lambda model: [{"params": FORMS["generator"](model)}, {"params": iter(())}],
}
NAMELESS = {
    "generator": lambda model: (p for p in model.parameters() if p.requires_grad),
    "values": lambda model: {n: p for n, p in model.named_parameters() if p.requires_grad}.values(),
    "group of values": lambda model: [{"params": NAMELESS["values"](model)}],
    "map": lambda model: map(itemgetter(1), FORMS["filter"](model)),
}
make = pytest.mark.parametrize(
    "make", [CLASSES["adamw"], CLASSES["LoRARite"]], ids=["ScaledAdamW", "LoRARite"]
)


@make
@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
def test_named_parameters_in_any_form(make, form):
    model, twin = make_model(), make_model()
    train(model, optimizer := make(form(model)), 2)
    train(twin, make(twin), 2)
    assert len(optimizer.report) == 2
    assert same(values(model), values(twin))


@make
@pytest.mark.parametrize("form", NAMELESS.values(), ids=NAMELESS)
def test_tensors_in_any_form(make, form):
    model, twin = make_model(), make_model()
    train(model, make(form(model), pairs=iter(pairs_in(model))), 2)
    train(twin, make(twin), 2)
    assert same(values(model), values(twin))


@pytest.mark.parametrize("kind", [ScaledAdamW, ScaledSGD, *METHODS.values()])
@pytest.mark.parametrize(
    "name", ["step", "zero_grad", "state_dict", "load_state_dict", "add_param_group"]
)
def test_methods_are_called_as_torchs_are(kind, name):
    """torch.distributed.checkpoint calls ``step(closure=None)`` and ``load_state_dict(state_dict=)``."""

    def parameters(of):
        found = inspect.signature(getattr(of, name)).parameters.values()
        return [(p.name, p.kind, p.default) for p in found]

    assert parameters(kind) == parameters(torch.optim.AdamW)


@pytest.mark.parametrize("make", CLASSES.values(), ids=CLASSES)
def test_calls_by_keyword(make):
    model = make_model()
    optimizer = make(model)
    train(model, optimizer, 1)
    optimizer.zero_grad(set_to_none=False)
    before = values(model)
    optimizer.load_state_dict(state_dict=optimizer.state_dict())
    optimizer.zero_grad(set_to_none=True)
    optimizer.step(closure=None)
    assert same(before, values(model))


@make
def test_a_hook_may_make_another_dict_of_the_state(make):
    model = make_model()
    optimizer = make(model)
    train(model, optimizer, 1)
    plain = optimizer.state_dict()
    handle = optimizer.register_state_dict_post_hook(lambda _, saved: {"optimizer": saved})
    wrapped = optimizer.state_dict()
    assert wrapped.keys() == {"optimizer"}
    assert wrapped["optimizer"]["state"].keys() == plain["state"].keys()
    handle.remove()
    assert optimizer.state_dict().keys() == plain.keys()


@make
def test_a_hook_may_leave_parameters_out(make):
    model = make_model()
    optimizer = make(model)
    train(model, optimizer, 1)

    def shorten(_, saved):
        (group,) = saved["param_groups"]
        return {**saved, "param_groups": [{**group, "params": group["params"][:2]}]}

    optimizer.register_state_dict_post_hook(shorten)
    (group,) = optimizer.state_dict()["param_groups"]
    assert len(group["params"]) == 2

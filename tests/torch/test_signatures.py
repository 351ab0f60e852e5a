"""Every optimizer class shows its options: to `help`, to type checkers and to editors."""

import functools
import inspect

import pytest
import torch
from models import make_model, same, train, values

import rlora
import rlora.torch
from rlora.torch import method_classes
from rlora.torch.optimizers.method_optimizer import MethodOptimizer

CLASSES = [getattr(rlora.torch, name) for name in method_classes.__all__]


def test_there_is_a_class_for_every_method():
    assert len(CLASSES) + 2 == len(rlora.methods.__all__)
    assert set(method_classes.__all__) <= set(rlora.torch.__all__)


@pytest.mark.parametrize("kind", CLASSES, ids=lambda kind: kind.__name__)
def test_the_signature_has_the_options_and_their_defaults(kind):
    parameters = inspect.signature(kind).parameters
    assert not any(p.kind in (p.VAR_KEYWORD, p.VAR_POSITIONAL) for p in parameters.values())
    assert list(parameters)[:2] == ["params", "lr"]
    a = torch.ones(2, 8, requires_grad=True)
    b = torch.ones(6, 2, requires_grad=True)
    group = kind([a, b], pairs=[(a, b)]).param_groups[0]
    defaults = {p.name: p.default for p in parameters.values() if p.name in group}
    del defaults["params"]
    assert defaults.items() <= {name: group[name] for name in defaults}.items()
    assert {"stochastic_rounding", "scaling", "weight_decay", "lr"} <= defaults.keys()


def test_rite_has_the_fields_of_its_paper():
    parameters = inspect.signature(rlora.torch.LoRARite).parameters
    assert parameters["betas"].default == (0.9, 0.999)
    assert parameters["max_norm"].annotation == (float | None)


def test_a_subclass_shows_its_own():
    class Mine(rlora.torch.LoRARite):
        def __init__(self, params, rate=1e-3):
            super().__init__(params, rate)

    assert list(inspect.signature(Mine).parameters) == ["params", "rate"]
    assert issubclass(Mine, MethodOptimizer)


def test_a_partial_is_a_method():
    kind = rlora.torch.optimizer_class(functools.partial(rlora.lora_rite, eps=1e-3))
    assert kind.__name__ == "LoRARite"
    assert inspect.signature(kind).parameters["eps"].default == 1e-3
    model, twin = make_model(), make_model()
    train(model, kind(model, lr=1e-2), 2)
    train(twin, rlora.torch.LoRARite(twin, lr=1e-2, eps=1e-3), 2)
    assert same(values(model), values(twin))


def open_to_position(momentum=0.9):
    return rlora.alt_lora(b1=momentum)


def of_every_class(*, scaling=1.0):
    return rlora.alt_lora(b1=scaling)


@pytest.mark.parametrize(
    ("method", "fault"),
    [
        (open_to_position, "'momentum' .* keyword-only"),
        (of_every_class, "'scaling' .* every torch"),
    ],
)
def test_hyperparameters_that_a_class_cannot_have_are_refused(method, fault):
    with pytest.raises(TypeError, match=fault):
        rlora.torch.optimizer_class(method)


def open_to_more(*, weight_decay=0.0, **others):
    return rlora.alt_lora(weight_decay=weight_decay, **others)


def test_what_a_method_takes_beside_its_hyperparameters(tmp_path):
    """More keywords; the inner method of a partial, which is in no saved group; its marks."""
    model = make_model(bias=False)
    train(model, rlora.torch.optimizer_class(open_to_more)(model, lr=1e-2), 1)
    wrapped = functools.partial(rlora.stable_lora, inner=rlora.scaled_adamw())
    optimizer = rlora.torch.optimizer_class(wrapped)(model, lr=1e-2)
    train(model, optimizer, 1)
    torch.save(optimizer.state_dict(), tmp_path / "state.pt")
    found = rlora.torch.optimizer_class(functools.partial(rlora.scaled_prodigy, d0=1e-5))
    assert found(model).param_groups[0]["lr"] == 1.0

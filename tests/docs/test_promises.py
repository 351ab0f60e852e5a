"""The page of promises: its tables are what every class does when it is tried."""

import importlib.util
import re
from pathlib import Path

import pytest
import torch

import rlora.torch

REFERENCE = Path(__file__).parents[2] / "docs" / "reference"
PAGE = (REFERENCE / "promises.md").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def promises():
    spec = importlib.util.spec_from_file_location("promises", REFERENCE / "promises.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_tables_are_what_the_classes_do(promises):
    assert promises.rewritten(PAGE) == PAGE


def test_every_optimizer_class_is_in_them(promises):
    found = {
        name
        for name in rlora.torch.__all__
        if isinstance(kind := getattr(rlora.torch, name), type)
        and issubclass(kind, torch.optim.Optimizer)
    }
    assert found == {name for name in promises.CLASSES if name.isidentifier()}
    table = PAGE.partition("<!-- classes: ")[2].partition("<!-- end of classes -->")[0]
    assert sorted(found) == sorted(re.findall(r"`(\w+)`", table))


def test_the_trials_tell_optimizers_apart(promises):
    """On torch's own optimizers, of which everybody knows the answer."""

    class Twice(rlora.torch.ScaledAdamW):
        def step(self, closure=None):
            for p in self.param_groups[0]["params"]:
                p.grad *= 2
            return super().step(closure)

    assert promises.untouched(rlora.torch.ScaledAdamW)
    assert not promises.untouched(Twice)
    gauss_seidel = type(
        "Turns",
        (rlora.torch.ScaledSGD,),
        {"__init__": lambda self, *a, **k: rlora.torch.ScaledSGD.__init__(self, *a, order="gauss_seidel", **k)},
    )  # fmt: skip
    assert promises.order(gauss_seidel) == "joint"
    assert promises.order(rlora.torch.ScaledSGD) == "separate"
    coupled = rlora.torch.precondition(
        torch.optim.Adam
    )  # decay through the gradient, a sign at first
    assert promises.moments(coupled) == "entries, corrected, eps outside"
    assert promises.decay(coupled) != promises.decay(rlora.torch.ScaledAdamW)

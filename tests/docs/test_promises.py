"""The page of promises: its table is what every class does when it is tried."""

import importlib.util
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


def test_the_table_is_what_the_classes_do(promises):
    assert promises.rewritten(PAGE) == PAGE


def test_the_table_is_not_put_on_a_page_without_its_marks(promises):
    for page, lost in (
        ("a page", "<!-- when"),
        (PAGE.partition("<!-- end of when")[0], "<!-- end"),
    ):
        with pytest.raises(ValueError, match=f"found no {lost}"):
            promises.rewritten(page)


def test_every_optimizer_class_is_tried(promises):
    found = {
        name
        for name in rlora.torch.__all__
        if isinstance(kind := getattr(rlora.torch, name), type)
        and issubclass(kind, torch.optim.Optimizer)
    }
    assert found == {name for name in promises.CLASSES if name.isidentifier()}


def test_the_trials_tell_optimizers_apart(promises):
    """On torch's own optimizers, of which everybody knows the answer."""

    class Twice(rlora.torch.ScaledAdamW):
        def step(self, closure=None):
            for p in self.param_groups[0]["params"]:
                p.grad *= 2
            return super().step(closure)

    assert promises.untouched(rlora.torch.ScaledAdamW)
    assert not promises.untouched(Twice)
    coupled = rlora.torch.precondition(torch.optim.Adam)  # decay through the gradient
    assert promises.decay(coupled) != promises.decay(rlora.torch.ScaledAdamW)

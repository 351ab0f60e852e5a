"""Every public name is in __all__, documented, and its example runs."""

import doctest
import importlib
import inspect

import pytest

import rlora

PUBLIC = ["rlora", "rlora.methods", "rlora.torch", "rlora.backends"]
MODULES = [
    *PUBLIC, "rlora.core.factors", "rlora.core.linalg", "rlora.core.moments",
    "rlora.core.state", "rlora.core.transform", "rlora.methods.scaled", "rlora.pairing", "rlora.testing",
    "rlora.torch.optimizer", "rlora.torch.params", "rlora.torch.scaled", "rlora.torch.wrap",
]  # fmt: skip


@pytest.mark.parametrize("name", PUBLIC)
def test_all_is_sorted_and_true(name):
    module = importlib.import_module(name)
    assert list(module.__all__) == sorted(module.__all__)
    for public in module.__all__:
        assert getattr(module, public).__doc__, f"{name}.{public} has no docstring"


def test_the_contract_of_names():
    """Names that others build on."""
    import rlora.torch

    for name in ("Factors", "Transform", "chain", "apply_updates", "scaled_sgd", "scaled_adamw"):
        assert name in rlora.__all__
    assert "find_pairs" in rlora.__all__
    for name in ("ScaledSGD", "ScaledAdamW", "precondition", "find_pairs", "PairReport"):
        assert name in rlora.torch.__all__


@pytest.mark.parametrize("name", PUBLIC)
def test_functions_say_what_they_take_and_give(name):
    module = importlib.import_module(name)
    for public in module.__all__:
        thing = getattr(module, public)
        if inspect.isfunction(thing) and inspect.signature(thing).parameters:
            assert "Parameters\n" in thing.__doc__, public
            assert "Returns\n" in thing.__doc__, public


def test_methods_cite_their_paper():
    from rlora import methods

    for name in methods.__all__:
        doc = getattr(methods, name).__doc__
        assert "References" in doc
        assert "arXiv:" in doc
        assert ">>>" in doc


@pytest.mark.parametrize("name", MODULES)
def test_examples_run(name):
    result = doctest.testmod(importlib.import_module(name), optionflags=doctest.ELLIPSIS)
    assert result.failed == 0


def test_version():
    from importlib.metadata import version

    assert rlora.__version__ == version("rlora")

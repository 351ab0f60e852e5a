"""Every public name is in __all__, documented, and its example runs."""

import ast
import doctest
import importlib
import inspect
import pkgutil
import subprocess
import sys
from pathlib import Path

import pytest

import rlora

PUBLIC = [
    "rlora",
    "rlora.backends",
    "rlora.initializers",
    "rlora.methods",
    "rlora.optax",
    "rlora.pairing",
    "rlora.testing",
    "rlora.torch",
]
MODULES = [
    info.name
    for info in pkgutil.walk_packages(rlora.__path__[:1], "rlora.")
    if not info.name.startswith(("rlora.backends.", "rlora.cli", "rlora.integrations."))
]
INTEGRATIONS = sorted((Path(rlora.__file__).parent / "integrations").rglob("*.py"))


@pytest.mark.parametrize("name", PUBLIC)
def test_all_is_sorted_and_true(name):
    module = importlib.import_module(name)
    # Constants first, as ruff sorts them.
    assert list(module.__all__) == sorted(module.__all__, key=lambda x: (not x.isupper(), x))
    for public in module.__all__:
        thing = getattr(module, public)
        described = thing.__doc__ or not (inspect.isclass(thing) or inspect.isfunction(thing))
        assert described, f"{name}.{public} has no docstring"


def test_the_contract_of_names():
    """Names that others build on."""
    import rlora.torch

    functional = """Factors Transform chain apply_updates find_pairs scaled_sgd scaled_adamw lora_rite
    lora_pro_sgd lora_pro_adamw lora_fa lora_plus alt_lora ref_lora adapre_lora lora_muon"""
    assert set(functional.split()) <= set(rlora.__all__)
    starts = ("lora_one", "lora_ga", "lora_sb", "pissa", "gaussian", "eva", "olora", "milora")
    assert set(starts) <= set(rlora.initializers.__all__)
    shells = """ScaledSGD ScaledAdamW LoRARite LoRAProSGD LoRAProAdamW LoRAFA LoRAPlus AltLoRA RefLoRA
    AdaPreLoRA LoRAMuon Riemannion RACLoRA LoRASB precondition find_pairs initialize PairReport"""
    assert set(shells.split()) <= set(rlora.torch.__all__)


@pytest.mark.parametrize("name", PUBLIC)
def test_functions_say_what_they_take_and_give(name):
    module = importlib.import_module(name)
    for public in module.__all__:
        thing = getattr(module, public)
        if inspect.isfunction(thing) and inspect.signature(thing).parameters:
            assert "Parameters\n" in thing.__doc__, public
            gives = inspect.signature(thing).return_annotation is not None
            assert not gives or "Returns\n" in thing.__doc__, public


@pytest.mark.parametrize("path", INTEGRATIONS, ids=lambda path: path.stem)
def test_integrations_too(path):
    """Read from the source: most of them import a trainer that is not installed."""
    for thing in ast.parse(path.read_text()).body:
        if isinstance(thing, ast.ClassDef | ast.FunctionDef) and not thing.name.startswith("_"):
            doc = ast.get_docstring(thing)
            assert doc, f"{thing.name} has no docstring"
            if isinstance(thing, ast.FunctionDef):
                assert not ast.unparse(thing.args) or "Parameters\n" in doc, thing.name
                assert ast.unparse(thing.returns) == "None" or "Returns\n" in doc, thing.name


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


def test_parts_that_import_a_framework_come_when_they_are_asked_for():
    """And a class of `rlora.torch` is named where it is."""
    code = """if True:
    import sys, rlora
    try:
        rlora.ScaledAdamW
    except AttributeError as error:
        print(error)
    assert not hasattr(rlora, "nonesuch")
    assert "torch" not in sys.modules
    print(rlora.torch.ScaledAdamW.__name__)
    """
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    where = "optimizers of torch are in rlora.torch"
    assert found.stdout.splitlines() == [
        f"module 'rlora' has no attribute 'ScaledAdamW'; {where}",
        "ScaledAdamW",
    ]


def test_packages_that_need_no_framework_come_when_they_are_asked_for_too():
    code = """if True:
    import sys, rlora
    rlora.testing.check_method, rlora.backends.get, rlora.integrations
    print([name for name in ("torch", "jax", "optax") if name in sys.modules])
    """
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout == "[]\n"


@pytest.mark.parametrize(
    ("package", "library", "extra"),
    [("torch", "torch", "torch"), ("optax", "jax", "jax"), ("optax", "optax", "jax")],
)
@pytest.mark.parametrize(
    "how", ["import rlora.{}", "import rlora; rlora.{}", "from rlora import {}"]
)
def test_without_its_framework_a_package_says_what_to_install(package, library, extra, how):
    pytest.importorskip(extra)
    code = f"""if True:
    import sys
    sys.modules[{library!r}] = None
    try:
        {how.format(package)}
    except ImportError as error:
        print(type(error).__name__, error.name, error)
    """
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    message = f"{library} is not installed: pip install 'rlora[{extra}]'"
    assert found.stdout == f"BackendError {library} {message}\n"

import sys
import types

import pytest

import rlora
from rlora.backends import get
from rlora.cli.bench.cases import ArraySpec
from rlora.cli.bench.problem import random_problem
from rlora.cli.bench.third_party import find_third_party
from rlora.cli.bench.torch_cases import SharedTensors, TorchCase, optax_case

torch = pytest.importorskip("torch")
PROBLEM = random_problem([(40, 30), (24, 30)], 4, seed=0)
BASELINE = ("torch", "adamw")


def built(name):
    shared = SharedTensors(PROBLEM, ArraySpec(get("torch"), "float32", None))
    case = TorchCase(name, BASELINE, find_third_party(name).make, shared)
    assert (case.key, case.ratio_to) == (("torch", name), BASELINE)
    return case


@pytest.mark.parametrize("flag", ["foreach", "fused"])
def test_flags_of_adamw(flag):
    case = built(f"torch.adamw:{flag}")
    assert case._optimizer.param_groups[0][flag]
    assert case.count_operations() > 0


def test_any_torch_optimizer_by_its_path():
    case = built("torch.optim:NAdam")
    case.refresh()
    case.step()
    assert isinstance(case._optimizer, torch.optim.NAdam)


def test_a_class_of_the_folder_one_is_in(tmp_path, monkeypatch):
    (tmp_path / "mine_alone.py").write_text("from torch.optim import SGD as Mine\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [x for x in sys.path if x])
    assert isinstance(built("mine_alone:Mine")._optimizer, torch.optim.SGD)
    monkeypatch.delitem(sys.modules, "mine_alone")


@pytest.mark.parametrize("package", ["bitsandbytes", "torchao"])
def test_packages_that_may_be_there(package, monkeypatch):
    module = types.SimpleNamespace(AdamW8bit=torch.optim.SGD)
    monkeypatch.setitem(sys.modules, f"{package}.optim", module)
    monkeypatch.setitem(sys.modules, package, types.SimpleNamespace(optim=module))
    assert isinstance(built(package)._optimizer, torch.optim.SGD)
    monkeypatch.setitem(sys.modules, f"{package}.optim", None)
    with pytest.raises(rlora.BackendError, match=f"pip install -U {package}"):
        find_third_party(package)


def descend(p, grad):
    p.sub_(1e-3 * grad)


class Compiled(torch.optim.SGD):
    """A step that is compiled whole, which torch does not do under a dispatch mode."""

    @torch.no_grad()
    def step(self, closure=None):
        for p in self.param_groups[0]["params"]:
            torch.compile(descend, fullgraph=True, backend="eager")(p, p.grad)


def test_a_step_that_cannot_be_watched_is_measured(monkeypatch):
    case = built("torch.adamw")
    case._optimizer = Compiled(case._optimizer.param_groups[0]["params"], lr=1e-3)
    assert case.count_operations() is None
    case.step()

    def broken():
        raise RuntimeError("out of memory")

    monkeypatch.setattr(case._optimizer, "step", broken)
    with pytest.raises(RuntimeError, match="out of memory"):
        case.count_operations()


class Absent:
    """A finder that says of a package what Python says of one that is not installed."""

    def __init__(self, package):
        self.package = package

    def find_spec(self, name, path=None, target=None):
        if name == self.package:
            raise ModuleNotFoundError(f"No module named '{name}'", name=name)


def test_a_package_that_is_not_installed_is_not_called_old(monkeypatch):
    for name in [name for name in sys.modules if name.partition(".")[0] == "peft"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(sys, "meta_path", [Absent("peft"), *sys.meta_path])
    with pytest.raises(rlora.BackendError, match=r"peft is not installed: pip install peft$"):
        find_third_party("peft")


@pytest.mark.parametrize("name", ["torchao", "bitsandbytes", "json:JSONDecoder"])
def test_without_torch_its_extra_is_named(name, monkeypatch, tmp_path):
    package = name.partition(":")[0]
    if package != "json":  # they import torch first
        (tmp_path / f"{package}.py").write_text("import torch")
        monkeypatch.syspath_prepend(str(tmp_path))
    for loaded in [x for x in sys.modules if x.partition(".")[0] in ("torch", package)]:
        monkeypatch.delitem(sys.modules, loaded)
    monkeypatch.setattr(sys, "meta_path", [Absent("torch"), *sys.meta_path])
    with pytest.raises(
        rlora.BackendError, match=r"torch is not installed: pip install 'rlora\[torch\]'"
    ):
        find_third_party(name)


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("lion", "module:Class"),
        ("torch.adamw:fast", "torch.adamw:foreach"),
        ("no_such_module:X", "cannot be imported"),
        ("torch.optim:Lion", "cannot be imported"),
        ("torch.optim:LBFGS", "cannot be stepped as step"),
        ("torch.nn:Linear", "cannot be called as Linear"),
        ("types:SimpleNamespace", "cannot be called"),
    ],
)
def test_wrong_names(name, why):
    if why is None:
        assert find_third_party(name).framework == "torch"
        return
    with pytest.raises(ValueError, match=why):
        find_third_party(name)


def test_optax_takes_the_steps_of_optax():
    jax, optax = pytest.importorskip("jax"), pytest.importorskip("optax")
    spec = ArraySpec(get("jax"), "float32", None)
    transformation = find_third_party("optax.adamw").make(None)
    case = optax_case(PROBLEM, spec, transformation, ("jax", "adamw"))
    assert case.compile_s > 0
    case.step()
    params = spec.factors(PROBLEM.pairs)
    adamw = optax.adamw(1e-4, weight_decay=0.01)
    updates, _ = adamw.update(spec.factors(PROBLEM.grads), adamw.init(params), params)
    moved = optax.apply_updates(params, updates)
    same = jax.tree.map(lambda x, y: bool(abs(x - y).max() < 1e-7), case._params, moved)
    assert all(jax.tree.leaves(same))
    assert case.state_bytes() >= 2 * 4 * PROBLEM.parameters
    assert case.peak_temporary_bytes() > 0

"""The how-to of a new method, followed to the letter: its file works, and one export line is enough."""

import importlib.util
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import rlora
from rlora import BackendError
from rlora.backends import get
from rlora.testing import GAUGES, check_method, invariance, make_problem, run

ROOT = Path(__file__).parents[2]
TEXT = (ROOT / "docs" / "how-to" / "new_method.md").read_text(encoding="utf-8")
FILE, CHECKS, OPTAX = re.findall("```python\n(.*?)```", TEXT, re.DOTALL)
(EXPORT,) = re.findall("```text\n(.*?)\n```", TEXT, re.DOTALL)


@pytest.fixture(scope="module")
def unit_lora(tmp_path_factory):
    path = tmp_path_factory.mktemp("method") / "unit.py"
    path.write_text(FILE, encoding="utf-8")
    spec = importlib.util.spec_from_file_location("unit", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.unit_lora


def test_it_is_short():
    assert len(FILE.splitlines()) < 40


@pytest.mark.parametrize("library", ["numpy", "torch"])
def test_it_keeps_the_contract(unit_lora, library):
    try:
        backend = get(library)
    except BackendError as error:
        pytest.skip(str(error))
    check_method(unit_lora, backend)


def test_the_checks_of_the_page_pass(unit_lora):
    exec(CHECKS, {"unit_lora": unit_lora})


@pytest.mark.parametrize("gauge", GAUGES)
def test_it_sees_no_split(unit_lora, gauge):
    assert invariance(unit_lora(), gauge) <= 1e-10
    assert invariance(unit_lora(momentum=0.0, weight_decay=0.1), gauge) <= 1e-10


def test_a_step_has_the_length_of_the_learning_rate(unit_lora):
    """To first order in it, whatever the size of the loss."""
    problem = make_problem()
    for scale in (1.0, 1e6):
        method = unit_lora(momentum=0.0)
        grads = rlora.Factors(*(scale * g for g in problem.grads(problem.params)))
        d, _ = method.update(grads, method.init(problem.params), problem.params)
        parts = problem.params.B @ d.A, d.B @ problem.params.A
        assert sum(float(np.sum(x**2)) for x in parts) == pytest.approx(1.0)


def test_a_gradient_moves_the_weight_by_lr_to_its_diagonal(unit_lora):
    """As the page says; damping takes 1e-2 off, at most, and moves of 1e-6 are straight."""
    rng, lr = np.random.default_rng(0), 1e-6
    lengths = {0.0: [], 0.9: []}
    for m, n, r in [(20, 16, 3), (5, 40, 4), (30, 6, 5), (9, 9, 1)]:
        start = rlora.Factors(A=rng.normal(size=(r, n)), B=rng.normal(size=(m, r)))
        G = rng.normal(size=(m, n))
        for momentum, found in lengths.items():
            method, pair = unit_lora(momentum=momentum), start
            state = method.init(pair)
            for _ in range(80):  # 0.9^80 is 2e-4
                before, grads = pair, rlora.Factors(A=pair.B.T @ G, B=G @ pair.A.T)
                pair, state = rlora.step(method, pair, grads, state, lr)
            found.append(np.linalg.norm(pair.B @ pair.A - before.B @ before.A) / lr)
    assert 0.99 <= min(lengths[0.0]) < max(lengths[0.0]) <= 2**0.5 + 1e-3
    np.testing.assert_allclose(lengths[0.9], np.multiply(lengths[0.0], 10), rtol=1e-2)


def test_it_is_a_transformation_of_optax(unit_lora):
    pytest.importorskip("optax")
    jnp = pytest.importorskip("jax.numpy")
    space = {"unit_lora": unit_lora, "rlora": rlora}
    exec(OPTAX, space)
    params = {"lora_a": jnp.ones((16, 2)), "lora_b": jnp.ones((2, 8))}
    updates, _ = space["optimizer"].update(params, space["optimizer"].init(params), params)
    assert float(jnp.abs(updates["lora_a"]).max()) > 0


def test_from_zero_the_second_step_throws_a(unit_lora):
    """The flaw that the page admits."""
    lengths = []
    for lr in (1e-4, 1e-6):
        problem = make_problem(zero_B=True)
        (first, _), (second, _) = (run(unit_lora(), problem, steps=k, lr=lr) for k in (1, 2))
        lengths.append(float(np.linalg.norm(second.A - first.A)))
    assert lengths[0] == pytest.approx(lengths[1], rel=0.1)


def test_it_has_a_torch_class(unit_lora):
    torch = pytest.importorskip("torch")
    import rlora.torch

    if not hasattr(rlora.torch, "optimizer_class"):
        pytest.skip("rlora.torch has no optimizer_class yet")
    problem = make_problem(zero_B=True)
    A, B = (torch.nn.Parameter(torch.tensor(x)) for x in problem.params)
    kind = rlora.torch.optimizer_class(unit_lora)
    assert kind.__name__ == "UnitLoRA"
    optimizer = kind([A, B], lr=0.05, momentum=0.5, pairs=[(A, B)])
    for _ in range(5):
        optimizer.zero_grad()
        (0.5 * ((B @ A - torch.tensor(problem.target)) ** 2).sum()).backward()
        optimizer.step()
    expected, _ = run(unit_lora(momentum=0.5), problem, steps=5, lr=0.05)
    for p, x in zip((A, B), expected, strict=True):
        np.testing.assert_allclose(p.detach().numpy(), x, rtol=1e-9, atol=1e-9)


@pytest.fixture(scope="module")
def library_with_it(tmp_path_factory):
    """A copy of the library with the file and its export, and nothing else, added."""
    root = tmp_path_factory.mktemp("library")
    ignore = shutil.ignore_patterns("__pycache__")
    shutil.copytree(ROOT / "rlora", root / "rlora", ignore=ignore)
    for folder in ("backends", "cli"):
        shutil.copytree(ROOT / folder, root / "rlora" / folder, ignore=ignore)
    methods = root / "rlora" / "methods"
    (methods / "unit.py").write_text(FILE, encoding="utf-8")
    init = (methods / "__init__.py").read_text(encoding="utf-8")
    named = init.replace("\n]", '\n    "unit_lora",\n]')
    assert named != init
    (methods / "__init__.py").write_text(named.replace("\n\n__all__", f"\n{EXPORT}\n\n__all__"))
    return root


def python(root, code, tmp_path):
    """Output of the code in the copy, from a folder where nothing else can be found."""
    environment = os.environ | {"PYTHONPATH": str(root), "PYTHONDONTWRITEBYTECODE": "1"}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_one_export_line_gives_a_public_name_and_a_row_of_the_bench(library_with_it, tmp_path):
    code = (
        "import rlora; assert 'unit_lora' in rlora.__all__; print(rlora.__file__)\n"
        "from rlora.cli.app import app\n"
        "app(['bench', '--method', 'unit_lora', '--rank', '4', '--quick'])"
    )
    out = python(library_with_it, code, tmp_path)
    assert str(library_with_it) in out
    assert re.search(r"unit_lora\s+numpy", out)


def test_one_export_line_gives_a_name_of_optax(library_with_it, tmp_path):
    pytest.importorskip("optax")
    code = "from rlora.optax import *; print(unit_lora(1e-3, momentum=0.5))"
    assert "GradientTransformation" in python(library_with_it, code, tmp_path)


def test_numbers_of_numpy_do_not_widen_its_state(unit_lora):
    params = rlora.Factors(np.ones((2, 6), np.float32), np.ones((5, 2), np.float32))
    method = unit_lora(momentum=np.float64(0.9))
    moved, state = rlora.step(method, params, params, method.init(params), 0.1)
    widths = {x.dtype for x in (*moved, *rlora.flatten_state(state).values())}
    assert np.dtype("float64") not in widths


def test_one_export_line_gives_a_torch_class(library_with_it, tmp_path):
    pytest.importorskip("torch")
    import rlora.torch

    if not hasattr(rlora.torch, "optimizer_class"):
        pytest.skip("rlora.torch has no optimizer_class yet")
    out = python(library_with_it, "import rlora.torch; print(rlora.torch.UnitLoRA)", tmp_path)
    assert "UnitLoRA" in out

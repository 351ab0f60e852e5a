"""The how-to of a new backend, followed to the letter: a package of its own, found by its arrays."""

import importlib.util
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from rlora.core.backend import Backend
from rlora.core.dispatch import ENTRY_POINT_GROUP

PAGE = Path(__file__).parents[2] / "docs" / "how-to" / "add_backend.md"
TEXT = PAGE.read_text(encoding="utf-8")
FIRST, FILE, CHECK = re.findall("```python\n(.*?)```", TEXT, re.DOTALL)
(PROJECT,) = (tomllib.loads(found) for found in re.findall("```toml\n(.*?)```", TEXT, re.DOTALL))


@pytest.fixture
def package(tmp_path):
    """Files that ``pip install .`` would put beside rlora."""
    pytest.importorskip("array_api_strict")
    (name,) = re.findall(r"^`(\w+\.py)`", TEXT, re.MULTILINE)
    (tmp_path / name).write_text(FILE, encoding="utf-8")
    project = PROJECT["project"]
    info = tmp_path / f"rlora_strict-{project['version']}.dist-info"
    info.mkdir()
    info.joinpath("METADATA").write_text(
        f"Metadata-Version: 2.1\nName: {project['name']}\nVersion: {project['version']}\n"
    )
    points = project["entry-points"]
    lines = [f"[{group}]\n{k} = {v}" for group in points for k, v in points[group].items()]
    info.joinpath("entry_points.txt").write_text("\n".join(lines))
    return tmp_path


def python(code, folder):
    environment = os.environ | {"PYTHONPATH": str(folder), "PYTHONDONTWRITEBYTECODE": "1"}
    done = subprocess.run(
        [sys.executable, "-W", "error::UserWarning", "-c", code],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr


def test_the_library_works_without_a_backend():
    pytest.importorskip("array_api_strict")
    exec(FIRST, {})


def test_the_package_is_found_and_every_method_keeps_the_contract_on_it(package):
    python(f"{FIRST}\n{CHECK}", package)


def test_the_checks_notice_that_the_package_is_not_there(tmp_path):
    with pytest.raises(AssertionError, match="AssertionError"):
        python(f"{FIRST}\n{CHECK}", tmp_path)


def test_a_wrong_inverse_would_be_seen(package):
    wrong = FILE.replace("linalg.inv(S)", "linalg.inv(S) * 1.001")
    (package / "rlora_strict.py").write_text(wrong, encoding="utf-8")
    code = (
        "import numpy as np, rlora\n"
        "from rlora.backends import get\n"
        "from rlora.testing import assert_close, make_problem, run\n"
        "products = [p.B @ p.A for p in (run(rlora.scaled_sgd(), make_problem().on(get(name)))[0]"
        " for name in ('numpy', 'array_api_strict'))]\n"
        "assert_close(products[1], products[0], rtol=1e-9)\n"
    )
    with pytest.raises(AssertionError, match="differ by"):
        python(code, package)


def test_the_file_overrides_what_a_backend_has():
    spec = importlib.util.spec_from_loader("rlora_strict", loader=None)
    module = importlib.util.module_from_spec(spec)
    exec(FILE, module.__dict__)
    own = [name for name in vars(module.BACKEND) if not name.startswith("__")]
    assert own == ["spd_power"]
    assert issubclass(module.BACKEND, Backend)
    assert list(PROJECT["project"]["entry-points"]) == [ENTRY_POINT_GROUP]


def test_the_table_names_operations_that_there_are():
    rows = [line for line in TEXT.splitlines() if line.startswith("| `")]
    operations = [
        operation for row in rows for operation in re.findall(r"`(\w+)`", row.split("|")[1])
    ]
    assert len(operations) > 10
    assert all(callable(getattr(Backend, operation)) for operation in operations)

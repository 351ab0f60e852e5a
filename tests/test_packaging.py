"""The wheel holds rlora/ and nothing else, the package list equals the tree, the sdist builds it."""

import email
import shutil
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
CONFIG = tomllib.loads((ROOT / "pyproject.toml").read_text())


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """Wheel from sdist, as an index would get them; the build tools are those installed here."""
    out = tmp_path_factory.mktemp("dist")
    subprocess.run(
        [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(out), str(ROOT)],
        check=True,
        capture_output=True,
        timeout=1200,
    )
    return next(out.glob("*.whl")), next(out.glob("*.tar.gz"))


def test_package_list_equals_the_tree():
    listed = CONFIG["tool"]["setuptools"]["packages"]
    mapped = {
        "rlora": ROOT / "rlora",
        "rlora.backends": ROOT / "backends",
        "rlora.cli": ROOT / "cli",
    }
    found = set()
    for package, folder in mapped.items():
        for init in folder.rglob("__init__.py"):
            found.add(".".join((package, *init.parent.relative_to(folder).parts)))
    assert sorted(listed) == sorted(found)


def test_wheel_holds_only_rlora(built):
    wheel, _ = built
    names = zipfile.ZipFile(wheel).namelist()
    tops = {name.split("/")[0] for name in names}
    assert tops == {"rlora", f"rlora-{wheel.name.split('-')[1]}.dist-info"}
    inside = {name for name in names if name.startswith("rlora/")}
    data = {"rlora/py.typed", "rlora/cli/bench/report.html", "rlora/torch/method_classes.pyi"}
    data.add("rlora/optax/method_transformations.pyi")
    assert data | {"rlora/backends/torch.py", "rlora/cli/__init__.py"} <= inside
    modules = {path.relative_to(ROOT).as_posix() for path in (ROOT / "rlora").rglob("*.py")}
    assert "rlora/integrations/ms_swift/rlora_ms_swift.py" in modules <= inside
    assert all(name.endswith(".py") for name in inside - data)
    assert not [name for name in names if "test" in name and not name.startswith("rlora/testing/")]
    assert any(name.endswith("licenses/LICENSE") for name in names)


def test_metadata(built):
    archive = zipfile.ZipFile(built[0])
    (name,) = [n for n in archive.namelist() if n.endswith("METADATA")]
    meta = email.message_from_bytes(archive.read(name))
    assert meta["Requires-Python"] == ">=3.11"
    assert meta["License-Expression"] == "Apache-2.0"
    needs = meta.get_all("Requires-Dist")
    base = {n.split(">")[0] for n in needs if "extra" not in n}
    assert base == {"numpy", "array-api-compat", "click", "rich", "threadpoolctl", "safetensors"}
    assert not [n for n in needs if "@" in n]
    extras = {"torch", "jax", "cupy", "peft", "plot", "bench", "docs", "test", "demo", "lint"}
    assert extras <= set(meta.get_all("Provides-Extra"))
    assert [n for n in needs if n.startswith("torch==2.13.0")] == ['torch==2.13.0; extra == "test"']


def test_sdist_holds_the_sources(built):
    with tarfile.open(built[1]) as archive:
        names = {n.partition("/")[2] for n in archive.getnames()}
    assert {"backends/torch.py", "cli/__init__.py", "rlora/core/linalg.py", "LICENSE"} <= names


CLONE = """
import sys
sys.path[:] = {path!r}
import numpy, rlora.cli.app
from rlora.core.backend import Backend
from rlora.core.dispatch import get_backend
kind = type(get_backend(numpy.ones(2)))
print(kind is not Backend, rlora.backends.__file__, rlora.cli.__file__)
"""


def test_a_clone_has_its_backends_however_it_was_installed(tmp_path):
    """As after a plain `pip install .`: no finder of an editable installation (-S reads no .pth)."""
    for name in ("rlora", "backends", "cli"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    installed = [path for path in sys.path if path and Path(path) != ROOT]
    code = CLONE.format(path=[str(tmp_path), *installed])
    done = subprocess.run([sys.executable, "-I", "-S", "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    fast, *files = done.stdout.split()
    assert fast == "True"
    assert all(Path(file).is_relative_to(tmp_path) for file in files)


def test_without_its_project_file_the_folder_takes_nothing_from_beside_it(tmp_path):
    """Vendored into another project, `backends/` beside it is that project's own."""
    shutil.copytree(ROOT / "rlora", tmp_path / "rlora")
    (tmp_path / "backends").mkdir()
    (tmp_path / "backends" / "__init__.py").write_text("raise SystemExit('not ours')")
    (tmp_path / "pyproject.toml").write_text('[project]\nname = "other"\n')
    installed = [path for path in sys.path if path and Path(path) != ROOT]
    code = CLONE.format(path=[str(tmp_path), *installed]).replace("rlora.cli.app", "rlora")
    code = code.replace("rlora.backends.__file__, rlora.cli.__file__", "rlora.__path__")
    done = subprocess.run([sys.executable, "-I", "-S", "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["False", f"['{tmp_path / 'rlora'}']"]

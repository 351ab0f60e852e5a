"""The site is built without a warning and without a network, and every public name is on it."""

import importlib
import os
import re
import subprocess
import sys
import zlib
from pathlib import Path
from urllib.parse import urlsplit

import pytest

for package in (
    "sphinx",
    "furo",
    "myst_parser",
    "numpydoc",
    "sphinx_click",
    "torch",
    "jax",
    "optax",
):
    pytest.importorskip(package, reason=f"the site needs {package}")


ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
TEXTS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted(DOCS.rglob("*.md"))]
FOLDERS = {"rlora": ROOT / "rlora", "rlora.backends": ROOT / "backends"}
PUBLIC = (
    ["rlora.cli"]
    + [  # whose own packages are seen as commands
        ".".join((package, *path.relative_to(folder).parts[:-1]))
        for package, folder in FOLDERS.items()
        for path in folder.rglob("__init__.py")
        if re.search("^__all__ = ", path.read_text(encoding="utf-8"), re.MULTILINE)
    ]
)
DEAD = dict.fromkeys(("http_proxy", "https_proxy", "all_proxy"), "http://127.0.0.1:9")


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    out = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "sphinx", "--fail-on-warning", "--keep-going", "--quiet"]
    done = subprocess.run(
        [*command, "-d", out / "doctrees", DOCS, out / "html"],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, **DEAD},
    )
    assert done.returncode == 0, done.stderr
    return out / "html"


@pytest.fixture(scope="module")
def names(site):
    """Names in the inventory of the site."""
    packed = (site / "objects.inv").read_bytes().split(b"\n", 4)[4]
    return {line.split()[0] for line in zlib.decompress(packed).decode().splitlines()}


@pytest.mark.parametrize("module", PUBLIC)
def test_every_public_name_is_on_a_page(names, module):
    found = importlib.import_module(module)
    assert module in names
    assert {f"{module}.{name}" for name in found.__all__} <= names


def test_every_command_is_on_the_page(site):
    page = (site / "reference" / "cli.html").read_text(encoding="utf-8")
    for command in (
        "bench",
        "bench-run",
        "bench-compare",
        "bench-report",
        "info",
        "reproduce",
        "study",
    ):
        assert f'id="rlora-{command}"' in page


def test_it_can_be_searched(site):
    assert (site / "search.html").is_file()
    index = (site / "searchindex.js").read_text(encoding="utf-8")
    assert '"reference/methods/lora_rite"' in index


def test_it_loads_nothing_from_elsewhere(site):
    for page in site.rglob("*.html"):
        text = page.read_text(encoding="utf-8")
        assert not re.findall(r'<(?:script|img|iframe)[^>]*\ssrc="(?:https?:)?//', text), page
        assert not re.findall(r'<link[^>]*\shref="(?:https?:)?//', text), page


@pytest.mark.parametrize("path", TEXTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_are_links(path):
    """On a code host too: files are there, and addresses are addresses (`make linkcheck` asks them)."""
    for target in re.findall(r"\]\(([^)\s]+)\)", path.read_text(encoding="utf-8")):
        address = urlsplit(target)
        if address.scheme:
            assert address.scheme == "https", target
            assert address.netloc.count("."), target
        elif address.path:
            assert (path.parent / address.path).exists(), target

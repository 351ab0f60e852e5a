"""SECURITY.md: its code, and the files it names."""

import re
from pathlib import Path

import numpy as np
import pytest

import rlora

pytest.importorskip("safetensors")

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "SECURITY.md").read_text(encoding="utf-8")


def test_a_functional_state_goes_through_safetensors(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (code,) = re.findall("```python\n(.*?)```", PAGE, re.DOTALL)
    before, save = code.split("flat = ")
    space = {}
    exec(before, space)
    pair, method = space["pair"], space["method"]
    grads = rlora.Factors(np.full((2, 5), 0.5), np.ones((3, 2)))
    pair, space["state"] = rlora.step(method, pair, grads, space["state"], 0.1)
    expected = rlora.flatten_state(space["state"])
    exec("flat = " + save, space)
    found = rlora.flatten_state(space["state"])
    assert found.keys() == expected.keys()
    assert all(np.array_equal(found[key], expected[key]) for key in expected)


def test_the_files_it_names_are_there():
    named = re.findall(r"`(tests/[\w/.]*|\.ci/run|\.github/workflows|pyproject\.toml)`", PAGE)
    assert len(named) > 6
    assert [name for name in named if not (ROOT / name).exists()] == []
    for target, anchor in re.findall(r"\]\(([\w/.-]+)#([\w-]+)\)", PAGE):
        headings = re.findall(r"^#+ (.*)$", (ROOT / target).read_text(), re.MULTILINE)
        assert anchor in {heading.lower().replace(" ", "-") for heading in headings}

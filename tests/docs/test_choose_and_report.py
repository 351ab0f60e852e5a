"""The how-tos of choosing a method and of reporting a problem: what they name is there and runs."""

import re
from pathlib import Path

import pytest
import torch
from models import loss_of, make_model

import rlora
import rlora.torch

HOW_TO = Path(__file__).parents[2] / "docs" / "how-to"
CHOOSE, REPORT = (
    (HOW_TO / name).read_text(encoding="utf-8") for name in ("choose.md", "report_a_problem.md")
)
SPANS = re.findall("`([^`\n]+)`", re.sub("```.*?```", "", CHOOSE, flags=re.DOTALL))
CALLS = sorted(
    {span for span in SPANS if re.fullmatch(r"[\w.]+\(.*\)", span) and "..." not in span}
)


def test_the_table_has_calls():
    assert len(CALLS) > 8
    assert sum(call.startswith("rlora.") for call in CALLS) >= 2


@pytest.mark.parametrize("call", [call for call in CALLS if "diagnostics" not in call])
def test_every_call_of_the_table_can_be_made(call):
    space = {name: getattr(rlora.torch, name) for name in rlora.torch.__all__}
    model = make_model(bias="Prodigy" not in call)  # which wants a rate for a head
    space |= {"rlora": rlora, "model": model, "lr": 1e-3, "tuned": 1e-3, "s": 2.0}
    space |= {"ThatOptimizer": torch.optim.NAdam, "p": torch.nn.Parameter(torch.ones(2, 2))}
    made = eval(call.replace("requires_grad_(", "p.requires_grad_("), space)
    if isinstance(made, torch.optim.Optimizer):
        assert len(made.report) == 2
        loss_of(space["model"]).backward()
        made.step()


def test_every_class_that_is_named_is_there():
    named = {span for span in SPANS if re.fullmatch(r"(LoRA|Scaled|Ref|Alt|Graft)\w+", span)}
    assert len(named) >= 4
    assert named <= set(rlora.torch.__all__)


ROWS = re.findall(
    r"^\| (.*?) \| (.*?) \|$",
    CHOOSE.partition("## First learning rates")[2].partition("##")[0],
    re.M,
)[2:]
FIRST = {name: rate for row, rate in ROWS for name in re.findall("`([A-Z]\\w+)`", row)}
"""Class -> the first learning rate that the page gives it."""


def test_every_class_has_one_first_learning_rate():
    named = [name for row, _ in ROWS for name in re.findall("`([A-Z]\\w+)`", row)]
    assert sorted(named) == sorted(
        [*rlora.torch.method_classes.__all__, "ScaledAdamW", "ScaledSGD"]
    )


def moved(name, scale):
    """Length of a first step of the product from gradients of this scale."""
    model = torch.nn.Module()
    generator = torch.Generator().manual_seed(0)
    for factor, shape in (("lora_A", (4, 16)), ("lora_B", (32, 4))):
        start = torch.randn(shape, generator=generator, dtype=torch.float64)
        setattr(model, factor, torch.nn.Parameter(start / 4))
    optimizer = getattr(rlora.torch, name)(model, lr=1e-6)
    before = (model.lora_B @ model.lora_A).detach()
    G = scale * torch.randn((32, 16), generator=generator, dtype=torch.float64)
    (model.lora_B @ model.lora_A * G).sum().backward()
    optimizer.step()
    return torch.linalg.norm((model.lora_B @ model.lora_A).detach() - before).item()


@pytest.mark.parametrize("name", FIRST)
def test_the_suggested_rate_is_for_steps_that_do_not_go_with_the_size_of_the_gradient(name):
    """Adam's eps, 1e-8 beside gradients of 1, and a step that is not infinitely short: below 1 %."""
    ratio = moved(name, 2.0) / moved(name, 1.0)
    assert ratio == pytest.approx(2.0 if "not `suggest_lr`" in FIRST[name] else 1.0, rel=1e-2)


@pytest.mark.parametrize("lr, share", [(1.0, 0.5), (1e-3, 1e-3)])
def test_scaled_prodigy_wants_a_rate_of_one(lr, share):
    """At 1e-3 it hardly trains, as two pages say: the size that it finds stays where it began."""
    torch.manual_seed(0)
    model, target = torch.nn.Module(), torch.randn(32, 4) @ torch.randn(4, 16) / 8
    model.lora_A, model.lora_B = map(
        torch.nn.Parameter, (torch.randn(4, 16) / 4, torch.zeros(32, 4))
    )
    optimizer, losses = rlora.torch.ScaledProdigy(model, lr=lr), []
    for _ in range(100):
        optimizer.zero_grad()
        loss = (model.lora_B @ model.lora_A - target).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    gained = 1 - losses[-1] / losses[0]
    assert gained > share if lr == 1.0 else 0 < gained < share


def test_options_that_are_named_are_options():
    options = re.findall(r'\b(damping|damping_mode|placement|compute_dtype)="?([\w.-]+)', CHOOSE)
    assert len(options) > 5
    for name, value in options:
        value = float(value) if name == "damping" else value
        rlora.torch.ScaledAdamW(make_model(), **{name: value})


def test_what_a_report_asks_for_can_be_had(capsys):
    rich = pytest.importorskip("rich")
    of_what, what_happened, smallest = re.findall("```python\n(.*?)```", REPORT, re.DOTALL)
    model = make_model()
    optimizer = rlora.torch.ScaledAdamW(model, lr=1e-2)

    def train_step():
        loss_of(model).backward()
        optimizer.step()

    space = {"rlora": rlora, "rich": rich, "model": model, "optimizer": optimizer}
    exec(of_what, space)
    said = capsys.readouterr().out
    assert "damping: 0.01" in said
    assert "2 pairs, 2 unpaired parameters, 0 refused" in said
    exec(what_happened, space | {"train_step": train_step})
    assert "cond" in capsys.readouterr().out
    exec(smallest, {})
    before, after = map(float, capsys.readouterr().out.split())
    assert after < before


def test_the_commands_are_commands():
    from click.testing import CliRunner

    from rlora.cli.app import app

    commands = re.findall(r"(?:^    |`)rlora ([a-z ]+)((?: --[a-z]+)?)", REPORT, re.MULTILINE)
    assert [command.strip() for command, _ in commands] == ["info", "bench run"]
    for command, option in commands:
        shown = CliRunner().invoke(app, [*command.split(), "--help"])
        assert shown.exit_code == 0
        assert option.strip() in shown.output

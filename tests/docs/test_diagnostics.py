"""The how-to of diagnostics: its tables are the script's, and what the text says of them holds."""

import importlib.util
import io
import re
from itertools import pairwise
from pathlib import Path

import pytest
from rich.console import Console

HOW_TO = Path(__file__).parents[2] / "docs" / "how-to"
TEXT = (HOW_TO / "diagnostics.md").read_text(encoding="utf-8")
TABLES = re.findall("```text\n(.*?)```", TEXT, re.DOTALL)


@pytest.fixture(scope="module")
def diagnose():
    spec = importlib.util.spec_from_file_location("diagnose", HOW_TO / "diagnose.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def printed(show):
    out = io.StringIO()
    show(Console(file=out, width=80))
    return out.getvalue()


def number(word):
    try:
        return float(word.rstrip("%,:"))
    except ValueError:
        return None


def test_the_page_shows_what_the_script_prints(diagnose):
    absolute, _, relative = printed(diagnose.no_effect).partition("damping=1e-6")
    thrown, _, covariant = printed(diagnose.thrown_away).partition("covariant, ")
    assert relative
    assert covariant
    found, shown = (absolute + thrown).split(), "".join(TABLES).split()
    assert len(TABLES) == 2
    assert len(found) == len(shown)
    for ours, theirs in zip(found, shown, strict=True):
        if (x := number(ours)) is None:
            assert ours.strip("─") == theirs.strip("─")
        else:
            # Two digits are shown; float32 steps differ in the last bits between machines.
            assert x == pytest.approx(number(theirs), rel=0.1)


def test_pefts_damping_has_no_effect_on_a(diagnose):
    numbers, distance = diagnose.run(diagnose.PUBLISHED, 1e-4, 10, **diagnose.ABSOLUTE)
    assert distance < 0.02
    assert numbers["rlora/anisotropy_B/max"] < 0.01
    assert numbers["rlora/damped_cond_B/max"] < 1.1
    assert numbers["rlora/cond_B/min"] > 30
    numbers, distance = diagnose.run(diagnose.PUBLISHED, 1e-4, 10, **diagnose.RELATIVE)
    assert distance > 0.5
    assert numbers["rlora/anisotropy_B/min"] > 0.5
    assert numbers["rlora/damped_cond_B/max"] == pytest.approx(
        numbers["rlora/cond_B/max"], rel=0.01
    )


def test_the_second_step_of_a_does_not_depend_on_the_learning_rate(diagnose):
    rates = (1e-1, 1e-2, 1e-3, 1e-4)
    seen = [diagnose.run(diagnose.ScaledSGD, lr, 2, **diagnose.RELATIVE)[0] for lr in rates]
    steps = [numbers["rlora/step_A/max"] for numbers in seen]
    assert min(steps) > 8
    assert max(steps) < 1.05 * min(steps)
    weights = [numbers["rlora/step_in_weight/max"] for numbers in seen]
    assert all(7 < a / b < 12 for a, b in pairwise(weights))


def test_covariant_damping_holds_a_and_leaves_more_to_the_factor_later(diagnose):
    options = {"damping": 1e-2, "damping_mode": "covariant"}
    numbers, _ = diagnose.run(diagnose.ScaledSGD, 1e-2, 2, **options)
    assert numbers["rlora/step_A/max"] < 1 / 300
    assert numbers["rlora/damped_B/count"] == 2
    later, _ = diagnose.run(diagnose.ScaledSGD, 1e-2, 40, **options)
    assert later["rlora/damped_B/count"] == 2
    more = later["rlora/damped_cond_B/max"] / numbers["rlora/damped_cond_B/max"]
    assert 1.7 < more < 2.3


def test_the_snippets_name_what_there_is():
    import rlora.torch

    for name in re.findall(r"rlora\.torch\.(\w+)\(", TEXT):
        assert name in rlora.torch.__all__

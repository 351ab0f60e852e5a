"""The model beside the measurement: its flops are those of the pages, its peaks are peaks."""

import ast
import re
from pathlib import Path

import numpy as np
import pytest

import rlora.methods
from rlora import Factors
from rlora.backends import get
from rlora.cli.bench.cases import ArraySpec, functional_cases, method_names
from rlora.cli.bench.cost_model import FROZEN, least_seconds, state_numbers, work
from rlora.cli.bench.problem import random_problem, with_gradients
from rlora.cli.bench.roofline import Peaks, measure_peaks

PAGES = Path(__file__).parents[2] / "docs" / "reference" / "methods"
NAMES = {
    "lora_pro_sgd": 'lora_pro_sgd(gauge="balanced")',
    "scaled_adamw:before": 'scaled_adamw(placement="before")',
    "scaled_adamw:after": 'scaled_adamw(placement="after")',
    "peft": 'scaled_adamw(placement="before")',
}
SHAPES = [(768, 512, 4), (512, 1024, 6)]


def on_the_pages(column=2):
    """The column of flops, or another, by call."""
    found = {}
    for path in PAGES.glob("*.md"):
        for line in path.read_text(encoding="utf-8").splitlines():
            cells = [cell.strip().strip("`") for cell in line.strip("|").split(" | ")]
            if re.match(r"\| `\w+\(", line) and len(cells) >= 3:
                found[cells[0]] = cells[column]
    return found


def value(formula, m, n, r):
    tree = ast.parse(formula, mode="eval")
    allowed = (ast.Expression, ast.BinOp, ast.Name, ast.Constant, ast.operator, ast.Load)
    assert all(isinstance(node, allowed) for node in ast.walk(tree)), formula
    return eval(compile(tree, "page", "eval"), {"m": m, "n": n, "r": r})


@pytest.mark.parametrize("name", [*method_names(), "peft"])
def test_flops_are_those_of_the_pages(name):
    """And of products of r x r matrices, which the pages leave out."""
    call = NAMES.get(name, f"{name}()")
    if call not in on_the_pages():
        pytest.skip("a placement without a row of its own")
    for m, n, r in SHAPES:
        flops = work(name, random_problem([(m, n)], r, 0), 4, 0).flops
        expected = value(on_the_pages()[call], m, n, r)
        assert expected <= flops <= 1.05 * expected
        assert (flops - expected) % (2 * r**3) == 0


@pytest.mark.parametrize("name", rlora.methods.__all__)
def test_numbers_kept_are_those_of_the_pages(name):
    formula = on_the_pages(1)[NAMES.get(name, f"{name}()")]
    for shape in SHAPES:
        assert state_numbers(name, *shape) == value(formula, *shape)


def test_every_method_has_a_prediction():
    problem = random_problem([(40, 30)], 4, 0)
    for name in method_names():
        assert work(name, problem, 4, 0) is not None
    assert work("brand_new", problem, 4, 0) is None
    assert set(rlora.methods.__all__) >= FROZEN.keys()


def test_an_adapter_of_a_rank_above_a_side_of_its_weight_is_counted():
    pair = Factors(np.ones((8, 6), np.float32), np.ones((20, 8), np.float32))
    found = work("scaled_adamw:before", with_gradients([pair], 0), 4, 0)
    assert found.flops >= 4 * (20 + 6) * 8**2


def test_bytes_added_up_by_hand():
    problem = random_problem([(40, 30), (24, 30)], 4, 0)
    numbers = 4 * (70 + 54)
    found = work("scaled_adamw", problem, 4, state_bytes=1000)
    assert found.bytes == 3 * 4 * numbers + 2000
    long = 6 * (70 + 54) * 16
    assert long <= found.flops < 1.5 * long
    assert (found.flops - long) % (2 * 4**3) == 0  # the rest are products of 4 x 4 matrices
    assert work("lora_fa", problem, 2, 0).bytes == 2 * 7 * (40 + 24) * 4
    assert work("torch.adamw:foreach", problem, 4, 0).flops == 0
    for placement in ("before", "after"):
        rest = work(f"scaled_adamw:{placement}", problem, 4, 0).flops - 4 * (70 + 54) * 16
        assert 0 <= rest < 2 * (70 + 54) * 16


@pytest.mark.parametrize("name", FROZEN)
def test_a_factor_that_is_left_alone_is_not_counted_as_moved(name):
    problem = random_problem([(40, 30)], 4, 0)
    (case,) = functional_cases(problem, ArraySpec(get("numpy"), "float32", None), [name])
    stepper = case.build()
    before = [x.copy() for x in stepper._params[0]]
    stepper.step()
    still = [np.array_equal(x, y) for x, y in zip(before, stepper._params[0], strict=True)]
    assert any(still) or name == "lora_sb"


def test_the_longer_of_two_is_the_least_time():
    peaks = Peaks("numpy", "cpu", bytes_per_s=10.0, flops_per_s=100.0)
    assert least_seconds(flops=100, moved=100, peaks=peaks) == 10.0
    assert least_seconds(flops=10_000, moved=100, peaks=peaks) == 100.0


@pytest.mark.parametrize("library", ["numpy", "torch", "jax"])
def test_peaks_are_measured(library):
    pytest.importorskip(library)
    found = measure_peaks(ArraySpec(get(library), "float32", None))
    assert found.backend == library
    better = found._replace(bytes_per_s=found.bytes_per_s * 2, flops_per_s=0.0)
    both = found.or_better(better)
    assert (both.bytes_per_s, both.flops_per_s) == (better.bytes_per_s, found.flops_per_s)
    assert found.or_better(None) == found

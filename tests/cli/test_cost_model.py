"""The model beside the measurement: its flops and bytes are those of a step, its peaks peaks."""

import ast
from pathlib import Path

import numpy as np
import pytest

import rlora.methods
from rlora import Factors
from rlora.backends import get
from rlora.cli.bench.cases import BASELINES, ArraySpec, functional_cases, make_method, method_names
from rlora.cli.bench.cost_model import (
    FROZEN,
    Peaks,
    _Counter,
    _counting,
    least_seconds,
    measure_peaks,
    state_numbers,
    step_cost,
    step_flops,
)
from rlora.cli.bench.problem import random_problem
from rlora.core.dispatch import get_backend

SHAPES = [
    (768, 512, 4),
    (24, 1024, 6),
    (40, 24, 4),
    (20, 6, 8),
    (6, 20, 8),
    (200, 6, 8),
    (6, 200, 8),
]


@pytest.mark.parametrize("name", [*method_names(), *BASELINES])
def test_a_large_layer_is_counted_in_small_ones(name):
    """And to the last flop; that a step does those of its page is tests/docs/test_methods.py."""
    rng, method = np.random.default_rng(0), make_method(name)
    for m, n, r in SHAPES:
        params, grads = (
            Factors(rng.normal(size=(r, n)), rng.normal(size=(m, r))) for _ in range(2)
        )
        assert step_cost(name, {(m, n, r): 3}, 4, 0).flops == 3 * step_flops(method, params, grads)
        state = rlora.flatten_state(method.init(params))
        assert state_numbers(name, m, n, r) == sum(x.size for x in state.values())


def test_the_counter_by_hand():
    counter, rng = _Counter(np), np.random.default_rng(0)
    counter.matmul(rng.normal(size=(3, 4, 5)), rng.normal(size=(5, 6)))
    assert counter.flops == 3 * (2 * 4 * 5 * 6)
    counter.linalg.qr(rng.normal(size=(2, 7, 3)))  # 2 N k^2 for R, and for Q
    assert counter.flops == 720 + 2 * (4 * 7 * 3**2)
    counter.linalg.eigh(np.eye(3))  # of r x r matrices alone, which is left out
    assert counter.flops == 720 + 504


@pytest.mark.parametrize("folder", ["core", "methods"])
def test_the_counter_sees_every_product(folder):
    """No product but `matmul` and `qr` of a namespace; other factorisations are of r x r."""
    counted_or_small = {"qr", "eigh", "svd", "trace", "diagonal", "vector_norm"}
    uncounted = {"dot", "einsum", "inner", "kron", "matvec", "outer", "tensordot", "vdot", "vecdot"}
    for path in sorted((Path(rlora.__file__).parent / folder).glob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            where = f"{path.name}: {ast.unparse(node)}"
            if isinstance(node, ast.MatMult):
                assert path.name == "rebalance.py"  # of NumPy, r x r, once
            elif isinstance(node, ast.Attribute):
                owner = ast.unparse(node.value).rpartition(".")[2]
                assert owner != "xp" or node.attr not in uncounted, where
                assert owner != "linalg" or node.attr in counted_or_small, where


def test_counting_ends_with_its_block():
    usual = get_backend(np.ones(1))
    with _counting() as counter:
        assert get_backend(np.ones(1)).xp is counter
    assert get_backend(np.ones(1)) is usual
    with pytest.raises(ValueError, match="no step"), _counting():
        raise ValueError("no step")
    assert get_backend(np.ones(1)) is usual


def test_every_method_has_a_prediction():
    for name in method_names():
        assert step_cost(name, {(40, 30, 4): 1}, 4, 0) is not None
    assert step_cost("brand_new", {(40, 30, 4): 1}, 4, 0) is None
    assert set(rlora.methods.__all__) >= FROZEN.keys()


def test_work_added_up_by_hand():
    shapes = {(40, 30, 4): 1, (24, 30, 4): 1}
    numbers, product = 4 * (70 + 54), 2 * 4**3
    found = step_cost("scaled_adamw", shapes, 4, state_bytes=1000)
    assert found.bytes == 3 * 4 * numbers + 2000
    assert step_cost("torch.adamw:foreach", shapes, 4, 0).flops == 0
    # Grams and one application, or two of halves; and of 4 x 4 matrices, for both pairs:
    for placement, long, small in (
        ("before", 2, 1 + 2),  # Q w Qᵀ of the inner Gram, and of both damped ones
        ("after", 2, 3 + 4 * 2),  # and F = S Pᵀ, F², F⁴ and Pᵀ F⁴ on both sides
        ("both", 3, 1 + 2 * 2 + 5 * 2),  # Pᵀ P, a QR as two on either side, and P F besides
    ):
        name = "scaled_adamw" if placement == "both" else f"scaled_adamw:{placement}"
        flops = step_cost(name, shapes, 4, 0).flops
        assert flops == long * 2 * 4 * numbers + 2 * small * product


@pytest.mark.parametrize("item", [2, 4])
def test_bytes_with_a_factor_that_stays_added_up_by_hand(item):
    """The state is of float32 beside factors of 16 bits too."""
    (m, n, r), state = (40, 30, 4), 1000
    for name, numbers, times in (
        ("lora_fa", 3 * m * r, 2),  # B is read and written, its gradient read
        ("rac_lora", (3 * m + n) * r, 2),  # A is read
        ("lora_sb", 3 * n * r, 1),  # most of the state is the start of A, which is read
    ):
        assert (
            step_cost(name, {(m, n, r): 3}, item, state).bytes == 3 * item * numbers + times * state
        )


@pytest.mark.parametrize("name", FROZEN)
def test_a_factor_that_is_left_alone_is_not_counted_as_moved(name):
    problem = random_problem([(40, 30)], 4, 0)
    (case,) = functional_cases(problem, ArraySpec(get("numpy"), "float32", None), [name])
    before = [x.copy() for x in case._params[0]]
    case.step()
    still = [np.array_equal(x, y) for x, y in zip(before, case._params[0], strict=True)]
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

import gc

import numpy as np
import pytest

import rlora
import rlora.methods
from rlora.backends import get
from rlora.cli.bench import memory, timing
from rlora.cli.bench.cases import ArraySpec, Case, baseline_of, functional_cases
from rlora.cli.bench.problem import PRESETS, random_problem, with_gradients
from rlora.cli.bench.third_party import find_third_party
from rlora.cli.bench.timing import Rounds, Timing, verdict
from rlora.cli.bench.torch_cases import SharedTensors, TorchCase, torch_class

PROBLEM = random_problem([(40, 30), (24, 30)], 4, seed=0)


def test_verdict_says_what_is_wrong_and_what_to_do():
    assert verdict(0.1, load=0.0) == "ok"
    assert "spread 23.4% > 15%; close other programs or raise --repeat" in verdict(0.234, load=0.0)
    assert "raise --seconds or --repeat" in verdict(None, load=0.0)
    assert verdict(0.0, load=1e4).endswith("close other programs or use --threads 1")
    assert verdict(0.0, load=1e4, threads=1).endswith("close other programs")


def test_presets_have_the_sizes_of_their_models():
    parameters = {  # of LoRA at rank 8 on these targets, added up by hand
        "gpt2-medium": 8 * 24 * (3072 + 1024),
        "smollm2-135m": 8 * 30 * (2 * 1152 + 2 * 768 + 3 * 2112),
        "llama-7b": 8 * 64 * 8192,
        "llama-7b-all": 8 * 32 * (4 * 8192 + 3 * 15104),
        "mistral-7b": 8 * 32 * (8192 + 5120),
        "roberta-base": 8 * 24 * 1536,
    }
    for name, expected in parameters.items():
        assert sum(8 * (m + n) for m, n in PRESETS[name].pairs()) == expected
    counts = {name: len(preset.pairs()) for name, preset in PRESETS.items()}
    assert (counts["smollm2-135m"], counts["llama-7b-quarter"], counts["gemma-2b"]) == (210, 56, 36)


def test_problems_are_seeded_and_of_full_rank():
    again, other = (random_problem([(40, 30), (24, 30)], 4, seed) for seed in (0, 1))
    np.testing.assert_array_equal(PROBLEM.pairs[1].B, again.pairs[1].B)
    assert not np.array_equal(PROBLEM.pairs[1].B, other.pairs[1].B)
    assert np.linalg.matrix_rank(PROBLEM.pairs[0].B @ PROBLEM.pairs[0].A) == 4
    assert PROBLEM.parameters == 4 * (70 + 54)
    assert PROBLEM.rank == 4


def test_an_adapter_of_two_ranks_says_both():
    mixed = [*PROBLEM.pairs, *random_problem([(10, 10)], 2, 0).pairs]
    assert with_gradients(mixed, 0).rank == [2, 4]


@pytest.mark.parametrize("name", rlora.methods.__all__)
@pytest.mark.parametrize("library", ["numpy", "jax", "array_api_strict"])
def test_a_functional_case_takes_the_steps_of_the_method(library, name):
    spec = ArraySpec(get(library), "float32", None)
    plain, case = functional_cases(PROBLEM, spec, [baseline_of(name), name])
    method = getattr(rlora.methods, name)()
    params, state = PROBLEM.pairs, method.init(PROBLEM.pairs)
    # Riemannion's second step from an equal gradient rests on singular values that are rounding.
    for _ in range(1 if name == "riemannion" else 2):
        case.step()
        params, state = rlora.step(method, params, PROBLEM.grads, state, 1e-4)
        A, B = map(spec.backend.to_numpy, case._params[0])
        # The product, as some methods choose its factors anew, and rounding may choose otherwise.
        np.testing.assert_allclose(B @ A, params[0].B @ params[0].A, rtol=1e-4, atol=1e-6)
    assert case.state_bytes() == sum(x.nbytes for x in rlora.flatten_state(state).values())
    assert case.ratio_to == plain.key == plain.ratio_to == (library, baseline_of(name))
    np.testing.assert_array_equal(PROBLEM.pairs[0].B, random_problem([(40, 30)], 4, 0).pairs[0].B)


@pytest.mark.parametrize("name", ["torch.adamw", "peft"])
def test_torch_cases_are_what_they_say(name):
    torch = pytest.importorskip("torch")
    spec = ArraySpec(get("torch"), "float32", None)
    shared = SharedTensors(PROBLEM, spec)
    baseline = ("torch", "adamw")
    plain, scaled = (TorchCase.of_method(x, shared) for x in ("adamw", "scaled_adamw"))
    other = TorchCase(name, baseline, find_third_party(name).make, shared)
    for case in (plain, scaled, other):
        assert case.ratio_to == baseline
        case.refresh()
        case.step()
    assert isinstance(scaled._optimizer, torch_class("scaled_adamw"))
    assert len(scaled._optimizer.report) == 2
    kinds = [type(c._optimizer).__name__ for c in (plain, other)]
    assert kinds == ["AdamW", {"peft": "RiemannianPreconditionedOptimizer"}.get(name, "AdamW")]
    fused = [group["fused"] for c in (plain, scaled, other) for group in c._optimizer.param_groups]
    assert fused == [True] * 3
    moments = 2 * 4 * PROBLEM.parameters
    assert moments <= plain.state_bytes() <= moments + 4 * 4
    # Each has its own parameters, and gradients that PEFT has not multiplied over and over.
    first = [next(c._model.parameters()) for c in (plain, scaled, other)]
    assert len({p.data_ptr() for p in first}) == 3
    other.refresh()
    np.testing.assert_array_equal(first[0].grad.numpy(), PROBLEM.grads[0].A)
    assert torch.isfinite(first[2]).all()


def test_names_of_methods_lead_to_classes():
    pytest.importorskip("torch")
    import rlora.torch

    assert torch_class("scaled_adamw") is rlora.torch.ScaledAdamW
    assert torch_class("no_such_method") is None


def test_traced_memory_is_the_peak_of_one_step():
    def step():
        x = np.ones(1_000_000, np.uint8)
        y = np.ones(3_000_000, np.uint8)
        del x, y
        np.ones(2_000_000, np.uint8)

    assert 4_000_000 <= memory.traced(step) < 4_050_000


def test_torch_memory_is_the_peak_and_what_stays():
    torch = pytest.importorskip("torch")
    kept = []

    def step():
        x = torch.ones(1_000_000, dtype=torch.uint8)
        y = torch.ones(3_000_000, dtype=torch.uint8)
        del x, y
        kept.append(torch.ones(2_000_000, dtype=torch.uint8))

    held, peak = memory.of_torch_cpu(step)
    assert 2_000_000 <= held < 2_050_000
    assert 4_000_000 <= peak < 4_050_000


def test_xla_says_how_much_it_needs():
    jax = pytest.importorskip("jax")
    x = jax.numpy.ones((1000, 1000), "float32")
    assert 4_000_000 <= memory.of_xla(jax.jit(lambda x: x + 1).lower(x).compile()) < 4_050_000


class Counted(Case):
    """A case whose steps are only counted."""

    def __init__(self, name, steps):
        super().__init__(("none", name), ("none", "a"), "cpu")
        self.name, self.steps = name, steps

    def refresh(self):
        self.steps.append(f"refresh {self.name}")

    def step(self):
        assert not gc.isenabled() or len(self.steps) < 10  # the first steps
        self.steps.append(self.name)

    def state_bytes(self):
        return 0


def timing_of(names, steps=None):
    steps = [] if steps is None else steps
    timing = Timing(PROBLEM, [Counted(name, steps) for name in names], seed=0)
    timing._load = 0.0  # whatever else runs here
    return timing


@pytest.fixture
def clock(monkeypatch):
    """Steps take the time that a function of (name, how many before) says."""

    def set_to(duration):
        counts = {}

        def timed(case):
            counts[case.name] = counts.get(case.name, -1) + 1
            return duration(case.name, counts[case.name])

        monkeypatch.setattr(timing, "timed", timed)

    return set_to


def samples(timing):
    return {row["method"]: len(row["samples_s"]) for row in timing.rows()}


def test_cases_take_turns():
    steps, ticks = [], []
    timing = timing_of("ab", steps)
    timing.run(Rounds(5, 5), lambda: ticks.append(1))
    timed = [name for name in steps[8:] if len(name) == 1]
    assert len(ticks) == 5
    assert [sorted(timed[i : i + 2]) for i in range(0, 10, 2)] == [["a", "b"]] * 5
    assert timed != ["a", "b"] * 5  # shuffled within the rounds
    assert all(f"refresh {s}" == before for before, s in zip(steps[8::2], steps[9::2], strict=True))
    assert samples(timing) == {"a": 5, "b": 5}
    assert gc.isenabled()


def test_a_collector_that_was_off_stays_off():
    gc.disable()
    try:
        timing_of("a", [""] * 10).run(Rounds(1, 1), lambda: None)
        assert not gc.isenabled()
    finally:
        gc.enable()


def test_samples_are_enough_once_their_ratio_is_known(clock):
    clock(lambda name, i: 1.0 if name == "a" else 2.0 + 0.01 * (i % 3))
    timing = timing_of("ab")
    timing.run(Rounds(least=7, most=100, seconds=1e6), lambda: None)
    assert samples(timing) == {"a": 7, "b": 7}
    low, high = timing.rows()[1]["ratio_interval"]
    assert 2.0 <= low <= timing.rows()[1]["ratio"] <= high <= 2.02


def test_a_ratio_is_known_at_five_percent_to_both_sides(clock):
    clock(lambda name, i: 1.0 if name == "a" else 2.0 + 0.3 * (i % 2))
    timing = timing_of("ab")
    timing.run(Rounds(least=7, most=20, seconds=1e6), lambda: None)
    assert samples(timing) == {"a": 20, "b": 20}


def test_a_noisy_one_goes_on_and_takes_its_plain_method_along(clock):
    clock(lambda name, i: 1.0 + (name == "b") * (i % 2))
    timing = timing_of("abc")
    timing.run(Rounds(least=7, most=30, seconds=1e6), lambda: None)
    assert samples(timing) == {"a": 30, "b": 30, "c": 7}


def test_a_slow_one_gets_its_share_of_the_time(clock):
    clock(lambda name, i: {"a": 1.0, "b": 2.0 + i % 2, "c": 20.0, "d": 6.0}[name])
    timing = timing_of("abcd")
    timing.run(Rounds(least=7, most=100, seconds=40.0), lambda: None)
    assert samples(timing) == {"a": 7, "b": 3, "c": 1, "d": 3}
    reasons = {row["method"]: row["verdict"] for row in timing.rows()}
    assert "fewer than 3 samples in its share of the time; raise --seconds" in reasons["c"]


def test_a_hopeless_one_is_not_weighed(clock, monkeypatch):
    monkeypatch.setattr(Counted, "count_operations", lambda self: 5)
    clock(lambda name, i: {"a": 1.0, "b": 21.0}[name])
    timing = timing_of("ab")
    timing.run(Rounds(least=7, most=100, seconds=40.0), lambda: None)
    assert [row["operations"] for row in timing.rows()] == [5, None]


def test_what_is_not_of_the_time_is_kept_apart():
    timing = timing_of("a")
    timing.run(Rounds(1, 1), lambda: None)
    (row,) = timing.rows()
    assert row["first_call_s"] > 0 <= row["build_s"]
    assert row["compile_s"] is row["operations"] is row["peak_temporary_bytes"] is None


def test_the_profiler_says_nothing_of_memory_that_was_there_before():
    """In a process of its own: torch looks at the variable when it is imported."""
    import subprocess
    import sys

    pytest.importorskip("torch")
    code = (
        "from rlora.cli.bench import memory\n"
        "memory.hush_profiler()\n"
        "import torch\n"
        "kept = [torch.ones(1000)]\n"
        "memory.of_torch_cpu(kept.clear)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=1200, check=False
    )
    assert (done.returncode, done.stderr) == (0, "")

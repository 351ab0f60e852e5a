import json

import jsonschema
import pytest

import rlora.methods
from rlora.cli.bench import run, schema, suite, targets, timing
from rlora.cli.bench.problem import PRESETS, Preset
from rlora.cli.records import fault


@pytest.fixture(autouse=True)
def small(monkeypatch):
    monkeypatch.setitem(PRESETS, "small", Preset("one", 2, ((80, 70),)))


def row(backend, method, *samples, rank=4, preset="small", **more):
    base = {"backend": backend, "method": method, "rank": rank, "preset": preset}
    base |= {"dtype": "float32", "pairs": 2, "parameters": 2 * 150 * rank, "model_s": None}
    base |= {"state_bytes": 0, "peak_temporary_bytes": None, "verdict": "ok"}
    return {**base, "samples_s": list(samples), **more}


def ratios(rows):
    return [check for check in suite.judge(rows) if " / " in check["what"]]


def verdicts(what, rows):
    return [check["passed"] for check in suite.judge(rows) if what in check["what"]]


def test_ratios_are_of_the_same_rounds_and_held_against_their_limit():
    rows = [
        row("torch", "adamw", 1.0, 2.0, 4.0),
        row("torch", "scaled_adamw:before", 1.5, 3.0, 6.0),
        row("torch", "scaled_adamw:after", 2.4, 4.8, 9.6),
        row("torch", "peft", 6.0, 12.0, 24.0),
    ]
    found = {check["what"]: check for check in ratios(rows)[:-1]}
    before = found["torch scaled_adamw:before / torch adamw"]
    assert (before["limit"], before["goal"]) == (2.3, 1.6)
    assert before["measured"] == 1.5
    assert before["passed"]
    assert found["torch peft / torch scaled_adamw:before"]["passed"]
    after = found["torch scaled_adamw:after / torch scaled_adamw:before"]
    assert (after["measured"], after["passed"]) == (pytest.approx(1.6), False)
    assert len(found) == 3  # the rest was not measured
    mean = ratios(rows)[-1]
    assert (mean["preset"], mean["measured"]) == ("geometric mean", pytest.approx(4.0))


def test_a_check_is_no_surer_than_its_timings():
    rows = [row("torch", "adamw", 1.0), row("torch", "lora_rite", 2.0, verdict="unstable: load")]
    rows += [row("torch", "scaled_adamw:before", 1.5), row("torch", "peft", 4.0, rank=16)]
    rows += [row("torch", "scaled_adamw:before", 1.0, rank=16, verdict="unstable: spread")]
    found = {(check["what"], check["preset"]): check["stable"] for check in suite.judge(rows)}
    assert found["torch scaled_adamw:before / torch adamw", "small"]
    assert not found["torch lora_rite / torch adamw", "small"]
    assert not found["torch peft / torch scaled_adamw:before", "geometric mean"]
    assert found["torch lora_rite, state bytes", "small"]  # bytes are exact


def test_limits_are_those_of_their_rank():
    def passed(rank, ratio):
        rows = [row("torch", "adamw", 1.0, rank=rank), row("torch", "lora_rite", ratio, rank=rank)]
        return [check["passed"] for check in ratios(rows)]

    assert [passed(rank, 5.5) for rank in (4, 16, 64)] == [[False], [True], [True]]
    assert passed(8, 5.5) == []


def test_limits_are_those_of_their_shape():
    """GPT-2's are for shapes of no limit of their own."""

    def limit(preset):
        rows = [row("torch", method, 1.0, preset=preset) for method in ("adamw", "scaled_adamw")]
        (check,) = ratios(rows)
        return check["limit"]

    presets = ("gpt2-medium", "smollm2-135m", "llama-7b", "llama-7b-quarter", "small")
    assert [*map(limit, presets)] == [3.1, 2.1, 3.5, 3.5, 3.1]


def test_the_others_may_take_twice_what_their_work_predicts():
    def passed(seconds):
        return verdicts(
            "2 x predicted",
            [
                row("torch", "adamw", 1.0, model_s=1e-3),
                row("torch", "lora_muon", seconds, model_s=3e-3),
                row("torch", "lora_rite", 9.9, model_s=1e-3),  # has a limit of its own
                row("torch", "lora_sb", 9.9, model_s=None),  # nobody has counted
            ],
        )

    assert (passed(5.9), passed(6.1)) == ([True], [False])


def test_temporaries_are_the_directions_once_and_small_matrices():
    def passed(peak, **more):
        rows = [row("torch", "scaled_adamw:before", 1.0, peak_temporary_bytes=peak, **more)]
        return verdicts("temporary bytes", rows)

    # 2 pairs of 150 x 4 numbers, and 16 matrices of 4 x 4 for each pair
    most = 4 * (2 * 150 * 4 + 16 * 2 * 16)
    assert (passed(most), passed(most + 1), passed(None)) == ([True], [False], [])
    assert passed(most, dtype="bfloat16") == [True]  # it computes in float32
    assert passed(2 * most, dtype="float64") == [True]


def test_state_is_what_the_page_says_to_the_byte():
    def passed(held, **more):
        return verdicts(
            "state bytes", [row("torch", "scaled_adamw", 1.0, state_bytes=held, **more)]
        )

    exact = 4 * 2 * (2 * 150 * 4 + 2)
    assert (passed(exact), passed(exact + 4), passed(exact - 4)) == ([True], [False], [False])
    assert passed(exact, dtype="float64") == []


def test_every_method_has_targets():
    torch_class = {
        method for target in suite.TARGETS for method in [getattr(target, "method", None)]
    }
    assert set(rlora.methods.__all__) <= torch_class
    assert set(rlora.methods.__all__) <= set(suite.WATCHED)


def plans(**given):
    usual = {"dtype": "float32", "device": None, "repeat": None, "seconds": None, "seed": 0}
    usual |= {"adapter": None, "quick": False, "end_to_end": False, "threads": None}
    return suite.speed({**usual, "preset": None, "ranks": [], "methods": [], **given})


def test_the_others_take_part_at_one_preset():
    pytest.importorskip("torch")
    for plan in plans():
        others = set(suite.OTHERS) <= set(plan.methods["torch"])
        assert others == (plan.preset == "gpt2-medium")
        assert plan.rounds.seconds == (24.0 if others else 12.0)
    (narrow,) = plans(preset="roberta-base", ranks=[4], seconds=3.0)
    assert set(suite.OTHERS) <= set(narrow.methods["torch"])
    assert narrow.rounds.seconds == 3.0


def test_a_record_has_the_time_that_was_asked_for():
    pytest.importorskip("torch")
    for given, seconds in ((None, 12.0), (3.0, 3.0)):
        made = run.Results(plans(seconds=given), "speed").record()
        assert made["command"]["rounds"]["seconds"] == seconds


def test_the_command_prints_verdicts_and_keeps_them(rlora_cli, monkeypatch, tmp_path):
    for library in ("torch", "jax", "peft", "optax"):
        pytest.importorskip(library)
    monkeypatch.setattr(run, "WATCHED", ["scaled_adamw"])
    out = tmp_path / "out.json"
    args = ("--suite", "speed", "--preset", "small", "--repeat", 1, "--output", out)
    result = rlora_cli("bench", *args)
    assert result.exit_code == 0, result.output
    record = json.loads(out.read_text())
    jsonschema.validate(record, schema.SCHEMA, cls=jsonschema.Draft202012Validator)
    assert record["command"]["suite"] == "speed"
    assert record["command"]["ranks"] == [4, 16, 64]
    assert record["command"]["backends"] == ["torch", "numpy", "jax"]
    assert record["command"]["against"] == ["peft", "optax.adamw"]
    whats = [check["what"] for check in record["checks"]]
    for target in suite.TARGETS:
        limits = (getattr(target, "limits", None) or {None: (4, 16, 64)})[None]
        means = sum(target is ratio for ratio, _ in suite.PEFT)
        assert whats.count(target.words) == len(limits) + means, target
    states = [check for check in record["checks"] if check["what"].endswith("state bytes")]
    assert [check for check in states if not check["passed"]] == []
    assert "torch scaled_adamw, growth of device operations" in whats
    reached = sum(check["passed"] for check in record["checks"])
    assert f"{reached} of {len(whats)} targets reached" in result.stdout
    assert result.stderr.splitlines()[:2] == ["small, rank 4", "small, rank 16"]
    assert rlora_cli("bench", "show", out).stdout + f"record: {out}\n" == result.stdout


def test_a_plain_run_says_nothing_on_the_way(rlora_cli):
    args = ("--method", "scaled_sgd", "--preset", "small", "--rank", 4, "--repeat", 1)
    assert rlora_cli("bench", *args).stderr == ""


@pytest.mark.parametrize(
    ("sense", "measured", "passed"),
    [
        ("at most", 2.0, True), ("at most", 2.1, False), ("at least", 2.0, True),
        ("at least", 1.9, False), ("exactly", 2, True), ("exactly", 2.0001, False),
    ],
)  # fmt: skip
def test_limits_belong_to_what_is_allowed(sense, measured, passed):
    check = targets.make_check("x", "p", 4, sense, 2.0, measured, goal=1.5)
    assert check["passed"] is passed
    assert check["goal"] == 1.5
    items = schema.SCHEMA["properties"]["checks"]["items"]
    assert fault(check, items) is None
    assert check["stable"]


@pytest.mark.parametrize(
    ("args", "why"),
    [
        (("--suite", "accuracy"), "is not one of 'speed', 'scaling'"),
        (("--suite", "speed", "--method", "scaled_sgd"), "leave out --method"),
        (("--suite", "speed", "--backend", "jax"), "leave out --backend"),
        (("--suite", "speed", "--preset", "gpt5"), "there are gpt2-medium"),
        (("--suite", "speed", "--end-to-end"), "leave out --end-to-end"),
    ],
)
def test_wrong_options_are_refused_first(refused, monkeypatch, args, why):
    monkeypatch.setattr(timing, "timed", lambda case: pytest.fail("it measured first"))
    assert why in refused("bench", *args)


def test_without_torch_there_is_no_suite(refused, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert "pip install torch" in refused("bench", "--suite", "speed")

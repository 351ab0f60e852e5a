import json

import jsonschema
import pytest

from rlora.cli import measure, schema, suite
from rlora.cli.presets import PRESETS, Preset


def row(backend, method, *samples, rank=4, preset="p"):
    base = {"backend": backend, "method": method, "rank": rank, "preset": preset}
    return {**base, "samples_s": list(samples)}


def test_ratios_are_of_the_same_rounds_and_held_against_their_limit():
    rows = [
        row("torch", "adamw", 1.0, 2.0, 4.0),
        row("torch", "scaled_adamw", 1.5, 3.0, 6.0),
        row("torch", "scaled_adamw:after", 2.4, 4.8, 9.6),
        row("torch", "peft", 6.0, 12.0, 24.0),
    ]
    found = {check["what"]: check for check in suite.judge(rows)[:-1]}
    assert found["torch scaled_adamw / torch adamw"]["measured"] == 1.5
    assert found["torch scaled_adamw / torch adamw"]["passed"]
    assert not found["torch scaled_adamw:after / torch scaled_adamw"]["passed"]
    assert found["torch peft / torch scaled_adamw"]["passed"]
    assert len(found) == 3  # the rest was not measured
    mean = suite.judge(rows)[-1]
    assert (mean["preset"], mean["measured"]) == ("geometric mean", pytest.approx(4.0))


def test_limits_are_those_of_their_rank():
    def passed(rank, ratio):
        rows = [row("torch", "adamw", 1.0, rank=rank), row("torch", "lora_rite", ratio, rank=rank)]
        return [check["passed"] for check in suite.judge(rows)]

    assert [passed(rank, 5.5) for rank in (4, 16, 64)] == [[False], [True], [True]]
    assert passed(8, 5.5) == []


@pytest.fixture
def small(monkeypatch):
    monkeypatch.setitem(PRESETS, "small", Preset("one", 2, ((80, 70),)))


def test_the_command_prints_verdicts_and_keeps_them(rlora_cli, small, tmp_path):
    for library in ("torch", "jax", "peft", "optax"):
        pytest.importorskip(library)
    out = tmp_path / "out.json"
    args = ("--suite", "speed", "--preset", "small", "--repeat", 1, "--output", out)
    result = rlora_cli("bench", *args)
    assert result.exit_code == 0, result.output
    record = json.loads(out.read_text())
    jsonschema.validate(record, schema.SCHEMA, cls=jsonschema.Draft202012Validator)
    assert record["command"]["suite"] == "speed"
    assert record["command"]["ranks"] == [4, 16, 64][: len(record["command"]["ranks"])]
    whats = [check["what"] for check in record["checks"]]
    for target in suite.TARGETS:
        assert whats.count(target.words) == len(target.limits) + (target.sense == "at least")
    assert "FAIL" in result.stdout or "PASS" in result.stdout
    assert rlora_cli("bench", "show", out).stdout == result.stdout


@pytest.mark.parametrize(
    ("args", "why"),
    [
        (("--suite", "accuracy"), "must be one of speed"),
        (("--suite", "speed", "--method", "scaled_sgd"), "leave out --method"),
        (("--suite", "speed", "--backend", "jax"), "leave out --backend"),
        (("--suite", "speed", "--preset", "gpt5"), "there are gpt2-medium"),
        (("--suite", "speed", "--end-to-end"), "leave out --end-to-end"),
    ],
)
def test_wrong_options_are_refused_first(refused, monkeypatch, args, why):
    monkeypatch.setattr(measure, "timed", lambda contender: pytest.fail("it measured first"))
    assert why in refused("bench", *args)


def test_without_torch_there_is_no_suite(refused, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert "pip install torch" in refused("bench", "--suite", "speed")

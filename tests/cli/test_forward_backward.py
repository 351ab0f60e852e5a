import json

import pytest

from rlora.backends import get
from rlora.cli.bench import torch_cases
from rlora.cli.bench.cases import ArraySpec
from rlora.cli.bench.problem import PRESETS, Preset, random_problem


def test_equal_layers_are_timed_once(monkeypatch):
    pytest.importorskip("torch")
    times = iter([1.0, 10.0])
    monkeypatch.setattr(torch_cases, "_layer_seconds", lambda shape, spec: next(times))
    problem = random_problem([(40, 30), (24, 30), (40, 30)], 4, 0)
    assert torch_cases.forward_backward_seconds(problem, None) == 2 * 1.0 + 10.0


def test_a_layer_takes_time():
    pytest.importorskip("torch")
    problem = random_problem([(40, 30)], 4, 0)
    assert (
        torch_cases.forward_backward_seconds(problem, ArraySpec(get("torch"), "float32", None)) > 0
    )


def test_the_share_is_a_column(rlora_cli, refused, monkeypatch, tmp_path):
    pytest.importorskip("torch")
    monkeypatch.setitem(PRESETS, "small", Preset("one", 2, ((40, 70),)))
    args = ("--preset", "small", "--method", "scaled_sgd", "--repeat", 1, "--end-to-end")
    out = tmp_path / "out.json"
    result = rlora_cli("bench", *args, "--backend", "torch,numpy", "--output", out)
    assert result.exit_code == 0, result.output
    assert "of training" in result.stdout.splitlines()[2]
    rows = json.loads(out.read_text())["rows"]
    assert {row["rank"] for row in rows} == {32}
    for row in rows:
        assert (row["forward_backward_s"] is None) == (row["backend"] == "numpy")
    assert "--backend torch" in refused("bench", *args)

import importlib.util
import json

import pytest

from rlora.cli.bench import problem, suite


def test_a_shape_is_a_preset():
    assert problem.named("20x16*3").pairs() == [(20, 16)] * 3
    assert problem.is_shape("20x16*3")
    assert not problem.is_shape("llama-7b")


def test_it_is_timed_under_its_own_name(rlora_cli, tmp_path):
    out = tmp_path / "out.json"
    args = ("--preset", "20x16*3", "--rank", 2, "--method", "scaled_sgd", "--repeat", 1)
    assert rlora_cli("bench", *args, "--output", out).exit_code == 0
    row = json.loads(out.read_text())["rows"][0]
    assert (row["preset"], row["pairs"], row["parameters"]) == ("20x16*3", 3, 3 * 2 * 36)


@pytest.mark.parametrize("name", ["20x16", "20*3", "0x16*3", "20x16*0", "20x16*-1", "1e3x16*1"])
def test_what_is_no_shape_is_refused(refused, name):
    assert "no shape MxN*K, as in 1024x1024*24" in refused("bench", "--preset", name)


@pytest.mark.parametrize("name", ["axb*c", "x*", "２x２*２"])
def test_what_is_not_like_one_is_no_preset(refused, name):
    assert "MxN*K" in refused("bench", "--preset", name)


def test_a_rank_above_its_narrow_side_is_refused(refused):
    assert "at most 16" in refused("bench", "--preset", "20x16*3", "--rank", 17)


def plans(**given):
    usual = dict.fromkeys(("adapter", "device", "repeat", "seconds", "threads", "preset"))
    usual |= {"dtype": "float32", "seed": 0, "quick": False, "end_to_end": False}
    return suite.scaling(
        {**usual, "backend": [], "methods": [], "against": [], "ranks": [], **given}
    )


def test_the_suite_varies_width_and_layers():
    found = plans()
    assert [plan.preset for plan in found] == [
        *(f"{width}x{width}*8" for width in (256, 512, 1024, 2048, 4096)),
        *(f"1024x1024*{layers}" for layers in (1, 4, 16, 64)),
    ]
    assert {tuple(plan.ranks) for plan in found} == {(16,)}
    assert sum(plan.rounds.seconds for plan in found) < 100
    assert plans(repeat=2)[0].rounds.seconds is None


def test_without_torch_it_is_about_numpy(monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr("importlib.util.find_spec", lambda x: None if x == "torch" else find(x))
    (plan,) = plans(preset="64x64*2", ranks=[4])
    assert list(plan.specs) == ["numpy"]


def test_it_has_no_targets(rlora_cli, tmp_path):
    pytest.importorskip("torch")
    out = tmp_path / "out.json"
    args = ("--suite", "scaling", "--preset", "64x64*2", "--rank", 4, "--repeat", 1)
    result = rlora_cli("bench", *args, "--output", out)
    assert result.exit_code == 0, result.output
    record = json.loads(out.read_text())
    assert record["command"]["suite"] == "scaling"
    assert [row["method"] for row in record["rows"]] == ["adamw", *suite.SCALING_METHODS]
    assert record["checks"] == []
    models = [{**row, "preset": "gpt2-medium", "rank": 4} for row in record["rows"]]
    assert suite.judge(models)

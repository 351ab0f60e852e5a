"""Tables that pages share are made of the records, in one place."""

import csv
import importlib.util
import math
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).parents[2] / "docs" / "reference"


@pytest.fixture
def script():
    spec = importlib.util.spec_from_file_location("front_tables", FOLDER / "front_tables.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_every_page_has_the_tables_of_today(script):
    marks = 0
    for page in script.PAGES:
        text = page.read_text(encoding="utf-8")
        assert script.rewritten(text) == text, page
        marks += text.count("made by front_tables.py")
    assert marks == 15


def test_a_table_without_marks_is_named(script, monkeypatch):
    script.check_marks()
    monkeypatch.setattr(script, "TABLES", {**script.TABLES, "moons": str})
    with pytest.raises(ValueError, match="found none of moons"):
        script.check_marks()
    with pytest.raises(ValueError, match="found no <!-- end -->"):
        script.rewritten("<!-- losses: made by front_tables.py -->")


def test_the_caption_of_costs_is_read_from_the_records(script, monkeypatch):
    speed = sys.modules[script.markdown.__module__]
    rows = [
        {"method": name, "rank": rank, "ratio": 2.0, "spread": spread, "pairs": 7}
        for name, spread in (("adamw", 0.03), ("scaled_adamw", 0.1), ("peft", 0.04), ("sgd", 0.9))
        for rank in (4, 16, 64)
    ]
    monkeypatch.setattr(speed, "timed", lambda _: rows)
    caption = " ".join(speed.costs().partition("|")[0].split())
    assert caption.startswith(
        "*Median over rounds of a step's time over that of torch's fused AdamW"
    )
    assert caption.endswith("7 pairs, float32. Samples, AdamW's too, spread by 3 to 10 %.*")
    rows[0]["spread"], rows[5]["spread"] = 0.151, 0.5
    said = speed.spreads({"a GPU": "x"}, ("scaled_adamw",))
    assert said.endswith(
        "3 to 50 %. Rough, as some spread by more than the benchmark's limit of "
        "15 %: ranks 4 and 64 on a GPU."
    )


def test_a_power_law_is_read_off_exactly(script):
    losses = {n: 5 / n**2 for n in (100, 300, 900)}
    for steps in (100, 150, 300, 899.5, 900):
        assert script.at_steps(losses, steps) == pytest.approx(5 / steps**2, rel=1e-12)


def table_of_seconds(script, folder, monkeypatch, without=None):
    """Losses of c / steps, straight lines in logarithms; steps of 0.1, 0.35 and 1.1 beside 0.9."""
    monkeypatch.setattr(script, "STUDY", folder)
    (folder / "strings").mkdir()
    with (folder / "strings" / "best_losses.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["dataset", "rank", "steps", "method", script.LOSS])
        for steps in script.LENGTHS:
            for c, name in enumerate(script.STEP, 1):
                if (name, steps) != without:
                    writer.writerow(["fall", 4, steps, name, c / steps])
                    writer.writerow(["fall", 8, steps, name, 9.0])
    rows = [
        {"method": timed, "median_s": step, "forward_backward_s": 0.9}
        for timed, step in zip(script.STEP.values(), (0.1, 0.35, 1.1), strict=True)
    ]
    monkeypatch.setattr(script, "timed", lambda _: rows)
    lines = script.seconds().strip().splitlines()[3:]
    return [line.strip("| ").split(" | ") for line in lines]


def test_a_slower_step_leaves_fewer_steps(script, tmp_path, monkeypatch):
    heads, _, *cells = table_of_seconds(script, tmp_path, monkeypatch)
    assert heads == ["method", "share", "steps", "`fall`"]
    assert [row[:2] for row in cells[:3]] == [
        [f"`{name}`", share]
        for name, share in zip(script.STEP, ("10.0%", "28.0%", "55.0%"), strict=True)
    ]
    places = [(k, steps) for steps in script.LENGTHS[1:] for k in range(3)]
    for row, (k, steps) in zip(cells, places, strict=True):
        fewer = steps / (1.0, 1.25, 2.0)[k]
        assert row[2] == f"{steps}; {fewer:.0f}"
        loss, at_equal_seconds = row[3].split("; ")
        assert math.isclose(float(loss), (k + 1) / steps, abs_tol=5e-5)
        if fewer < script.LENGTHS[0]:
            assert at_equal_seconds == "-"
        else:
            assert math.isclose(float(at_equal_seconds), (k + 1) / fewer, abs_tol=5e-5)


def test_a_task_without_all_lengths_is_left_out(script, tmp_path, monkeypatch):
    heads, *_ = table_of_seconds(script, tmp_path, monkeypatch, without=("scaled", 300))
    assert heads == ["method", "share", "steps"]

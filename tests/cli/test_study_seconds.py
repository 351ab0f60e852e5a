"""Losses at equal seconds."""

import math

import pytest

from rlora.cli.study.seconds import LENGTHS, RANK, SHORTER, TIMED, at_steps, by_seconds, times_of
from rlora.cli.study.sweeps import Setting, Sweep

RECORD = {
    "rows": [
        {"method": timed, "median_s": step, "forward_backward_s": 0.9}
        for timed, step in zip(TIMED.values(), (0.1, 0.35, 1.1), strict=True)
    ]
}


def sweeps(without=None):
    """Losses of c / steps: straight lines in logarithms."""
    settings = [Setting("fall", RANK, steps) for steps in (SHORTER, *LENGTHS)]
    return {
        x: {
            name: Sweep({1e-3: c / x.steps, 2e-3: 9.0}, {})
            for c, name in enumerate(TIMED, 1)
            if (name, x.steps) != without
        }
        for x in settings
    }


def test_a_power_law_is_read_off_exactly():
    losses = {n: 5 / n**2 for n in (100, 300, 900)}
    for steps in (100, 150, 300, 899.5, 900):
        assert at_steps(losses, steps) == pytest.approx(5 / steps**2, rel=1e-12)


def test_a_slower_step_leaves_fewer_steps():
    cells = [line.strip("| ").split(" | ") for line in by_seconds(sweeps(), RECORD)[4:]]
    assert [row[0] for row in cells] == 2 * [f"`{name}`" for name in TIMED]
    assert [row[1] for row in cells[:3]] == ["10.0%", "28.0%", "55.0%"]
    for row, (k, steps) in zip(cells, [(k, n) for n in LENGTHS for k in range(3)], strict=True):
        fewer = steps / (1.0, 1.25, 2.0)[k]
        assert row[2] == f"{steps}; {fewer:.0f}"
        loss, at_equal_seconds = row[3].split("; ")
        assert math.isclose(float(loss), (k + 1) / steps, abs_tol=5e-5)
        if fewer < SHORTER:
            assert at_equal_seconds == "-"
        else:
            assert math.isclose(float(at_equal_seconds), (k + 1) / fewer, abs_tol=5e-5)


def test_a_task_without_all_methods_or_lengths_is_left_out():
    assert by_seconds(sweeps(without=("scaled", LENGTHS[0])), RECORD) == []


def test_times_are_of_the_record():
    times = times_of(RECORD)
    assert times["adamw-fast"].whole == pytest.approx(1.0)
    assert times["scaled"].step == 0.35

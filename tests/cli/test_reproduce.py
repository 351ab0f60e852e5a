"""`rlora reproduce`: what it writes, how it ends, and every claim's verdict in its quick form."""

import json
import math
import sys

import jsonschema
import numpy as np
import pytest

pytest.importorskip("matplotlib")

from rlora.backends import get
from rlora.cli import claims, plots
from rlora.cli.chart import Curve, Panel
from rlora.cli.claims import evidence, factorisation, invariance, reproduce
from rlora.cli.claims.claim import Check, Claim, Outcome, Setting
from rlora.cli.records import as_json

EVERY = pytest.mark.parametrize("name", claims.CLAIMS)
TOY = (
    Panel("lines", "x", "y", (Curve("one", [1, 10], [1.0, math.inf]),), log_x=True, threshold=2.0),
    Panel("dots", "x", "", (Curve("two", [1e-9, 1.0], [0, 1]),), True, rows=("a", "$b_1$")),
)


def outcome(*values):
    """Result of a toy experiment; 1 is its threshold from above."""
    return Outcome(tuple(Check("value", value, "<=", 1.0) for value in values), TOY)


@pytest.fixture
def toy(monkeypatch):
    """Puts one claim in the place of all, which finds these values."""

    def put(*values, holds=True):
        found = outcome(*values)
        claim = Claim("toy", "A toy is a toy.", "Nobody, 2024.", lambda setting: found, holds)
        monkeypatch.setattr("rlora.cli.claims.reproduce.CLAIMS", {"toy": claim})

    return put


def setting(library="numpy"):
    return Setting(get(library), quick=True)


@EVERY
def test_the_verdict_is_the_documented_one(name):
    claim = claims.CLAIMS[name]
    found = claim.run(setting())
    assert claim.as_documented(found), [check for check in found.checks if not check.holds]
    assert claim.name == name
    assert claim.statement.endswith(".")
    assert "arXiv" in claim.source
    assert found.panels
    assert plots.as_svg(claim.statement, found.panels)
    record = json.loads(as_json(evidence.make_evidence(claim, found, setting(), 1.0)))
    jsonschema.validate(record, evidence.SCHEMA)


@pytest.mark.parametrize(
    "name", ["damping", "feature-learning-adam", "gradient-rank", "invariance"]
)
@pytest.mark.parametrize("library", ["torch", "array_api_strict"])
def test_backends_agree(name, library, monkeypatch):
    pytest.importorskip(library)
    few = [r for r in invariance.ROWS if "sylvester" in r.label]  # an upper bound is theirs only
    monkeypatch.setattr(invariance, "ROWS", [*invariance.ROWS[::8], *few])
    monkeypatch.setattr(invariance, "QUICK_STEPS", 5)  # equal figures, whatever the verdict
    monkeypatch.setattr(factorisation, "MODES", factorisation.MODES[-1:])
    times = (0.0, factorisation.BELOW, factorisation.ABOVE, 0.0)  # less its ends
    monkeypatch.setattr(factorisation, "TIMES", times)
    monkeypatch.setattr(factorisation, "GOAL", 1e-4)
    claim = claims.CLAIMS[name]
    ours, theirs = (claim.run(setting(where)) for where in ("numpy", library))
    for one, other in zip(ours.checks, theirs.checks, strict=True):
        assert one.what == other.what
        assert one.holds == other.holds
        if one.value > 1e-9:  # else it is rounding
            # Both are float64; an iteration or a fit may round to its neighbour.
            assert other.value == pytest.approx(one.value, rel=0.05)


def test_jax_agrees():
    pytest.importorskip("jax")
    claim = claims.CLAIMS["feature-learning"]
    ours, theirs = (claim.run(setting(where)) for where in ("numpy", "jax"))
    for one, other in zip(ours.checks, theirs.checks, strict=True):
        assert other.value == pytest.approx(one.value, rel=1e-6)  # three steps in float64


def test_every_claim_is_listed_with_what_is_documented(rlora_cli):
    listed = rlora_cli("reproduce", "--list")
    assert listed.exit_code == 0
    for name in claims.CLAIMS:
        claim = claims.CLAIMS[name]
        lines = listed.stdout.splitlines()
        at = lines.index(f"{name}: {'holds' if claim.holds else 'fails'}")
        assert lines[at + 1].strip() == claim.statement


def test_it_writes_a_figure_and_a_record(rlora_cli, toy, tmp_path):
    toy(0.5)
    folder = tmp_path / "made" / "if need be"
    done = rlora_cli("reproduce", "all", "--output", folder)
    assert done.exit_code == 0, done.output
    assert sorted(path.name for path in folder.iterdir()) == ["toy.json", "toy.png", "toy.svg"]
    assert "1 of 1 verdict as documented" in done.stdout
    assert "A toy is a toy." in (folder / "toy.svg").read_text()
    record = evidence.read_evidence(folder / "toy.json")
    jsonschema.validate(record, evidence.SCHEMA)
    assert record["verdict"] == "holds"
    (check,) = record["checks"]
    assert list(check.values()) == ["value", 0.5, "<=", 1.0, True]
    assert record["panels"][0]["curves"][0]["y"] == [1.0, None]  # it flew away
    assert not record["quick"]
    assert record["environment"]["versions"]["numpy"] == np.__version__


@pytest.mark.parametrize(
    "values, holds, code, verdict",
    [
        ((0.5, 1.0), True, 0, "holds"),
        ((0.5, 2.0), True, 1, "FAILS, documented as holding"),
        ((math.inf,), True, 1, "FAILS, documented as holding"),
        ((0.5, 2.0), False, 0, "fails, as documented"),
        ((0.5,), False, 1, "HOLDS, documented as failing"),
        ((math.nan,), False, 1, "FAILS, documented as failing"),  # nothing was measured
    ],
)
def test_the_exit_code_is_that_of_the_verdict(
    rlora_cli, toy, tmp_path, values, holds, code, verdict
):
    toy(*values, holds=holds)
    done = rlora_cli("reproduce", "toy", "--output", tmp_path)
    assert done.exit_code == code
    assert f"toy: {verdict} (" in done.stdout
    assert f"{1 - code} of 1 verdict as documented" in done.stdout
    assert evidence.read_evidence(tmp_path / "toy.json")["verdict"] == verdict


def test_two_runs_leave_the_same_bytes(rlora_cli, tmp_path):
    for folder in ("one", "other"):
        done = rlora_cli("reproduce", "feature-learning", "--quick", "--output", tmp_path / folder)
        assert done.exit_code == 0, done.output
    for suffix in ("svg", "png"):
        one, other = (tmp_path / x / f"feature-learning.{suffix}" for x in ("one", "other"))
        assert one.read_bytes() == other.read_bytes()
    one, other = (
        evidence.read_evidence(tmp_path / x / "feature-learning.json") for x in ("one", "other")
    )
    of_the_moment = ("created", "seconds", "environment")
    assert {k: v for k, v in one.items() if k not in of_the_moment} == {
        k: v for k, v in other.items() if k not in of_the_moment
    }


def test_the_figure_can_be_drawn_from_the_record(rlora_cli, toy, tmp_path):
    toy(2.0, holds=False)
    rlora_cli("reproduce", "toy", "--output", tmp_path)
    record = evidence.read_evidence(tmp_path / "toy.json")
    drawn = plots.as_svg(evidence.title_of(record), evidence.panels_of(record))
    assert drawn == (tmp_path / "toy.svg").read_text(encoding="utf-8")
    assert "[fails, as documented] A toy" in drawn


def test_refusals(refused, toy, tmp_path, monkeypatch):
    assert "got 'frobnicate'" in refused("reproduce", "frobnicate")
    (tmp_path / "file").write_text("")
    toy(0.5)
    assert "is a file" in refused("reproduce", "toy", "--output", tmp_path / "file")
    assert "is not installed" in refused("reproduce", "toy", "--backend", "no_such_library")
    assert "must be one of" in refused("reproduce", "invariance")  # the toy is alone now
    monkeypatch.setitem(sys.modules, "rlora.cli.plots", None)
    monkeypatch.delattr("rlora.cli.plots")
    assert "pip install 'rlora[plot]'" in refused("reproduce", "toy", "--output", tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_an_interrupt_keeps_what_is_finished(rlora_cli, toy, tmp_path, monkeypatch):
    toy(0.5)
    finished = reproduce.CLAIMS["toy"]

    def interrupt(setting):
        raise KeyboardInterrupt

    later = finished._replace(name="later", run=interrupt)
    monkeypatch.setattr("rlora.cli.claims.reproduce.CLAIMS", {"toy": finished, "later": later})
    assert rlora_cli("reproduce", "--output", tmp_path).exit_code == 130
    assert sorted(path.name for path in tmp_path.iterdir()) == ["toy.json", "toy.png", "toy.svg"]


def test_a_claim_that_crashes_stops_no_other_and_leaves_no_file(
    rlora_cli, toy, tmp_path, monkeypatch
):
    """A crash in its experiment, or a result that no record can have."""
    toy(0.5)
    finished = reproduce.CLAIMS["toy"]

    def crash(setting):
        raise ValueError("a number\nof no kind")

    toys = {
        "crashed": finished._replace(name="crashed", run=crash),
        "strange": finished._replace(name="strange", statement=np.True_),
        "toy": finished,
    }
    monkeypatch.setattr("rlora.cli.claims.reproduce.CLAIMS", toys)
    done = rlora_cli("reproduce", "--output", tmp_path)
    assert done.exit_code == 2
    assert "crashed failed: ValueError: a number; of no kind" in done.stderr
    assert "strange failed: TypeError: Object of type bool" in done.stderr
    assert "1 of 1 verdict as documented" in done.stdout
    assert done.stderr.endswith("rlora: error: a number; of no kind\n")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["toy.json", "toy.png", "toy.svg"]


def test_a_file_that_is_no_record_is_refused(tmp_path):
    path = tmp_path / "other.json"
    path.write_text(json.dumps({"schema": "rlora-bench/2"}))
    with pytest.raises(ValueError, match=r"other\.json is no record of rlora reproduce"):
        evidence.read_evidence(path)


def test_long_curves_are_thinned_and_keep_their_ends():
    long = Curve("long", range(1, 20_001), range(20_000))
    for log in (False, True):
        short = evidence.thinned(long, log=log)
        assert len(short.x) == len(short.y) <= evidence.POINTS
        assert (short.x[0], short.x[-1]) == (1, 20_000)
        assert all(y == x - 1 for x, y in zip(short.x, short.y, strict=True))
    assert evidence.thinned(Curve("short", [1], [2]), log=True) == Curve("short", [1], [2])


def test_every_dot_of_a_row_is_drawn():
    """Marks of a long line are thinned out; each dot is a result of its own."""
    rows = tuple(f"row {i}" for i in range(40))
    curve = Curve("dots", [1.0] * 40, range(40))
    (axes,) = plots.draw("t", [Panel("t", "x", "y", (curve,), rows=rows)]).subfigs[0].axes
    drawn = [x for line in axes.lines if line.get_marker() == "o" for x in line.get_ydata()]
    assert len(drawn) == 40


@pytest.mark.parametrize(
    "value, text",
    [
        (1e-16, "1e-16"),
        (3e-3, "3e-3"),
        (0.01, "0.01"),
        (1.0, "1"),
        (20000.0, "20000"),
        (1e6, "1e6"),
    ],
)
def test_ticks_are_true_and_short(value, text):
    assert plots.power(value) == text
    assert float(text) == value


def test_bars_pass_everything_on():
    track = setting().track
    assert list(track("abc", "letters")) == ["a", "b", "c"]

"""The table of invariances: every verdict is the theory's, and the committed page has it."""

import importlib.util
import re
from pathlib import Path

import pytest

from rlora import methods
from rlora.cli.claims import theory
from rlora.testing import GAUGES, make_problem, run

SCRIPT = Path(__file__).parents[2] / "docs" / "reference" / "invariance.py"


def load():
    spec = importlib.util.spec_from_file_location("invariance", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


TABLE = load()
EVERY_ROW = pytest.mark.parametrize("row", TABLE.ROWS, ids=lambda row: row.label)


def cells_of_the_page():
    """For each label the other cells of its row."""
    lines = TABLE.PAGE.read_text(encoding="utf-8").splitlines()
    rows = [[cell.strip() for cell in line.strip("|").split(" | ")] for line in lines]
    rows = [row for row in rows if not row[0].startswith(("method", "---"))]
    found = {row[0].strip("`"): row[1:] for row in rows if len(row) == 2 + len(GAUGES)}
    same = [line[3:-1] for line in lines if line.startswith("- `")]
    return found | {label: [theory.EVERY.words, *["exact"] * len(GAUGES)] for label in same}


PAGE = cells_of_the_page()


@EVERY_ROW
def test_theory_holds_and_the_page_says_so(row):
    figures = row.measure()
    verdicts = row.verdicts(figures)
    assert verdicts == ["exact" if g in row.theory.exact else "not" for g in GAUGES], figures
    words, *cells = PAGE[row.label]
    assert words == row.theory.words
    for gauge, text, verdict, figure in zip(GAUGES, cells, verdicts, figures, strict=True):
        if verdict == "exact":
            assert text == "exact", gauge
        else:
            assert text == "diverges" or re.fullmatch(r"\de[+-]\d\d", text), gauge
            assert (text == "diverges") == (figure == float("inf")), gauge


@EVERY_ROW
def test_the_run_is_one_in_which_something_happens(row):
    """A method that stands still, or flies away, would prove nothing."""
    problem = make_problem(20, 16, 3)
    params, _ = run(row.make(), problem, steps=50, lr=row.lr)
    assert problem.loss(params) < 0.98 * problem.loss(problem.params)


def test_every_method_has_a_row_and_the_page_no_other():
    labels = [row.label for row in TABLE.ROWS]
    assert set(methods.__all__) <= {label.partition("(")[0] for label in labels}
    assert sorted(PAGE) == sorted(labels)
    assert len(set(labels)) == len(labels)


def test_thresholds_are_those_of_the_promise():
    assert TABLE.ROUNDING == 1e-10
    assert theory.ENTRIES.least >= 0.1  # Adam, under a rotation
    assert (theory.SYLVESTER.least, theory.SYLVESTER.most) == (1e-3, 1e-1)
    assert tuple(theory.EVERY.exact) == GAUGES


def test_a_figure_against_the_theory_is_not_hidden():
    row = TABLE.ROWS[[r.label for r in TABLE.ROWS].index("lora_rite()")]
    broken = [0.3] * len(GAUGES)
    assert row.verdicts(broken) == ["neither"] * len(GAUGES)
    assert row.verdicts([float("nan")] * len(GAUGES)) == ["neither"] * len(GAUGES)
    assert "against the theory" in TABLE.cell("neither", 0.3)


def test_the_page_is_written_by_the_script(tmp_path, monkeypatch):
    monkeypatch.setattr(TABLE, "ROWS", TABLE.ROWS[:3])
    written, committed = TABLE.page(), TABLE.PAGE.read_text(encoding="utf-8")
    assert committed.startswith(TABLE.HEAD)
    assert committed.endswith(TABLE.TAIL)
    assert written.startswith(TABLE.HEAD)
    assert written.count("\n| `") == 2
    assert written.count("\n- `") == 1

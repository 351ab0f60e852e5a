"""The theory of invariances: every verdict of a measurement is what it says."""

import pytest

from rlora import methods
from rlora.cli.claims import theory
from rlora.cli.claims.theory import ROWS
from rlora.testing import GAUGES, make_problem, run

EVERY_ROW = pytest.mark.parametrize("row", ROWS, ids=lambda row: row.label)


@EVERY_ROW
def test_theory_holds(row):
    figures = dict(zip(GAUGES, row.measure(), strict=True))
    assert all(row.holds(*figure) for figure in figures.items()), figures


@EVERY_ROW
def test_the_run_is_one_in_which_something_happens(row):
    """A method that stands still, or flies away, would prove nothing."""
    problem = make_problem(20, 16, 3)
    params, _ = run(row.make(), problem, steps=50, lr=row.lr)
    assert problem.loss(params) < 0.98 * problem.loss(problem.params)


def test_every_method_has_a_row_of_its_own():
    labels = [row.label for row in ROWS]
    assert set(methods.__all__) <= {label.partition("(")[0] for label in labels}
    assert len(set(labels)) == len(labels)


def test_thresholds_are_those_of_the_promise():
    assert theory.ROUNDING == 1e-10
    assert theory.ENTRIES.least >= 0.1  # Adam, under a rotation
    assert (theory.SYLVESTER.least, theory.SYLVESTER.most) == (1e-3, 1e-1)
    assert tuple(theory.EVERY.exact) == GAUGES


def test_a_figure_against_the_theory_is_not_hidden():
    row = ROWS[[r.label for r in ROWS].index("lora_rite()")]
    assert not any(row.holds(gauge, x) for gauge in GAUGES for x in (0.3, float("nan")))
    row = ROWS[[r.label for r in ROWS].index("AdamW")]
    assert [row.holds("rotation", x) for x in (0.3, 1e-12, float("nan"))] == [True, False, False]

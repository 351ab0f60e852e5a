"""The page of growth is made of its record."""

import importlib.util
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "docs" / "reference" / "growth.py"
spec = importlib.util.spec_from_file_location("growth_page", SCRIPT)
DOCS = importlib.util.module_from_spec(spec)
spec.loader.exec_module(DOCS)


def test_the_page_is_made_of_the_record():
    assert DOCS.PAGE.read_text(encoding="utf-8") == DOCS.page()


def test_the_page_says_how_many_runs_there_were():
    text = " ".join(DOCS.PAGE.read_text(encoding="utf-8").split())
    lines = [x for x in DOCS.read() if x["method"] == DOCS.DEFAULT]
    ranks = {(m, n, r): min(m, n, r) for m, n, r in (*DOCS.SHAPES, DOCS.MORE)}
    expected = sum(ranks.values()) * len(DOCS.NOISES) * len(DOCS.RATES) * len(DOCS.DTYPES)
    assert sum(int(x["runs"]) for x in lines) == expected == 696
    assert f"Of 480 runs of each method and {expected} of `{DOCS.DEFAULT}`, at rates" in text


@pytest.mark.parametrize("label", sorted({x["method"] for x in DOCS.read()}))
def test_a_method_in_the_record_has_every_shape_and_dtype(label):
    lines = [x for x in DOCS.read() if x["method"] == label]
    assert label in DOCS.ROWS
    assert len({(x["m"], x["n"], x["r"], x["dtype"]) for x in lines}) == len(lines)
    assert len(lines) == (len(DOCS.SHAPES) + (label == DOCS.DEFAULT)) * len(DOCS.DTYPES)


def test_the_cases_have_ranks_that_fit():
    assert {x.rank for x in DOCS.cases(24, 16, 8, every=False)} == {1, 2, 4, 8}
    assert {x.rank for x in DOCS.cases(24, 16, 8, every=True)} == {*range(1, 9)}
    assert {x.rank for x in DOCS.cases(3, 20, 8, every=False)} == {1, 2, 3}


def test_the_formula_of_rounding_holds_in_the_record():
    """A third, in the mean over entries: within half of it either way for medians of eight draws."""
    law = [float(x["median"]) for key, x in DOCS.rounding().items() if key[0] == "law"]
    assert len(law) == 36
    assert all(1 / 6 < x < 1 / 2 for x in law)

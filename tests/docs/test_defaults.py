"""The page of defaults is what the signatures say, and has a reason for each."""

import importlib.util
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "docs" / "reference" / "defaults.py"


@pytest.fixture(scope="module")
def script():
    spec = importlib.util.spec_from_file_location("defaults", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_page_is_made_of_the_signatures(script):
    assert script.PAGE.read_text(encoding="utf-8") == script.page()


def test_a_default_without_a_reason_is_refused(script):
    def method(*, novelty: float = 0.5) -> None: ...

    with pytest.raises(KeyError, match=r"novelty=0\.5"):
        script.table("Methods", [("method", method)])


def test_the_most_common_default_is_of_others(script, monkeypatch):
    def quick(*, steps: int = 1) -> None: ...
    def slow(*, steps: int = 2) -> None: ...

    monkeypatch.setattr(script, "WHY", {"steps=1": "haste", "steps=2": "care"})
    rows = script.table("Methods", [("a", quick), ("b", slow), ("c", slow), ("d", slow)])
    assert rows[-2:] == ["| `steps=1`: `a` | haste |", "| `steps=2`: others | care |"]
    rows = script.table("Classes", [("A", slow), ("B", slow)], [("a", quick), ("b", slow)])
    assert rows[-1] == "| `steps=2`: `A` | care |"


def test_no_reason_is_left_of_a_default_that_is_gone(script):
    page = script.page()
    assert [default for default in script.WHY if f"`{default}`" not in page] == []

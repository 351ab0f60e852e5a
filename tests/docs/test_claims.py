"""The page of claims is made of its records, and has every claim of the registry."""

import importlib.util
import re
from pathlib import Path

import pytest

from rlora.cli.claims import CLAIMS
from rlora.cli.claims.evidence import read_evidence
from rlora.cli.claims.theory import ROWS

SCRIPT = Path(__file__).parents[2] / "docs" / "reference" / "claims.py"


def script():
    spec = importlib.util.spec_from_file_location("claims_page", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


DOCS = script()


@pytest.mark.parametrize("name", CLAIMS)
def test_each_claim_has_a_record_of_today_and_a_figure(name):
    claim, path = CLAIMS[name], DOCS.FOLDER / f"{name}.json"
    record = read_evidence(path)
    assert record["as_documented"]
    assert not record["quick"]
    assert (record["claim"], record["statement"], record["source"]) == claim[:3]
    assert path.stat().st_size < 50_000
    assert "<svg" in path.with_suffix(".svg").read_text(encoding="utf-8")


def test_the_figure_of_invariances_has_every_row_of_theory():
    (panel,) = read_evidence(DOCS.FOLDER / "invariance.json")["panels"]
    assert panel["rows"] == [row.label for row in ROWS]


def test_the_page_is_made_of_the_records():
    assert DOCS.PAGE.read_text(encoding="utf-8") == DOCS.page() + "\n"
    sections = re.findall(r"^## (.+)$", DOCS.page(), re.MULTILINE)
    assert sections == list(CLAIMS)


def test_no_file_is_left_of_a_claim_that_is_gone():
    names = {f"{name}.{suffix}" for name in CLAIMS for suffix in ("svg", "json")}
    assert {path.name for path in DOCS.FOLDER.iterdir()} == names


def test_a_verdict_against_the_documents_is_not_hidden():
    record = read_evidence(DOCS.FOLDER / f"{next(iter(CLAIMS))}.json")
    off = {**record, "verdict": "FAILS, documented as holding"}
    assert "FAILS, documented as holding" in "\n".join(DOCS.summary([off]))
    check = {**record["checks"][0], "value": None, "holds": False}
    assert DOCS.check_line(check).split(" | ")[1:] == ["none, not ≤ 65 |"]
    assert DOCS.failed([check])[-1] == DOCS.check_line(check)
    assert DOCS.failed(record["checks"]) == []


def test_a_paper_is_a_link_and_what_is_said_of_it_stays():
    source = "From A.-B. C. Dé, E. Fgh. A Title: Is It? arXiv:1234.56789, 2024, with S. Theorem 1."
    link = "[arXiv:1234.56789](https://arxiv.org/abs/1234.56789)"
    assert DOCS.linked(source) == f"From {link}, with S. Theorem 1"


def test_the_script_keeps_what_the_command_leaves(tmp_path, monkeypatch):
    monkeypatch.setattr(DOCS, "FOLDER", tmp_path / "claims")
    assert DOCS.refresh(["feature-learning", "--quick"]) == 0
    kept = sorted(path.name for path in DOCS.FOLDER.iterdir())
    assert kept == ["feature-learning.json", "feature-learning.svg"]

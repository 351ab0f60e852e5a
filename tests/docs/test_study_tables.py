"""Tables of the study on record are what its command makes of the records, and its page names them."""

import shutil
from pathlib import Path

import pytest

pytest.importorskip("matplotlib")
pytest.importorskip("torch")

from rlora.cli.study.tables import write_tables

PAGE = Path(__file__).parents[2] / "docs" / "reference" / "study.md"


@pytest.mark.parametrize("folder", ["study", "study/strings"])
def test_tables_of_the_study(folder, tmp_path):
    kept = PAGE.parent / folder
    for path in kept.glob("*.jsonl"):
        shutil.copy(path, tmp_path)
    write_tables(tmp_path)
    made, known = (
        {path.name: path.read_text(encoding="utf-8") for path in place.glob("*.csv")}
        for place in (tmp_path, kept)
    )
    assert made == known
    text = PAGE.read_text(encoding="utf-8")
    assert not [name for name in known if f"({folder}/{name})" not in text]

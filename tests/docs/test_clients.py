"""The table of clients is what the marks on the tests say."""

import importlib.util
from pathlib import Path

ROOT = Path(__file__).parents[2]


def load():
    script = ROOT / "docs" / "reference" / "clients.py"
    spec = importlib.util.spec_from_file_location("clients", script)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_page_has_the_table_as_it_is_now():
    clients = load()
    page = clients.PAGE.read_text(encoding="utf-8")
    assert clients.BEGIN in page
    assert clients.rewritten(page) == page


def test_every_page_of_a_client_is_there():
    clients = load()
    assert clients.HOW_TO.keys() <= {client for client, _, _ in clients.marks()}
    for page in clients.HOW_TO.values():
        assert (ROOT / "docs" / "how-to" / f"{page}.md").is_file()

"""The table of clients in the README, made of the marks on the tests: python docs/reference/clients.py.

A test that shows something of a client says so: ``@pytest.mark.works(client, what)`` or
``@pytest.mark.refuses(client, what)``.
"""

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[2]
BEGIN, END = "<!-- clients: made by docs/reference/clients.py -->", "<!-- end of clients -->"
MARKS = ("works", "refuses")


def marks() -> Iterator[tuple[str, str, str]]:
    """(client, mark, what) of every marked test, in the order of files and lines."""
    for path in sorted((ROOT / "tests").rglob("test_*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
                if node.func.attr in MARKS and ast.unparse(node.func.value) == "pytest.mark":
                    client, what = (ast.literal_eval(argument) for argument in node.args)
                    yield client, node.func.attr, what


def table() -> str:
    """Markdown: a row for each client."""
    rows: dict[str, dict[str, list[str]]] = {}
    for client, mark, what in marks():
        said = rows.setdefault(client, {mark: [] for mark in MARKS})[mark]
        if what not in said:
            said.append(what)
    lines = ["| client | works | is refused |", "| --- | --- | --- |"]
    for client in sorted(rows, key=str.lower):
        cells = ["; ".join(rows[client][mark]) for mark in MARKS]
        lines.append(f"| {client} | {' | '.join(cells)} |")
    return "\n".join(lines)


def rewritten(text: str) -> str:
    """A page with the table as it is now."""
    head, _, rest = text.partition(BEGIN)
    _, _, tail = rest.partition(END)
    return f"{head}{BEGIN}\n\n{table()}\n\n{END}{tail}"


if __name__ == "__main__":
    page = ROOT / "README.md"
    page.write_text(rewritten(page.read_text()))
    sys.stdout.write(table() + "\n")

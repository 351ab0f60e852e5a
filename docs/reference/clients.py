"""The table of clients, made of the marks on tests: python docs/reference/clients.py.

A test that shows something of a client says so: ``@pytest.mark.works(client, what)`` or
``@pytest.mark.refuses(client, what)``.
"""

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

from marks import between

ROOT = Path(__file__).parents[2]
PAGE = Path(__file__).with_suffix(".md")
BEGIN, END = "<!-- clients: made by docs/reference/clients.py -->", "<!-- end of clients -->"
MARKS = ("works", "refuses")
HOW_TO = {
    "a loop of one's own": "own_loop",
    "accelerate": "trainers",
    "axolotl": "trainers",
    "DDP": "distributed",
    "flax nnx": "optax",
    "DeepSpeed ZeRO 1 to 3": "deepspeed",
    "FSDP1, tensor parallelism": "distributed",
    "FSDP2": "distributed",
    "kohya sd-scripts, musubi-tuner": "trainers",
    "Lightning": "trainers",
    "LLaMA-Factory v0": "trainers",
    "LLaMA-Factory v1": "trainers",
    "mlx-lm": "optax",
    "ms-swift": "trainers",
    "optax": "optax",
    "PEFT": "layouts",
    "PEFT's method comparison": "trainers",
    "torch.compile": "own_loop",
    "transformers Trainer": "transformers",
    "TRL SFTTrainer": "trainers",
    "tunix": "trainers",
}
"""Pages of docs/how-to, by client."""


def marks() -> Iterator[tuple[str, str, str]]:
    """(client, mark, what) of every marked test, in the order of files and lines."""
    for path in sorted((ROOT / "tests").rglob("test_*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            function = ast.unparse(node.func) if isinstance(node, ast.Call) else ""
            mark = function.removeprefix("pytest.mark.")
            if mark in MARKS and mark != function:
                client, what = (ast.literal_eval(argument) for argument in node.args)
                yield client, mark, what


def table() -> str:
    """Markdown: a row for each client."""
    rows: dict[str, dict[str, list[str]]] = {}
    for client, mark, what in marks():
        said = rows.setdefault(client, {mark: [] for mark in MARKS})[mark]
        if what not in said:
            said.append(what)
    lines = ["| client | works | is refused |", "| --- | --- | --- |"]
    for client in sorted(rows, key=str.lower):
        page = HOW_TO.get(client)
        name = f"[{client}](../how-to/{page}.md)" if page else client
        lines.append(f"| {name} | {' | '.join('; '.join(rows[client][mark]) for mark in MARKS)} |")
    return "\n".join(lines)


def rewritten(text: str) -> str:
    """A page with the table as it is now."""
    return between(text, BEGIN, END, table())


if __name__ == "__main__":
    PAGE.write_text(rewritten(PAGE.read_text()))
    sys.stdout.write(table() + "\n")

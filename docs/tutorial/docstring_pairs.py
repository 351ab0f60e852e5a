"""Real text that every Python installation carries: signatures and docstrings of its library.

``harvest()`` reads the standard library's source files and gives one `Pair` for each documented
function, always in the same order. ``split()`` divides the pairs by top-level module, so that no
module, and no docstring, is in two parts.
"""

import ast
import hashlib
import sysconfig
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

# Tests, vendored packages and demos: their docstrings are notes, not descriptions.
SKIPPED = {"test", "tests", "site-packages", "dist-packages", "idlelib", "lib2to3", "turtledemo"}
WORDS = range(5, 41)


class Pair(NamedTuple):
    """A signature as a prompt, the first paragraph of its docstring, and where they are from."""

    module: str
    prompt: str
    docstring: str

    @property
    def top(self) -> str:
        return self.module.partition(".")[0]


def harvest(root: Path | None = None) -> list[Pair]:
    """Pairs of all public functions and methods under a folder; the standard library's if None."""
    root = root or Path(sysconfig.get_path("stdlib"))
    seen: set[str] = set()
    pairs = []
    for path in sorted(root.rglob("*.py")):
        parts = path.relative_to(root).with_suffix("").parts
        if SKIPPED & set(parts):
            continue
        for pair in pairs_of_file(path, ".".join(p for p in parts if p != "__init__")):
            # Overrides repeat their parent's docstring; a repeated one could leak between parts.
            key = pair.docstring.lower()
            if key not in seen:
                seen.add(key)
                pairs.append(pair)
    return pairs


def pairs_of_file(path: Path, module: str) -> Iterator[Pair]:
    """Pairs of one source file, in the order in which they stand there."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # old escapes in strings warn when parsed
        try:
            tree = ast.parse(path.read_bytes())
        except (SyntaxError, ValueError):  # kept broken on purpose, or for another version
            return
    yield from pairs_of_body(tree.body, module, module)


def pairs_of_body(body: list[ast.stmt], where: str, module: str) -> Iterator[Pair]:
    """Pairs of a module's or a class's statements; nested functions are left out."""
    for node in body:
        if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
            yield from pairs_of_body(node.body, f"{where}.{node.name}", module)
        elif isinstance(node, ast.FunctionDef) and not node.name.startswith("_"):
            text = " ".join((ast.get_docstring(node) or "").split("\n\n")[0].split())
            if len(text.split()) in WORDS:
                signature = f"def {node.name}({ast.unparse(node.args)}):"
                yield Pair(module, f'# {where}\n{signature}\n    """', text)


def split(pairs: list[Pair]) -> dict[str, list[Pair]]:
    """Train, validation and test part; whole top-level modules, chosen by a hash of the name."""
    parts: dict[str, list[Pair]] = {"train": [], "validation": [], "test": []}
    for pair in pairs:
        bucket = hashlib.sha256(pair.top.encode()).digest()[0] % 10
        parts[{0: "validation", 1: "test"}.get(bucket, "train")].append(pair)
    return parts


def sample(pairs: list[Pair], count: int) -> list[Pair]:
    """At most `count` pairs, evenly spaced, so that every module has its share."""
    count = min(count, len(pairs))
    return [pairs[i * len(pairs) // count] for i in range(count)]

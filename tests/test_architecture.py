"""Rules checked on the source: imports between packages, operations of the core, sizes, words."""

import ast
import re
import statistics
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FOLDERS = {"rlora": ROOT / "rlora", "rlora.backends": ROOT / "backends", "rlora.cli": ROOT / "cli"}
ALLOWED = {
    "core": {"core"},
    "methods": {"core"},
    "pairing": {"core"},
    "testing": {"core", "methods"},
    "initializers": {"core"},
    "backends": {"core"},
    "optax": {"core", "methods", "pairing"},
    "torch": {"core", "methods", "pairing", "initializers"},  # the shell around them
    "__init__": {"core", "methods", "pairing", "initializers"},
    "write_stubs": {"torch", "optax"},  # and nobody imports it but tests
    "integrations": {"torch", "optax", "__init__"},  # and nobody imports them but their trainers
    "cli": {"core", "methods", "pairing", "testing", "backends", "torch", "optax", "__init__"},
}
FRAMEWORKS = {
    "torch": {
        "rlora.torch",
        "rlora.backends.torch",
        "rlora.backends._torch_algebra",
        "rlora.backends._torch_cpu",
        "rlora.backends._torch_dtensor",
        "rlora.backends._torch_precision",
        "rlora.backends._torch_stacks",
        "rlora.cli.study",
        "rlora.integrations",
    },
    "jax": {
        "rlora.optax",
        "rlora.optax.param_tree",
        "rlora.optax.meshes",
        "rlora.optax.pair_transformation",
        "rlora.backends.jax",
    },
    "optax": {
        "rlora.optax",
        "rlora.optax.param_tree",
        "rlora.optax.method_transformations",
        "rlora.optax.pair_transformation",
        "rlora.integrations.tunix",
    },
    "cupy": {"rlora.backends.cupy"},
    "axolotl": {"rlora.integrations.axolotl"},
    "deepspeed": {"rlora.integrations.deepspeed"},
    "pydantic": {"rlora.integrations.axolotl"},
    "llamafactory": {"rlora.integrations.llama_factory"},
    "swift": {"rlora.integrations.ms_swift"},
    "transformers": {"rlora.cli.study", "rlora.integrations.trainer_callback"},
    "tunix": {"rlora.integrations.tunix"},
}


def modules():
    found = {}
    for package, folder in FOLDERS.items():
        for path in folder.rglob("*.py"):
            parts = path.relative_to(folder).with_suffix("").parts
            name = ".".join((package, *parts)).removesuffix(".__init__")
            found[name] = (path, ast.parse(path.read_text()))
    return found


MODULES = modules()
EVERY = pytest.mark.parametrize("name", MODULES)


def imports(name):
    """Absolute names of what a module imports, wherever in it the statement stands."""
    path, tree = MODULES[name]
    package = name if path.name == "__init__.py" else name.rpartition(".")[0]
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parts = package.split(".")[: len(package.split(".")) - node.level + 1]
                base = ".".join([*parts, base] if base else parts)
            for alias in node.names:
                full = f"{base}.{alias.name}"
                yield full if full in MODULES else base


def part(module):
    parts = module.split(".")
    return "__init__" if len(parts) == 1 else parts[1]


@EVERY
def test_who_imports_whom(name):
    mine = part(name)
    for target in imports(name):
        if target.split(".")[0] == "rlora" and part(target) != mine:
            assert part(target) in ALLOWED[mine], f"{name} imports {target}"


@EVERY
def test_methods_do_not_import_each_other(name):
    if part(name) == "methods" and name != "rlora.methods":
        assert not [t for t in imports(name) if part(t) == "methods" and t.startswith("rlora")]


@EVERY
def test_frameworks_stay_in_their_files(name):
    for target in imports(name):
        library = target.split(".")[0]
        if library in FRAMEWORKS:
            assert any(name == x or name.startswith(f"{x}.") for x in FRAMEWORKS[library]), target
        if library == "array_api_compat":
            assert name == "rlora.core.dispatch"
        if library in ("click", "rich"):
            assert part(name) == "cli"


@EVERY
def test_folders_of_torch_import_downwards(name):
    """Pairs, then a step over them, starts and monitors; optimizers stand on all of these."""
    floors = {"pairing": 0, "step": 1, "init": 1, "monitor": 1, "optimizers": 2}
    mine, *rest = name.removeprefix("rlora.torch.").split(".")
    if not name.startswith("rlora.torch.") or mine not in floors or not rest:
        return
    for target in imports(name):
        theirs = target.removeprefix("rlora.torch.").split(".")[0]
        if target.startswith("rlora.torch.") and theirs != mine:
            assert floors[theirs] < floors[mine], f"{name} imports {target}"


def test_no_import_circle():
    graph = {name: {t for t in imports(name) if t in MODULES and t != name} for name in MODULES}
    # A package's __init__ re-exports its modules: what counts is who needs whom.
    done, path = set(), []

    def visit(name):
        assert name not in path, " -> ".join([*path[path.index(name) :], name])
        if name in done:
            return
        path.append(name)
        for target in graph[name]:
            visit(target)
        path.pop()
        done.add(name)

    for name in graph:
        visit(name)


@EVERY
def test_no_assert_no_print(name):
    """Code that could run untrusted text or bytes is searched for in tests/test_security.py."""
    _, tree = MODULES[name]
    allowed_assert = name.startswith("rlora.testing")
    for node in ast.walk(tree):
        assert allowed_assert or not isinstance(node, ast.Assert), f"{name}:{node.lineno}"
        called = ast.unparse(node.func) if isinstance(node, ast.Call) else ""
        assert called not in ("print", "sys.stdout.write", "sys.stderr.write"), name


@pytest.mark.parametrize("name", [n for n in MODULES if part(n) in ("core", "methods")])
def test_core_and_methods_write_into_no_array(name):
    """Arrays in, arrays out: no out=, no item assignment to an array, no array asked for its value."""
    _, tree = MODULES[name]
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            assert all(keyword.arg != "out" for keyword in node.keywords), name
            method = node.func.attr if isinstance(node.func, ast.Attribute) else ""
            assert method not in ("item", "tolist"), name
            assert not (method.endswith("_") and not method.startswith("_")), name


@EVERY
def test_sizes(name):
    path, tree = MODULES[name]
    lines = path.read_text().count("\n")
    assert lines <= 300, f"{path.name} has {lines} lines"
    for node in ast.walk(tree):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            assert code_lines(node) <= 60, f"{name}.{node.name}"


def code_lines(node):
    doc = node.body[0] if ast.get_docstring(node) else None
    return node.end_lineno - node.lineno + 1 - (doc.end_lineno - doc.lineno + 1 if doc else 0)


def test_functions_are_short_and_typed():
    functions = [
        node
        for _, tree in MODULES.values()
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef)
    ]
    assert statistics.median(map(code_lines, functions)) <= 12
    for node in functions:
        arguments = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
        bare = [a.arg for a in arguments if a.annotation is None and a.arg not in ("self", "cls")]
        assert not bare, f"{node.name}: {bare}"


QUESTIONS = ("What", "How", "Whether", "Where", "When", "Of", "Who", "Whose", "Which", "Why")
SOURCES = [
    path.relative_to(ROOT)
    for folder in ("rlora", "backends", "cli", "asv_bench", "docs", "tests")
    for path in sorted((ROOT / folder).rglob("*.py"))
]


def docstrings(tree):
    """Every bare string that opens a body or follows an assignment, private or not."""
    for node in ast.walk(tree):
        body = getattr(node, "body", None)
        for statement in body if isinstance(body, list) else ():
            value = statement.value if isinstance(statement, ast.Expr) else None
            if isinstance(value, ast.Constant) and isinstance(value.value, str):
                yield value.value


@pytest.mark.parametrize("path", SOURCES, ids=str)
def test_docstrings_begin_with_a_verb_or_a_noun_phrase(path):
    for text in docstrings(ast.parse((ROOT / path).read_text(encoding="utf-8"))):
        first = text.split(maxsplit=1)[0].strip(":,.")
        assert first not in QUESTIONS, f"{path}: {text.splitlines()[0]}"


GONE = {
    "contender": "case, or optimizer",
    "yardstick": "baseline",
    "rival": "third party",
    "race": "timing",
    "wing": "package, or folder",
    "verb": "operation",
    "bundle": "RankGroup",
    "rank wise": "by_rank",
    "bed": "workload",
    "conduct": "runner",
    "link": "transformation",
    "small algebra": "r x r algebra",
    "escaped mass": "rho, as in the paper",
    "plain step": "step of the baseline, or of descent",
    "updated plainly": "updated by AdamW, or by the base optimizer",
    "fly away": "diverge",
    "if mute": "if unavailable",
    "behind our back": "what it is that is disabled",
}
"""Private words for common things, and what to say instead."""

ELSEWHERE = {
    "link": ("docs/", "tests/", "asv_bench/", "rlora/core/transform.py"),  # those of pages
    "bundle": ("CHANGELOG.md",),  # the names of before
    "rank wise": ("CHANGELOG.md",),
}
"""Files that may have a word, by the beginnings of their paths."""

PAGES = [
    path.relative_to(ROOT)
    for path in (
        *ROOT.glob("*.md"),
        *(ROOT / "docs").rglob("*.md"),
        *(ROOT / "docs").rglob("*.rst"),
    )
]


def words_gone(path, text):
    """Words of `GONE` among names, docstrings, comments and prose, in the singular or plural."""
    spaced = re.sub(r"(?<=[a-z])(?=[A-Z])|_|\s+", " ", text).lower()
    return [
        word
        for word in GONE
        if re.search(rf"(?<![a-z-]){word}s?(?![a-z-])", spaced)
        and not path.as_posix().startswith(ELSEWHERE.get(word, ()))
    ]


@pytest.mark.parametrize(
    "path", [path for path in (*SOURCES, *PAGES) if path.name != Path(__file__).name], ids=str
)
def test_no_word_comes_back_that_is_gone(path):
    found = words_gone(path, (ROOT / path).read_text(encoding="utf-8"))
    assert not found, {word: f"say {GONE[word]}" for word in found}


@pytest.mark.parametrize("path", [x for x in PAGES if x.parts[0] == "docs"], ids=str)
def test_prose_has_short_lines(path):
    """Tables and pictures need one line a row."""
    text = (ROOT / path).read_text(encoding="utf-8")
    prose = re.sub("^```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE).splitlines()
    long = [x for x in prose if len(x) > 120 and not x.lstrip().startswith(("|", "![", "    "))]
    assert not long


def test_the_guard_sees_what_it_should():
    """A law's test must be able to fail."""
    code = '"""Fine."""\nX = 1\n"""Of X."""\ndef f():\n    """Whether it is so."""\n'
    assert [d.split()[0] for d in docstrings(ast.parse(code))] == ["Fine.", "Of", "Whether"]
    text = "class BundleOf:\n    def races_of(wings): 'a plain\n step'  # the verbs"
    assert words_gone(Path("x.py"), text) == ["race", "wing", "verb", "bundle", "plain step"]
    assert words_gone(Path("x.md"), "a trace, embed, uplink, wingspan, cross-link") == []
    assert "rlora.core.metric" in set(imports("rlora.methods.scaled"))
    assert "torch" in set(imports("rlora.torch.step.plan"))
    assert len(MODULES) > 15


def run_python(code, *flags):
    done = subprocess.run(
        [sys.executable, *flags, "-c", code],
        capture_output=True,
        text=True,
        timeout=900,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_import_is_light():
    out = run_python(
        "import sys, rlora\n"
        "heavy = [m for m in ('torch', 'jax', 'cupy', 'click', 'rich', 'optax') if m in sys.modules]\n"
        "sys.stdout.write(repr(heavy))",
    )
    assert out == "[]"


def test_import_takes_little_more_than_that_of_numpy():
    """Twice as long, 0.15 s; against NumPy's, as a busy processor is slower at both."""
    code = (
        "import time, sys; t = time.process_time(); import numpy; u = time.process_time(); "
        "import rlora; sys.stdout.write(str((time.process_time() - t) / (u - t)))"
    )
    assert min(float(run_python(code)) for _ in range(5)) < 4.0


def test_the_list_of_slow_tests_names_tests_that_there_are():
    """A name that has gone would let its test back into the quick run without a word."""
    lines = (ROOT / "tests" / "slow.txt").read_text(encoding="utf-8").splitlines()
    named = [line for line in lines if not line.startswith("#")]
    assert len(named) > 10
    for line in named:
        path, _, function = line.removeprefix("!").partition("[")[0].partition("::")
        assert (ROOT / path).exists(), line
        assert not function or f"def {function}(" in (ROOT / path).read_text("utf-8"), line

"""The pages of the methods: their figures are those of the code, their examples run."""

import ast
import inspect
import re
from pathlib import Path

import numpy as np
import pytest

import rlora
from rlora import methods
from rlora.cli.bench.cost_model import step_flops
from rlora.cli.claims.theory import ROWS
from rlora.testing import make_problem

DOCS = Path(__file__).parents[2] / "docs"
FOLDER = DOCS / "reference" / "methods"
INDEX = FOLDER / "index.md"
PAGES = sorted(path for path in FOLDER.glob("*.md") if path != INDEX)
SHAPES = [(768, 512, 4), (512, 1024, 6)]  # large enough that r x r products are few percent
OPERATORS = {
    ast.Add: lambda x, y: x + y,
    ast.Mult: lambda x, y: x * y,
    ast.Pow: lambda x, y: x**y,
}
# What the index calls "the same path under" is meant without damping.
ASIDE = {"damping", "damping_mode"}


def tables(path):
    """Every row of the tables that have a column "call", as a dict of its cells."""
    rows, header = [], []
    for line in path.read_text(encoding="utf-8").splitlines():
        cells = [cell.strip() for cell in line.strip("|").split(" | ")]
        if not line.startswith("|"):
            header = []
        elif not header:
            header = cells
        elif "call" in header and "---" not in line:
            rows.append({"file": path.name} | dict(zip(header, cells, strict=True)))
    return rows


def code(cell):
    return re.fullmatch(r"\[?`(.*)`(?:\]\(\w+\.md\))?", cell)[1]


def arithmetic(cell, m, n, r):
    """The value of sums, products and powers of m, n, r and numbers; nothing else is allowed."""

    def value(node):
        match node:
            case ast.BinOp():
                return OPERATORS[type(node.op)](value(node.left), value(node.right))
            case ast.Name():
                return {"m": m, "n": n, "r": r}[node.id]
            case ast.Constant(value=int()):
                return node.value
        raise AssertionError(f"{ast.unparse(node)} in {cell}")

    return value(ast.parse(code(cell), mode="eval").body)


def parse_call(text):
    """Name and arguments of a call of methods with literals."""

    def parse(node):
        if not isinstance(node, ast.Call):
            return ast.literal_eval(node)
        assert node.func.id in methods.__all__, node.func.id
        options = {keyword.arg: parse(keyword.value) for keyword in node.keywords}
        return node.func.id, [parse(arg) for arg in node.args], options

    return parse(ast.parse(text, mode="eval").body)


def make(parsed):
    name, args, options = parsed
    return getattr(methods, name)(*map(make, args), **options)


CALLS = [row for path in (INDEX, *PAGES) for row in tables(path)]
EVERY_CALL = pytest.mark.parametrize("row", CALLS, ids=lambda row: f"{row['file']} {row['call']}")
EVERY_METHOD = pytest.mark.parametrize("row", tables(INDEX), ids=lambda row: code(row["call"]))
ALL_PAGES = [INDEX, *PAGES, DOCS / "how-to" / "new_method.md"]


@EVERY_CALL
def test_the_state_has_the_size_on_the_page(row):
    method = make(parse_call(code(row["call"])))
    for shape in SHAPES:
        state = rlora.flatten_state(method.init(make_problem(*shape).params))
        numbers = sum(x.size for x in state.values())
        assert numbers == arithmetic(row["state numbers per pair"], *shape)


@EVERY_CALL
def test_a_step_does_the_flops_on_the_page(row):
    method = make(parse_call(code(row["call"])))
    for shape in SHAPES:
        problem = make_problem(*shape)
        flops = step_flops(method, problem.params, problem.grads(problem.params))
        # The rest, at most 5 %, are products of r x r matrices, which the pages leave out.
        expected = arithmetic(row["flops per step"], *shape)
        assert expected <= flops <= 1.05 * expected
        assert (flops - expected) % (2 * shape[2] ** 3) == 0


@EVERY_METHOD
def test_what_the_second_step_from_zero_does_to_a(row):
    def second_move(lr):
        problem = make_problem(64, 48, 4, zero_B=True)
        method = make(parse_call(code(row["call"])))
        params, state = problem.params, method.init(problem.params)
        for _ in range(2):
            old = params
            params, state = rlora.step(method, old, problem.grads(old), state, lr)
        move, A = np.linalg.norm(params.A - old.A), np.linalg.norm(old.A)
        return float(move / A), float(np.linalg.norm(params.B))

    # Relative: methods that split the product anew have given A another size.
    (large, B), (small, _) = second_move(1e-4), second_move(1e-6)
    match row["from B = 0"]:
        case "A follows":
            root = "balanced_lora" in row["call"]  # both factors are of the order of the root
            assert 0 < small < large / (8 if root else 50)
        case "A jumps":
            assert 0.5 < small / large < 2
        case "A shrinks":  # by stable_lora's share of 5e-4, and by Adam's steps of lr
            assert small == pytest.approx(5e-4, rel=0.1)
        case "A stays":
            assert large == small == 0 < B
        case "nothing moves":
            assert large == small == 0 == B
        case other:
            raise AssertionError(other)


@EVERY_METHOD
def test_the_path_is_the_one_of_the_table(row):
    def complete(call):
        name, args, options = parse_call(call)
        parameters = inspect.signature(getattr(methods, name)).parameters.values()
        options = {p.name: p.default for p in parameters} | options
        return name, args, {key: value for key, value in options.items() if key not in ASIDE}

    wanted = complete(code(row["call"]))
    same = [r.theory for r in ROWS if "(" in r.label and complete(r.label) == wanted]
    undamped = max(same, key=lambda theory: len(theory.exact))
    assert row["same path under"] == undamped.words


def test_every_method_has_a_page_and_a_row():
    in_index = {code(row["call"]).partition("(")[0] for row in tables(INDEX)}
    on_pages = {code(row["call"]).partition("(")[0] for row in CALLS if row["file"] != INDEX.name}
    assert on_pages < in_index == set(methods.__all__)
    assert [call for call, _ in LINKS] == [code(row["call"]) for row in tables(INDEX)]


LINKS = re.findall(r"^\| \[`(.*)`\]\((\w+\.md)\) \|", INDEX.read_text("utf-8"), re.MULTILINE)


PAGE_OF = [(call.partition("(")[0], FOLDER / page) for call, page in LINKS]


def test_the_index_links_every_page_and_the_right_one():
    assert {page for _, page in LINKS} == {path.name for path in PAGES}
    for call, page in LINKS:
        assert f"`rlora.{call.partition('(')[0]}`" in (FOLDER / page).read_text(encoding="utf-8")


@pytest.mark.parametrize("path", ALL_PAGES, ids=lambda path: path.name)
def test_links_lead_somewhere(path):
    for target in re.findall(r"\]\(([^)]+)\)", path.read_text(encoding="utf-8")):
        if "://" not in target:
            assert (path.parent / target.partition("#")[0]).exists(), target


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.stem)
def test_pages_say_what_a_page_says(path):
    text = path.read_text(encoding="utf-8")
    assert re.findall("^## (.*)$", text, re.MULTILINE) == ["Use", "Evidence"]
    assert "arXiv:" in text.rpartition("## Evidence")[2]
    assert re.search(r"\bUse (it|them)\s", text.partition("## Use")[0])


@pytest.mark.parametrize("name", methods.__all__)
def test_the_rest_is_in_the_docstring_that_the_page_names(name):
    """The update rule, every option, and the paper."""
    method = getattr(methods, name)
    rule, _, rest = method.__doc__.partition("    Parameters\n    ----------\n")
    options, _, rest = rest.partition("    Returns\n")
    assert re.search("``.*``|::\n", rule)
    assert inspect.signature(method).parameters.keys() <= {*re.findall(r"\w+", options)}
    (arxiv,) = re.findall(r"arXiv:(\d+\.\d+)", rest.partition("    References\n")[2])[:1]
    page = dict(PAGE_OF)[name]
    assert f"arXiv:{arxiv}" in page.read_text(encoding="utf-8")


def blocks(path):
    return re.findall("```python\n(.*?)```", path.read_text(encoding="utf-8"), re.DOTALL)


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.stem)
def test_the_examples_run(path):
    """The page's method and optimizer, put into the steps of the index."""
    torch = pytest.importorskip("torch")
    torch.manual_seed(0)
    on_arrays, in_torch = blocks(INDEX)
    space = {}
    exec(on_arrays, space)
    exec(in_torch, space)
    for block in blocks(path):
        exec(block, space)
    exec(on_arrays[on_arrays.index("state = ") :], space)
    assert np.isfinite(space["pair"].A).all()
    before = [p.detach().clone() for p in space["model"].parameters()]
    space["model"].zero_grad()
    exec(in_torch[in_torch.index("loss = ") :], space)
    after = list(space["model"].parameters())
    assert any(bool((p != old).any()) for p, old in zip(after, before, strict=True))
    assert all(bool(p.isfinite().all()) for p in after)

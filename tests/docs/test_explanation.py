"""The explanations: their code prints what they show, their tables and drawings are the scripts'."""

import contextlib
import importlib.util
import io
import re
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

import rlora

FOLDER = Path(__file__).parents[2] / "docs" / "explanation"
PAGES = [
    FOLDER / name
    for name in (
        "damping.md",
        "geometry.md",
        "precision.md",
        "why_not_invariant.md",
        "zero_start.md",
    )
]
EVERY_PAGE = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
NUMBER = re.compile(r"-?\d+\.?\d*(?:e[+-]?\d+)?")


def script(name):
    spec = importlib.util.spec_from_file_location(name, FOLDER / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def blocks(page):
    """Pairs of Python code and the text that is shown below it, None where there is none."""
    text = page.read_text(encoding="utf-8")
    pattern = r"```python\n(.*?)```(?:\n\n```text\n(.*?)```)?"
    return [match.groups() for match in re.finditer(pattern, text, re.DOTALL)]


def compare(shown, printed, rel):
    """Equal words, and numbers that differ by little."""
    assert NUMBER.sub("#", shown).split() == NUMBER.sub("#", printed).split()
    numbers = [[float(x) for x in NUMBER.findall(text)] for text in (shown, printed)]
    assert numbers[0] == pytest.approx(numbers[1], rel=rel, abs=1e-4)


def test_these_are_all_pages():
    assert {*PAGES, FOLDER / "index.md"} == {*FOLDER.glob("*.md")}


@EVERY_PAGE
def test_code_prints_what_the_page_shows(page):
    space = {}
    for code, shown in blocks(page):
        with contextlib.redirect_stdout(io.StringIO()) as out:
            exec(compile(code, page.name, "exec"), space)
        # Two or three digits are shown, and BLAS libraries differ in the last bits.
        compare(shown or "", out.getvalue(), rel=0.1)


@EVERY_PAGE
def test_every_figure_below_code_is_printed_by_it(page):
    text = page.read_text(encoding="utf-8")
    assert text.count("```text") == sum(shown is not None for _, shown in blocks(page))


@EVERY_PAGE
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)]+)\)", page.read_text(encoding="utf-8")):
        path, _, anchor = target.partition("#")
        found = (page.parent / path).resolve() if path else page
        assert found.exists(), target
        if anchor:
            titles = re.findall(r"^#+ (.*)$", found.read_text(encoding="utf-8"), re.MULTILINE)
            slugs = [re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles]
            assert anchor in slugs, target


def test_what_a_step_does_to_the_product():
    """The rows of the table of geometry.md, by the page's own code."""
    space = {}
    ((code, _),) = blocks(FOLDER / "geometry.md")
    with contextlib.redirect_stdout(io.StringIO()):
        exec(code, space)
    move, G, s = space["move"], space["G"], space["s"]
    for name in ("even", "uneven"):
        A, B = space[name]
        P_A, P_B = np.linalg.pinv(A) @ A, B @ np.linalg.pinv(B)
        lora_pro = rlora.lora_pro_sgd(gauge="zero", damping=0)
        for method, row in (
            (rlora.chain(), s**2 * (B @ B.T @ G + G @ A.T @ A)),
            (rlora.scaled_sgd(damping=0), s**2 * (P_B @ G + G @ P_A)),
            (lora_pro, P_B @ G + G @ P_A - P_B @ G @ P_A),
        ):
            # Left out: terms of second order in a step of 1e-7, on factors of condition 100.
            np.testing.assert_allclose(move(method, space[name]), row, rtol=1e-4, atol=1e-4)


@pytest.fixture(scope="module")
def precision():
    pytest.importorskip("torch")
    return script("precision")


def test_the_tables_of_precision_are_measured(precision):
    page = (FOLDER / "precision.md").read_text(encoding="utf-8")
    # One digit is shown, of errors that rounding makes.
    compare(page, precision.rewritten(page), rel=0.6)


def test_a_table_is_not_put_on_a_page_without_its_marks(precision):
    with pytest.raises(ValueError, match="expected the marks of gram"):
        precision.rewritten("a page")


def test_what_the_page_says_of_grams(precision):
    error = {name: [precision.error(*way, c) for c in precision.CONDITIONS] for name, way in precision.WAYS.items()}  # fmt: skip
    exact, usual, tf32, bf16 = error.values()
    assert usual[2] < 0.01 < usual[3]  # "while the condition number stays below about 100"
    assert all(a < b / 10 for a, b in zip(exact[:4], usual[:4], strict=True))
    assert tf32[0] > 3 * usual[0]
    assert tf32[1:] == pytest.approx(usual[1:], rel=0.3)
    assert bf16[1] < 1 < bf16[2]


def test_what_the_page_says_of_bfloat16(precision):
    import torch

    def share(lr, stochastic):
        whole = precision.moved(lr, torch.float32, stochastic=False)
        part = precision.moved(lr, torch.bfloat16, stochastic=stochastic)
        return float((part * whole).sum() / (whole * whole).sum())

    nearest = [share(lr, stochastic=False) for lr in precision.RATES]
    assert nearest[0] > 0.95
    assert nearest[2] < 0.15
    for lr in precision.RATES:
        assert share(lr, stochastic=True) == pytest.approx(1, abs=0.02)


# --- drawings -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def drawings():
    pytest.importorskip("matplotlib")
    return script("drawings")


def test_drawings_are_the_same_every_time(drawings, tmp_path):
    drawings.save(tmp_path / "one")
    drawings.save(tmp_path / "two")
    assert {p.stem for p in (tmp_path / "one").iterdir()} == drawings.DRAWINGS.keys()
    for path in (tmp_path / "one").iterdir():
        assert path.read_bytes() == (tmp_path / "two" / path.name).read_bytes()


def test_the_drawings_in_the_repository_are_those_of_the_script(drawings, tmp_path):
    drawings.save(tmp_path)
    for name in drawings.DRAWINGS:
        shown, drawn = (
            (folder / f"{name}.svg").read_text(encoding="utf-8")
            for folder in (drawings.FOLDER, tmp_path)
        )
        words = [re.findall("<text.*?>(.*?)</text>", svg, re.DOTALL) for svg in (shown, drawn)]
        assert words[0] == words[1] != []
        lines = [re.findall('<path d="(.*?)"', svg, re.DOTALL) for svg in (shown, drawn)]
        assert len(lines[0]) == len(lines[1]) > 10
        for one, other in zip(*lines, strict=True):
            ends = [[float(x) for x in NUMBER.findall(path)] for path in (one, other)]
            if len(ends[0]) == len(ends[1]):  # another matplotlib may simplify otherwise
                np.testing.assert_allclose(*ends, atol=5)  # points: and lay out otherwise


def test_every_drawing_is_on_a_page(drawings):
    text = "".join(page.read_text(encoding="utf-8") for page in PAGES)
    assert set(re.findall(r"\(drawings/(\w+)\.svg\)", text)) == drawings.DRAWINGS.keys()
    assert {path.stem for path in drawings.FOLDER.glob("*")} == drawings.DRAWINGS.keys()


def test_the_products_of_the_splits_are_those_in_the_words(drawings):
    words = re.search(r"!\[(.*?)\]\(drawings/splits", (FOLDER / "geometry.md").read_text())[1]
    ends = {
        name: [np.prod(drawings.walk(method, lr, a, 1)[-1]) for a in drawings.SPLITS]
        for name, (method, lr) in drawings.TOY.items()
    }
    plain, scaled, adam = ([f"{x:.2f}" for x in products] for products in ends.values())
    assert re.findall(r"\d\.\d\d", words) == [*plain, *adam, scaled[0]]
    assert len(set(scaled)) == 1


def test_the_damped_inverse_that_is_drawn_is_the_formula(drawings):
    sigma = drawings.SINGULAR_VALUES
    shifts = {
        ("relative", 1.0): 1e-2 * np.mean(sigma**2),
        ("absolute", 1.0): 1e-2,
        ("covariant", 1.0): 1e-2,
        ("covariant", 0.1): 1e-2 / 0.1**2,
    }
    for (mode, alpha), shift in shifts.items():
        drawn = drawings.inverse(1e-2, mode, alpha)
        np.testing.assert_allclose(drawn, 1 / (sigma**2 + shift), rtol=1e-9)  # float64, cond 1e6


def test_steps_of_adam_turn_with_the_basis(drawings):
    steps = [drawings.turned_step(turn, drawings.GRADIENT) for turn in drawings.TURNS]
    angles = sorted(np.rad2deg(np.arctan2(y, x)) for x, y in steps)
    assert max(b - a for a, b in pairwise(angles)) == pytest.approx(30, abs=0.1)
    assert angles[-1] - angles[0] == pytest.approx(60, abs=0.1)

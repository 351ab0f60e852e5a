"""Measure how far the path of the product depends on its factorization, and write invariance.md.

python docs/reference/invariance.py
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Final

from rlora.cli.claims.theory import EVERY, ROUNDING, ROWS, Row
from rlora.testing import GAUGES

PAGE: Final = Path(__file__).with_suffix(".md")


def line(row: Row, figures: Sequence[float]) -> str:
    """The row of a method."""
    cells = map(cell, row.verdicts(figures), figures)
    return f"| {' | '.join((f'`{row.label}`', row.theory.words, *cells))} |"


def cell(verdict: str, figure: float) -> str:
    """The word "exact", or a figure of one digit."""
    if verdict == "exact":
        return verdict
    number = f"{figure:.0e}" if figure < float("inf") else "diverges"
    return number if verdict == "not" else f"**{number}, against the theory**"


HEAD = f"""# Invariance of the methods

See which changes of basis, from `(A, B)` to `(R A, B R⁻¹)`, leave the path of the product as it is.
A method whose path changes has a hidden hyperparameter: the factorization it starts from.

*Largest relative difference of the products over 50 steps on `½|B A - T|²`, (20, 16), rank 3,
float64; "exact": at most {ROUNDING:.0e}. R is three times the identity (scalar), a signed
permutation, a rotation, diagonal, or any (general); the last two have condition number 50.*
"""

SAME = """
*Exact under all five:*
"""

TAIL = """
Options that are not named have their [defaults](defaults.md). `python docs/reference/invariance.py`
makes this page, and a test compares every verdict with theory.

- Only signed permutations map entries to entries, so **entrywise moments** keep no more. Triangular
  halves on both sides of Adam keep scalings and triangular changes of basis instead.
- **Damping**: [by kind](../explanation/damping.md#three-kinds).
- **Norms of the factors** (LoRA-Pro's Sylvester solution) break it a little.
- **Momentum, decoupled decay and orthogonal functions** in orthonormal coordinates keep it.
- A **frozen factor** (LoRA-FA, RAC-LoRA, LoRA-SB): only the space that it spans matters.
"""


def page() -> str:
    """The whole page."""
    header = ["method", "theory: same under", *GAUGES]
    lines = [f"| {' | '.join(cells)} |" for cells in (header, ["---"] * len(header))]
    rows = [(row, row.measure()) for row in ROWS]
    same = [row for row, figures in rows if set(row.verdicts(figures)) == {"exact"}]
    named = [f"- `{row.label}`" for row in same if row.theory == EVERY]
    others = [line(row, figures) for row, figures in rows if row not in same or row.theory != EVERY]
    return "\n".join([HEAD, *lines, *others, SAME, *named, TAIL])


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
    print(f"wrote {PAGE.name}")

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

See which changes of basis of the factors leave the path of the product as it is. `(A, B)` and
`(R A, B R⁻¹)` are two factorizations of one product. A method whose path differs between them has a
hidden hyperparameter: the factorization it starts from.

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

- **Entrywise moments** break the invariance: only signed permutations map entries to entries.
  Triangular halves on both sides of Adam keep scalings and triangular changes of basis instead.
- **Damping**: absolute damping compares δ with a Gram of arbitrary size and keeps rotations only,
  relative damping keeps scalings and rotations, covariant damping keeps every change of basis.
- **Norms of the factors** break it a little: LoRA-Pro's Sylvester solution.
- **Momentum, decoupled decay and orthogonal functions** in orthonormal coordinates keep it.

LoRA-FA, RAC-LoRA and LoRA-SB freeze a factor: only the space that it spans matters.
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

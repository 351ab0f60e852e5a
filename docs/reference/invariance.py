"""Does the path of the product depend on how it is split at the start? Writes invariance.md.

python docs/reference/invariance.py
"""

from pathlib import Path
from typing import Final

from rlora.cli.claims.theory import ROUNDING, ROWS, Row
from rlora.testing import GAUGES

PAGE: Final = Path(__file__).with_suffix(".md")


def line(row: Row) -> str:
    """The row of a method."""
    figures = row.measure()
    cells = map(cell, row.verdicts(figures), figures)
    return f"| {' | '.join((f'`{row.label}`', row.theory.words, *cells))} |"


def cell(verdict: str, figure: float) -> str:
    """The word "exact", or a figure of one digit."""
    if verdict == "exact":
        return verdict
    number = f"{figure:.0e}" if figure < float("inf") else "diverges"
    return number if verdict == "not" else f"**{number}, against the theory**"


HEAD = f"""# Invariance of the methods

See which changes of basis of the factors do not change the path of the product. `(A, B)` and
`(R A, B R⁻¹)` are two factorizations of one product; a method that takes different paths from them
has a hidden hyperparameter, the factorization of its start.

*Largest relative difference of the products over 50 steps on `½|B A - T|²`, (20, 16), rank 3,
float64; "exact": at most {ROUNDING:.0e}. R is three times the identity, a signed permutation, a
rotation, diagonal, or any; the last two have condition number 50.*
"""


TAIL = """
`python docs/reference/invariance.py` makes this page, and a test compares every verdict with
theory. Options that are not named have their [defaults](defaults.md).

- **Entrywise moments** break it: only signed permutations map entries to entries. Triangular half
  powers on both sides of Adam keep scalings and triangular changes of basis instead.
- **Damping** breaks it: absolute compares δ with a Gram whose size is arbitrary, relative keeps
  scalings and rotations, covariant everything.
- **A choice by raw norms** breaks it a little: LoRA-Pro's Sylvester solution.
- **Momentum, decoupled decay and orthogonal functions** in orthonormal coordinates keep it.

LoRA-FA, RAC-LoRA and LoRA-SB freeze a factor: there only the space that it spans matters.
"""


def page() -> str:
    """The whole page."""
    header = ["method", "theory: same under", *GAUGES]
    lines = [f"| {' | '.join(cells)} |" for cells in (header, ["---"] * len(header))]
    return "\n".join([HEAD, *lines, *map(line, ROWS), TAIL])


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
    print(f"wrote {PAGE.name}")

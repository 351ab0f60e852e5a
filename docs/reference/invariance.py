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


HEAD = f"""# Who keeps to one path

`(A, B)` and `(R A, B R⁻¹)` are two splits of one product. A method that gives the product the same
path from both has no use for a lucky split; one that does not has a hidden hyperparameter, the
split of its start.

Two runs of 50 steps on `½|B A - T|²`, B A of shape (20, 16) and rank 3, in float64, from the two
splits; the figure is the largest relative difference of the products, `|Y - X| / |X|`. R is three
times the identity, a signed permutation, a rotation, diagonal, or any; the last two have condition
number 50. The second column says under which R theory finds no difference at all, up to damping
and rounding. There the table says *exact* if the figure is at most {ROUNDING:.0e}; elsewhere the
figure itself, to one digit.

    python docs/reference/invariance.py

writes this page; `tests/docs/test_invariance.py` holds every verdict against theory. Options that
are not named have their defaults; what they mean stands on the pages of the
[methods](methods/index.md).
"""

TAIL = """
## What breaks it

- **Entrywise moments.** Adam's square root, or a sign, acts on entries, and only signed
  permutations map entries to entries. Half powers of the Gram on both sides of Adam
  (`placement="both"`) are triangular: they win back scalings, and triangular changes of basis up to
  the damping of 1e-6 that every Gram gets there, and lose permutations.
- **Damping.** `S + δ I` compares δ with a Gram whose size is a matter of the split; relative to the
  trace it is free of scalings. Relative and 1e-6, the default of most methods, is small and not
  nothing: see the rows with it. Covariant damping, that of scaled SGD and AdamW, changes with the
  split as the Gram does.
- **A choice by raw norms.** LoRA-Pro's Sylvester gauge asks for factors' moves near to the raw
  gradients. The weight's move is the same to first order, so a finite step differs a little.
- **What does not:** linear momentum, decoupled decay, orthogonal functions of gradients in
  orthonormal coordinates (LoRA-RITE, LoRA-Muon, Riemannion).

LoRA-FA, RAC-LoRA and LoRA-SB freeze a factor: there the question is whether the *kind* of random or
spectral factor matters, beyond the space it spans.
"""


def page() -> str:
    """The whole page."""
    header = ["method", "theory: same path under", *GAUGES]
    lines = [f"| {' | '.join(cells)} |" for cells in (header, ["---"] * len(header))]
    return "\n".join([HEAD, *lines, *map(line, ROWS), TAIL])


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
    print(f"wrote {PAGE.name}")

"""Does the path of the product depend on how it is split at the start? Writes invariance.md.

python docs/reference/invariance.py
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Final, NamedTuple

import rlora
from rlora import Transform
from rlora.core.decay import add_decayed_weights
from rlora.testing import GAUGES, invariance

PAGE: Final = Path(__file__).with_suffix(".md")
ROUNDING: Final = 1e-10
"""Largest difference in float64 that counts as none: 50 steps, a basis with condition number 50."""


class Theory(NamedTuple):
    """What theory says of a method: the gauges that it cannot see, and how far others take it."""

    words: str
    exact: Sequence[str]
    least: float = 0.1
    most: float = float("inf")


EVERY = Theory("every change of basis", GAUGES)
RATIO = Theory("scalings, rotations", ("scalar", "signed permutation", "rotation"), 1e-2)
DAMPED = RATIO._replace(least=1e-5)  # by 1e-6 only
ROTATION = Theory("rotations", ("signed permutation", "rotation"), 1e-2)
SYLVESTER = ROTATION._replace(least=1e-3, most=1e-1)
SCALED_ENTRIES = Theory("scalings, signed permutations", ("scalar", "signed permutation"))
ENTRIES = Theory("signed permutations", ("signed permutation",))


class Row(NamedTuple):
    """A method with its options, the learning rate of the run, and what theory says."""

    label: str
    make: Callable[[], Transform]
    lr: float
    theory: Theory

    def measure(self) -> list[float]:
        """The worst relative difference of the product, gauge by gauge."""
        return [invariance(self.make(), gauge, lr=self.lr) for gauge in GAUGES]

    def verdicts(self, figures: Sequence[float]) -> list[str]:
        """Per gauge "exact" or "not" where measurement and theory agree, "neither" elsewhere."""
        return [self._verdict(*both) for both in zip(GAUGES, figures, strict=True)]

    def _verdict(self, gauge: str, figure: float) -> str:
        if gauge in self.theory.exact:
            return "exact" if figure <= ROUNDING else "neither"
        return "not" if self.theory.least <= figure <= self.theory.most else "neither"

    def line(self) -> str:
        """The row of the page."""
        figures = self.measure()
        cells = map(cell, self.verdicts(figures), figures)
        return f"| {' | '.join((f'`{self.label}`', self.theory.words, *cells))} |"


def cell(verdict: str, figure: float) -> str:
    """The word "exact", or a figure of one digit."""
    if verdict == "exact":
        return verdict
    number = f"{figure:.0e}" if figure < float("inf") else "diverges"
    return number if verdict == "not" else f"**{number}, against the theory**"


def of(method: Callable[..., Transform], theory: Theory, lr: float = 0.05, **options: Any) -> Row:
    """The row of a method with these options."""
    arguments = ", ".join(f"{name}={value!r}" for name, value in options.items())
    return Row(f"{method.__name__}({arguments})", lambda: method(**options), lr, theory)


COVARIANT: Final = {"damping": 1e-2, "damping_mode": "covariant"}

ROWS: Final = (
    Row("gradient descent", lambda: rlora.chain(add_decayed_weights(0.0)), 0.05, ROTATION),
    Row("AdamW", lambda: rlora.lora_plus(ratio=1.0), 0.05, ENTRIES),
    of(rlora.scaled_sgd, EVERY, damping=0.0),
    of(rlora.scaled_sgd, EVERY, damping=0.0, momentum=0.9, nesterov=True),
    of(rlora.scaled_sgd, EVERY, damping=0.0, order="gauss_seidel"),
    of(rlora.scaled_sgd, EVERY, **COVARIANT),
    of(rlora.scaled_sgd, EVERY, momentum=0.9, weight_decay=0.1, **COVARIANT),
    of(rlora.scaled_sgd, DAMPED),
    of(rlora.scaled_sgd, RATIO, damping=1e-2),
    of(rlora.scaled_sgd, ROTATION, damping=1e-2, damping_mode="absolute"),
    of(rlora.scaled_adamw, ENTRIES),
    of(rlora.scaled_adamw, ENTRIES, placement="after", damping=0.0),
    of(rlora.scaled_adamw, SCALED_ENTRIES, placement="both", damping=0.0),
    of(rlora.lora_rite, EVERY),
    of(rlora.lora_rite, EVERY, escape=True),
    of(rlora.lora_rite, EVERY, weight_decay=0.1),
    of(rlora.lora_rite, EVERY, balance=True),
    of(rlora.lora_rite, EVERY, max_norm=1.0, max_rms=2.0),
    of(rlora.lora_pro_sgd, EVERY, gauge="zero", damping=0.0),
    of(rlora.lora_pro_sgd, EVERY, gauge="balanced", damping=0.0),
    of(rlora.lora_pro_sgd, EVERY, gauge="balanced", momentum=0.9, damping=0.0),
    of(rlora.lora_pro_sgd, SYLVESTER, gauge="sylvester", damping=0.0),
    of(rlora.lora_pro_adamw, ENTRIES, mode="efficient"),
    of(rlora.lora_pro_adamw, EVERY, mode="full", gauge="zero", damping=0.0),
    of(rlora.lora_pro_adamw, EVERY, mode="full", gauge="balanced", damping=0.0),
    of(rlora.lora_pro_adamw, SYLVESTER, mode="full", gauge="sylvester", damping=0.0),
    of(rlora.alt_lora, EVERY, lr=0.2, damping=0.0),
    of(rlora.alt_lora, DAMPED, lr=0.2),
    of(rlora.alt_lora_plus, ENTRIES, damping=0.0),
    of(rlora.ref_lora, EVERY),
    of(rlora.ref_lora, EVERY, lr=0.01, momentum=0.9),
    of(rlora.ref_lora, RATIO, form="scalar"),
    of(rlora.adapre_lora, EVERY, damping=0.0),
    of(rlora.adapre_lora, DAMPED),
    of(rlora.lora_muon, EVERY, lr=0.2),
    of(rlora.lora_muon, EVERY, lr=0.2, nesterov=True, weight_decay=0.1),
    of(rlora.riemannion, EVERY, lr=0.2),
    of(rlora.lora_fa, ENTRIES),
    of(rlora.lora_plus, ENTRIES),
    Row(
        "lora_plus(scaled_sgd(damping=0.0), ratio=4.0)",
        lambda: rlora.lora_plus(rlora.scaled_sgd(damping=0.0), ratio=4.0),
        0.02,
        EVERY,
    ),
    of(rlora.graft_adamw, ENTRIES),
    of(rlora.rac_lora, EVERY, damping=0.0),
    of(rlora.rac_lora, ENTRIES, adam=True),
    of(rlora.lora_sb, ENTRIES),
)

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
  (`placement="both"`) win back common scalings.
- **Damping.** `S + δ I` compares δ with a Gram whose size is a matter of the split; relative to the
  trace it is free of scalings. The default, relative and 1e-6, is small and not nothing: see the
  rows with default damping. Covariant damping changes with the split as the Gram does.
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
    return "\n".join([HEAD, *lines, *(row.line() for row in ROWS), TAIL])


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
    print(f"wrote {PAGE.name}")

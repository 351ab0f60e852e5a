"""How large do factors become where the product needs less than they hold? Writes growth.md.

python docs/reference/growth.py
"""

from collections.abc import Callable
from pathlib import Path
from typing import Final

import rlora
from rlora import Transform, methods
from rlora.testing import Growth, growth
from rlora.testing.growth import adamw

PAGE: Final = Path(__file__).with_suffix(".md")

SHAPES: Final = ((1, 256, 8), (3, 20, 8), (20, 3, 8), (24, 16, 8), (2, 2, 16))
"""m, n and r; the target has rank 1."""

LEARNING_RATE: Final = 4e-3
STEPS: Final = 1000
PROMISED: Final = 40.0
"""Times the largest entry under AdamW."""

ROWS: Final[dict[str, Callable[[], Transform]]] = {
    **{f"{name}()": getattr(methods, name) for name in methods.__all__},
    'scaled_adamw(placement="before")': lambda: rlora.scaled_adamw(placement="before"),
    'scaled_adamw(placement="after")': lambda: rlora.scaled_adamw(placement="after"),
    'lora_pro_adamw(mode="full")': lambda: rlora.lora_pro_adamw(mode="full"),
}


def measure(method: Transform, shape: tuple[int, int, int]) -> tuple[Growth, Growth]:
    """A method and AdamW on the same samples."""
    m, n, r = shape
    ours, theirs = (growth(x, m, n, r, lr=LEARNING_RATE, steps=STEPS) for x in (method, adamw()))
    return ours, theirs


def cell(ours: Growth, theirs: Growth) -> str:
    """The largest entry against AdamW's, marked where it is more than promised or the loss rose."""
    if not ours.largest < float("inf"):
        return "**not finite**"
    times = f"{ours.largest / theirs.largest:.2g}"
    rose = " (loss rose)" if ours.last > ours.first else ""
    return f"**{times}**{rose}" if ours.largest > PROMISED * theirs.largest or rose else times


def line(label: str, make: Callable[[], Transform]) -> str:
    """The row of a method."""
    cells = [cell(*measure(make(), shape)) for shape in SHAPES]
    return f"| {' | '.join((f'`{label}`', *cells))} |"


HEAD = f"""# Factors where the product needs less

A rank above those of the weight and of what is to be learnt leaves directions of the factors that
the product does not see. Here a target of rank 1 is learnt from samples with noise, from B = 0, in
float32, {STEPS} steps at a learning rate of {LEARNING_RATE:g} (`rlora.testing.growth`). The figure
is the largest entry of a factor at the end over that under AdamW with betas (0.7, 0.8) at the same
rate; bold where it is above {PROMISED:g}, which is what `rlora.testing.CONTRACT` allows on one such
problem.

    python docs/reference/growth.py

writes this page.
"""

TAIL = """
`scaled_adamw` is held to this by a filter and by equal steps of both factors
([decision 10](../decisions/0010-null-space.md)). Methods that divide by a Gram matrix without one,
and are bold here, are for ranks below both sides of the weight and learning rates that decay;
`rlora.torch.findings` names a factor that grows, and a pair with r above a side, while it happens.
"""


def page() -> str:
    """The whole page."""
    header = ["method", *(f"{m} x {n}, r = {r}" for m, n, r in SHAPES)]
    lines = [f"| {' | '.join(cells)} |" for cells in (header, ["---"] * len(header))]
    return "\n".join([HEAD, *lines, *(line(*row) for row in ROWS.items()), TAIL])


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
    print(f"wrote {PAGE.name}")

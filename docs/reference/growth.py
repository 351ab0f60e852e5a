"""Growth of factors whose product needs a lower rank than they have; writes growth.md.

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


HEAD = f"""# Growth of the factors

See which methods let a factor grow where its product needs a lower rank than it has, and choose a
smaller r, or another method, for such layers.

*Largest entry of a factor over that under AdamW with betas (0.7, 0.8) at the same rate; target of
rank 1 with noise, from B = 0, float32, {STEPS} steps at {LEARNING_RATE:g}
(`rlora.testing.growth`); bold above {PROMISED:g}, the limit of `rlora.testing.CONTRACT`.*
"""

TAIL = """
`python docs/reference/growth.py` makes this page. `scaled_adamw` has a filter and equal steps of
both factors ([decision 10](../decisions/0010-null-space.md)). Bold methods are for ranks below both
sides of the weight and learning rates that decay; `rlora.torch.findings` names a factor that grows.
"""


def page() -> str:
    """The whole page."""
    header = ["method", *(f"{m} x {n}, r = {r}" for m, n, r in SHAPES)]
    lines = [f"| {' | '.join(cells)} |" for cells in (header, ["---"] * len(header))]
    return "\n".join([HEAD, *lines, *(line(*row) for row in ROWS.items()), TAIL])


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
    print(f"wrote {PAGE.name}")

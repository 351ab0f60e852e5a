"""Measure how factors grow where the product needs less than they hold, and write growth.md.

python docs/reference/growth.py [METHOD...]

runs the methods, all or those named, into growth.csv, and makes the page from it.
"""

import csv
import math
import sys
import textwrap
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import cache
from itertools import product
from pathlib import Path
from statistics import mode
from typing import Any, Final

import rlora
from rlora import Transform, methods
from rlora.backends import get
from rlora.testing import Growth, GrowthCase, growths
from rlora.testing.growth import adamw

PAGE: Final = Path(__file__).with_suffix(".md")
RECORD: Final = Path(__file__).with_suffix(".csv")
ROUNDING: Final = RECORD.with_name("rounding.csv")
"""Made by rounding.py."""

SHAPES: Final = (
    (2, 768, 8),
    (768, 2, 8),
    (3, 20, 8),
    (20, 3, 8),
    (8, 8, 8),
    (24, 16, 8),
    (2, 2, 16),
)
"""m, n and r: ranks above, equal to and below a side."""
DEFAULT: Final = "scaled_adamw()"
"""The method that is tried in every rank of the target, and on another shape."""
MORE: Final = (1, 256, 8)
DTYPES: Final = {"float32": "numpy", "float64": "numpy", "bfloat16": "torch"}
"""And whose arrays: NumPy has no bfloat16."""
NOISES: Final = (0.0, 0.5)
RATES: Final = (1e-4, 1e-3, 4e-3, 1e-2)
STEPS: Final = 1000

USUAL: Final = 4e-3
"""The highest learning rate at which factors and losses are compared with AdamW's."""
PROMISED: Final = 40.0
"""Times the largest entry under AdamW."""
ROWS: Final[dict[str, Callable[[], Transform]]] = {
    **{f"{name}()": getattr(methods, name) for name in methods.__all__},
    'scaled_adamw(placement="before")': lambda: rlora.scaled_adamw(placement="before"),
    'scaled_adamw(placement="after")': lambda: rlora.scaled_adamw(placement="after"),
    'lora_pro_adamw(mode="full")': lambda: rlora.lora_pro_adamw(mode="full"),
    "AdamW": adamw,
}

Row = Mapping[str, str]
"""A line of the record, by the names of its columns."""


def cases(m: int, n: int, r: int, *, every: bool) -> list[GrowthCase]:
    """Target ranks from 1 to the most that a product of this shape can have; noises; rates."""
    most = min(m, n, r)
    ranks = range(1, most + 1) if every else sorted({k for k in (1, 2, 4) if k < most} | {most})
    return [GrowthCase(*x) for x in product(ranks, NOISES, RATES)]


def run(
    make: Callable[[], Transform], shape: tuple[int, int, int], dtype: str, *, every: bool
) -> dict[GrowthCase, Growth]:
    """All cases of one shape in one stack.

    A method that finds its learning rate runs at multiples of it, 1 in the place of `USUAL`.
    """
    backend, some = get(DTYPES[dtype]), cases(*shape, every=every)
    ratio = getattr(make, "lr", USUAL) / USUAL
    theirs = [case._replace(lr=ratio * case.lr) for case in some]
    found = growths(make(), *shape, theirs, STEPS, dtype=dtype, backend=backend)
    return dict(zip(some, found.values(), strict=True))


@cache
def theirs(shape: tuple[int, int, int], dtype: str, *, every: bool) -> dict[GrowthCase, Growth]:
    """AdamW on the same samples."""
    return run(adamw, shape, dtype, every=every)


def rows(label: str) -> Iterator[dict[str, Any]]:
    """The lines of a method: what was worst on each shape in each dtype, and in which case."""
    every = label == DEFAULT
    for shape, dtype in product((*SHAPES, MORE) if every else SHAPES, DTYPES):
        ours = run(ROWS[label], shape, dtype, every=every)
        other = theirs(shape, dtype, every=every)
        usual = [case for case in ours if case.noise and case.lr <= USUAL]
        loss = {case: over(ours[case].last, ours[case].first) for case in ours}
        entry = {case: over(ours[case].largest, other[case].largest) for case in usual}
        near = {case: over(ours[case].last, other[case].last) for case in usual}
        yield {
            "method": label,
            **dict(zip("mnr", shape, strict=True)),
            "dtype": dtype,
            "runs": len(ours),
            "not_finite": sum(math.isinf(x) for x in loss.values()),
            **worst("loss_over_first", loss),
            **worst("entry_over_adamw", entry),
            **worst("loss_over_adamw", near),
        }


def over(x: float, y: float) -> float:
    """``x / y``, inf for whatever is not finite."""
    return x / y if math.isfinite(x) and math.isfinite(y) else math.inf


def worst(name: str, ratios: dict[GrowthCase, float]) -> dict[str, str]:
    """The largest, and the case: rank of the target, noise, learning rate."""
    case = max(ratios, key=lambda x: ratios[x])
    return {
        name: f"{ratios[case]:.4g}",
        f"{name}_in": f"{case.rank} {case.noise:g} {case.lr:g}",
    }


def read() -> list[Row]:
    """The record."""
    with RECORD.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def refresh(labels: Sequence[str]) -> None:
    """Run methods, and put their lines in place of those of before, a method at a time."""
    for label in labels:
        lines: list[Any] = [x for x in read() if x["method"] != label] if RECORD.exists() else []
        lines += rows(label)
        order = list(ROWS).index
        lines.sort(key=lambda x: order(x["method"]))
        with RECORD.open("w", encoding="utf-8", newline="") as file:
            writer = csv.DictWriter(file, list(lines[-1]), lineterminator="\n")
            writer.writeheader()
            writer.writerows(lines)


HEAD: Final = f"""# Factors where the product needs less

See which methods let factors grow where the rank is higher than the task needs, and what bfloat16
loses.

*Largest entry of a factor over that under AdamW, betas (0.7, 0.8), at the same learning rate up to
{USUAL:g}; the worst of {len(SHAPES)} shapes and several ranks of the target in {STEPS} steps with
noise; bold above {PROMISED:g}.*
"""

GROW: Final = """
Take methods of the table only with a rank that the task needs, below both sides of the weight, and
decaying learning rates. [`findings`](../how-to/diagnostics.md) names factors that grow, and pairs
with r above a side. `scaled_adamw()` has a filter ([decision
10](../decisions/0010-null-space.md)).

## bfloat16

The torch classes [round stochastically](../explanation/precision.md#bfloat16-factors); `rlora.step`
and `rlora.optax` do not: keep parameters in float32 there.

*Loss of `rlora.torch.ScaledAdamW` in bfloat16 over that of AdamW in float32, the worst of six draws
and all ranks of the target; rate 4e-3, noise 0.5, 1000 steps. 768 x 2 and 20 x 3 have not converged
in float32 either.*
"""

ROUNDED: Final = """
## Rounding a trained adapter

Use `rlora.torch.round_adapter(model)`, or `rlora.rebalance` for factors.

*Squared change of BA by rounding to bfloat16, over that of AdamW's adapter; the largest median of
eight draws.*
"""

RECORDS: Final = """
Records: [growth](growth.csv), by `growth.py [METHOD...]` in this folder (forty minutes on a core);
[rounding](rounding.csv), by `rounding.py`.
"""

COLUMNS: Final = ("method", *DTYPES)


def most(lines: Sequence[Row], dtype: str) -> str:
    """The worst growth of a dtype, bold above what is promised."""
    value = max(float(x["entry_over_adamw"]) for x in lines if x["dtype"] == dtype)
    return f"**{value:.2g}**" if value > PROMISED else f"{value:.2g}"


def not_finite(label: str, record: Sequence[Row]) -> int:
    """Runs of a method that ended in NaN or inf."""
    return sum(int(x["not_finite"]) for x in record if x["method"] == label)


def runs(record: Sequence[Row]) -> str:
    """The number of runs of a method, with those that have another, in words."""
    counts = {
        label: sum(int(x["runs"]) for x in record if x["method"] == label)
        for label in ROWS
        if label != "AdamW"
    }
    usual = mode(counts.values())
    others = [f"{n} of `{label}`" for label, n in counts.items() if n != usual]
    return " and ".join([f"{usual} runs of each method", *others])


def line(label: str, record: Sequence[Row]) -> list[str]:
    """The row of a method."""
    lines = [x for x in record if x["method"] == label]
    return [f"`{label}`", *(most(lines, dtype) for dtype in DTYPES)]


def below_both_sides(record: Sequence[Row]) -> str:
    """The methods that grow with a rank below both sides too, in a sentence."""
    grown = [
        x
        for x in record
        if int(x["r"]) < min(int(x["m"]), int(x["n"])) and float(x["entry_over_adamw"]) > PROMISED
    ]
    shapes = sorted({f"{x['m']} x {x['n']}, r = {x['r']}" for x in grown})
    names = sorted({f"`{x['method']}`" for x in grown})
    return f"Above it with a rank below both sides too ({'; '.join(shapes)}): {', '.join(names)}."


def grid(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    """A table in Markdown."""
    return [f"| {' | '.join(cells)} |" for cells in (columns, ["---"] * len(columns), *rows)]


def rounding() -> dict[tuple[str, ...], Row]:
    """The record of roundings: by what was measured, m, n, r, rank, noise and label."""
    with ROUNDING.open(encoding="utf-8", newline="") as file:
        keys = ("what", "m", "n", "r", "rank", "noise", "label")
        return {tuple(x[key] for key in keys): x for x in csv.DictReader(file)}


def by_shape(what: str, column: str, labels: Mapping[str, str]) -> list[str]:
    """The worst of all ranks and noises for each shape, a column for each label of the record."""
    worst: dict[str, dict[str, float]] = {}
    for (kind, m, n, r, _, _, label), x in rounding().items():
        if kind == what and label in labels:
            row = worst.setdefault(f"{m} x {n}, {r}", {})
            row[label] = max(row.get(label, 0.0), float(x[column]))
    rows = [[shape, *(f"{row[label]:.2g}" for label in labels)] for shape, row in worst.items()]
    return grid(("m x n, r", *labels.values()), rows)


def page() -> str:
    """The whole page, from the records."""
    record = read()
    lines = [line(label, record) for label in ROWS if label != "AdamW"]
    grown = [cells for cells in lines if "**" in "".join(cells)]
    held = ", ".join(cells[0] for cells in lines if cells not in grown)
    counts = {label: not_finite(label, record) for label in ROWS if label != "AdamW"}
    lost = ", ".join(f"{n} of `{label}`" for label, n in counts.items() if n) or "none"
    text = f"Below {PROMISED:g}: {held}. Of {runs(record)}, at rates up to {RATES[-1]:g}, "
    text += f"{lost} ended in NaN or infinity. {below_both_sides(record)}"
    wrapped = textwrap.fill(text, 100, break_on_hyphens=False)
    rounded = {"nearest": "nearest", "stochastic": "stochastic"}
    kept = by_shape("kept", "largest", rounded)
    afterwards = by_shape("change", "median", {"default": "as it is", "rebalanced": "rebalanced"})
    return "\n".join(
        [HEAD, *grid(COLUMNS, grown), "", wrapped, GROW, *kept, ROUNDED, *afterwards, RECORDS]
    )


if __name__ == "__main__":
    if unknown := [x for x in sys.argv[1:] if x not in ROWS]:
        sys.exit(f"expected methods among {', '.join(ROWS)}, got {', '.join(unknown)}")
    refresh(sys.argv[1:] or list(ROWS))
    PAGE.write_text(page(), encoding="utf-8")
    print(f"wrote {PAGE.name}")

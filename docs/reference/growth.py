"""How large do factors become where the product needs less than they hold? Writes growth.md.

python docs/reference/growth.py [METHOD...]

runs the methods, all or those named, into growth.csv, and makes the page from it.
"""

import csv
import math
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cache
from itertools import product
from pathlib import Path
from typing import Any, Final

import rlora
from rlora import Transform, methods
from rlora.backends import get
from rlora.testing import Case, Growth, growths
from rlora.testing.growth import adamw

PAGE: Final = Path(__file__).with_suffix(".md")
RECORD: Final = Path(__file__).with_suffix(".csv")

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
DTYPES: Final = {"float32": "numpy", "float64": "numpy", "bfloat16": "torch"}
"""And whose arrays: NumPy has no bfloat16."""
NOISES: Final = (0.0, 0.5)
RATES: Final = (1e-4, 1e-3, 4e-3, 1e-2)
STEPS: Final = 1000

USUAL: Final = 4e-3
"""The highest learning rate at which factors and losses are compared with AdamW's."""
PROMISED: Final = 40.0
"""Times the largest entry under AdamW."""
NEAR: Final = 1.25
"""Times AdamW's loss, in bfloat16."""
SHOWN: Final = Case(1, 0.5, USUAL)
"""Whose largest entries the first table has, in float32."""

ROWS: Final[dict[str, Callable[[], Transform]]] = {
    **{f"{name}()": getattr(methods, name) for name in methods.__all__},
    'scaled_adamw(placement="before")': lambda: rlora.scaled_adamw(placement="before"),
    'scaled_adamw(placement="after")': lambda: rlora.scaled_adamw(placement="after"),
    'lora_pro_adamw(mode="full")': lambda: rlora.lora_pro_adamw(mode="full"),
    "AdamW": adamw,
}

Row = Mapping[str, str]
"""A line of the record, by the names of its columns."""


def cases(m: int, n: int, r: int) -> list[Case]:
    """Target ranks from 1 to the most that a product of this shape can have; noises; rates."""
    most = min(m, n, r)
    ranks = sorted({k for k in (1, 2, 4) if k < most} | {most})
    return [Case(*x) for x in product(ranks, NOISES, RATES)]


def run(method: Transform, shape: tuple[int, int, int], dtype: str) -> dict[Case, Growth]:
    """All cases of one shape in one stack."""
    backend = get(DTYPES[dtype])
    return growths(method, *shape, cases(*shape), STEPS, dtype=dtype, backend=backend)


@cache
def theirs(shape: tuple[int, int, int], dtype: str) -> dict[Case, Growth]:
    """AdamW on the same samples."""
    return run(adamw(), shape, dtype)


def rows(label: str) -> Iterator[dict[str, Any]]:
    """The lines of a method: what was worst on each shape in each dtype, and in which case."""
    for shape, dtype in product(SHAPES, DTYPES):
        ours, other = run(ROWS[label](), shape, dtype), theirs(shape, dtype)
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
            "entry_shown": f"{entry[SHOWN]:.3g}",
        }


def over(x: float, y: float) -> float:
    """``x / y``, inf for whatever is not finite."""
    return x / y if math.isfinite(x) and math.isfinite(y) else math.inf


def worst(name: str, ratios: dict[Case, float]) -> dict[str, str]:
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

A rank above those of the weight and of what is to be learnt leaves directions of the factors that
the product does not see. Here targets of several ranks are learnt from B = 0 with and without noise
at learning rates from {RATES[0]:g} to {RATES[-1]:g}, {STEPS} steps each (`rlora.testing.growths`);
shapes m x n, r: {", ".join(f"{m} x {n}, {r}" for m, n, r in SHAPES)}. Each figure is the worst of
all cases:

- runs that are not finite;
- the loss at the end over that at the start;
- the largest entry of a factor over that under AdamW with betas (0.7, 0.8) at the same rate, with
  noise and rates up to {USUAL:g}; bold above {PROMISED:g};
- the loss over AdamW's in the same cases; bold above {NEAR:g}. It is above 1 too where a method has
  not arrived in {STEPS} steps at a low rate, which is no growth.

    python docs/reference/growth.py [METHOD...]

runs all methods, or those named, into [the record](growth.csv), which has the worst case of each
shape, and makes this page. The grid takes some forty minutes on one core.
"""

TAIL: Final = """
## bfloat16

Rounding to the nearest loses steps that are smaller than half the spacing of the numbers, AdamW's
at a rate of 1e-3 as well: there the losses of all methods stay high, and those of preconditioned
ones higher, whose steps are smaller in some directions. The default is within a quarter of AdamW's
loss in float32 as soon as it has arrived, but in bfloat16 not on every draw. Medians and worst of
six draws of targets, rate 4e-3, noise 0.5, loss over that of AdamW in float32:

| m x n, r, rank | default, float32 | bfloat16, nearest | bfloat16, stochastic |
| --- | --- | --- | --- |
| 8 x 8, 8, 1 | 1.00 / 1.00 | 1.00 / 16.5 | 1.00 / 1.05 |
| 20 x 3, 8, 1 | 1.00 / 1.01 | 2.7 / 7.4 | 1.00 / 1.03 |
| 20 x 3, 8, 2 | 0.99 / 1.36 | 2.8 / 30 | 1.01 / 1.6 |

So bfloat16 factors of a rank above what is to be learnt need `stochastic_rounding=True` of the
torch classes, or weights in float32. (20 x 3 of rank 2 has not
arrived in float32 either in two of the draws.)

## Rounding a trained adapter

Rounding the factors to bfloat16 changes the product by `|ΔBA|² = 2^-16 / 3 · Σ |b_k|² |a_k|²`,
summed over the directions of rank: measured 0.24 to 0.39 instead of a third. It does not matter how
a direction is split between the factors, so that neither its growth nor its balance does; what
counts is how many directions share one product. AdamW's steps are alike in all r, the sum is 0.17
to 0.3 of `|BA|²` and the roundings average out. The preconditioner makes directions independent: an
orthogonal split has 1, and the default 0.45 to 6 in the median of eight draws (800 steps, rate from
1e-2 to 0, ranks 1 and 2). The change of the product is then 2 to 46 times AdamW's in the median and
in single draws over 1,000 times, with noise or without (worst for 8 x 8), and that of the loss is
up to 3e-5 of the loss at the start, 7e-7 to 2e-6 under AdamW. With noise this is lost in what no
weight can predict; without noise the bound of twice AdamW's change does not hold, and another split
of the scales cannot mend it. An adapter that must be rounded can be split anew once training is
over: by the formula `U Σ^½ Q` and `Qᵀ Σ^½ Vᵀ` with a Hadamard matrix Q of size r have the sum
`(Σ σ)² / r`, for rank 1 an eighth at r = 8, below AdamW's. (Not tried; the product is the same, the
optimizer's state does not fit it.)

## Methods that grow

`scaled_adamw` is held by a filter and by equal steps of both factors
([decision 10](../decisions/0010-null-space.md)). Methods that divide by a Gram matrix without one,
and are bold here, are for ranks below both sides of the weight and learning rates that decay;
`rlora.torch.findings` names a factor that grows, and a pair with r above a side, while it happens.
"""

COLUMNS: Final = (
    "method",
    "not finite",
    "loss / start",
    "bfloat16",
    "entry / AdamW's, float32",
    "float64",
    "bfloat16",
    "loss / AdamW's, float32",
    "bfloat16",
)


def most(lines: Sequence[Row], name: str, *dtypes: str, bound: float) -> str:
    """The worst of a column, bold above its bound."""
    value = max(float(x[name]) for x in lines if x["dtype"] in dtypes)
    return f"**{value:.2g}**" if value > bound else f"{value:.2g}"


def line(label: str, record: Sequence[Row]) -> str:
    """The row of a method."""
    lines = [x for x in record if x["method"] == label]
    if not lines:
        return f"| `{label}` | not in the record yet |{' |' * (len(COLUMNS) - 2)}"
    entry, loss = "entry_over_adamw", "loss_over_adamw"
    cells = (
        f"`{label}`",
        f"{sum(int(x['not_finite']) for x in lines)} of {sum(int(x['runs']) for x in lines)}",
        most(lines, "loss_over_first", "float32", "float64", bound=1.0),
        most(lines, "loss_over_first", "bfloat16", bound=1.0),
        *(most(lines, entry, dtype, bound=PROMISED) for dtype in DTYPES),
        most(lines, loss, "float32", bound=math.inf),
        most(lines, loss, "bfloat16", bound=NEAR),
    )
    return f"| {' | '.join(cells)} |"


def page() -> str:
    """The whole page, from the record."""
    head = [f"| {' | '.join(cells)} |" for cells in (COLUMNS, ["---"] * len(COLUMNS))]
    record = read()
    return "\n".join([HEAD, *head, *(line(label, record) for label in ROWS), TAIL])


if __name__ == "__main__":
    refresh(sys.argv[1:] or list(ROWS))
    PAGE.write_text(page(), encoding="utf-8")
    print(f"wrote {PAGE.name}")

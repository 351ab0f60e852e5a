"""Measure how factors grow where the product needs less than they hold, and write growth.md.

python docs/reference/growth.py [METHOD...]

runs the methods, all or those named, into growth.csv, and makes the page from it.
"""

import csv
import math
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
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
NEAR: Final = 1.25
"""Times AdamW's loss, in bfloat16."""

ROWS: Final[dict[str, Callable[[], Transform]]] = {
    **{f"{name}()": getattr(methods, name) for name in methods.__all__},
    'scaled_adamw(placement="before")': lambda: rlora.scaled_adamw(placement="before"),
    'scaled_adamw(placement="after")': lambda: rlora.scaled_adamw(placement="after"),
    'lora_pro_adamw(mode="full")': lambda: rlora.lora_pro_adamw(mode="full"),
    "AdamW": adamw,
}

Row = Mapping[str, str]
"""A line of the record, by the names of its columns."""


def cases(m: int, n: int, r: int, *, every: bool) -> list[Case]:
    """Target ranks from 1 to the most that a product of this shape can have; noises; rates."""
    most = min(m, n, r)
    ranks = range(1, most + 1) if every else sorted({k for k in (1, 2, 4) if k < most} | {most})
    return [Case(*x) for x in product(ranks, NOISES, RATES)]


def run(
    method: Transform, shape: tuple[int, int, int], dtype: str, *, every: bool
) -> dict[Case, Growth]:
    """All cases of one shape in one stack."""
    backend, some = get(DTYPES[dtype]), cases(*shape, every=every)
    return growths(method, *shape, some, STEPS, dtype=dtype, backend=backend)


@cache
def theirs(shape: tuple[int, int, int], dtype: str, *, every: bool) -> dict[Case, Growth]:
    """AdamW on the same samples."""
    return run(adamw(), shape, dtype, every=every)


def rows(label: str) -> Iterator[dict[str, Any]]:
    """The lines of a method: what was worst on each shape in each dtype, and in which case."""
    every = label == DEFAULT
    for shape, dtype in product((*SHAPES, MORE) if every else SHAPES, DTYPES):
        ours = run(ROWS[label](), shape, dtype, every=every)
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
shapes m x n, r: {", ".join(f"{m} x {n}, {r}" for m, n, r in SHAPES)}; ranks of the target 1, 2, 4
and the largest, for `{DEFAULT}` all, and {MORE[0]} x {MORE[1]}, {MORE[2]} too. Each figure is
the worst of all cases:

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

BFLOAT16: Final = """
## bfloat16

Rounding to the nearest loses steps that are smaller than half the spacing of the numbers, AdamW's
at a rate of 1e-3 as well: there the losses of all methods stay high, and those of preconditioned
ones higher, whose steps are smaller in some directions. The default is within a quarter of AdamW's
loss in float32 as soon as it has arrived (768 x 2 and 20 x 3 have not), in bfloat16 rounded to the
nearest not on every draw, and in bfloat16 rounded at random again, but for single draws of 8 x 8:

*Loss of `rlora.torch.ScaledAdamW` over that of torch's AdamW in float32, median / worst of six
draws of targets; rate 4e-3, noise 0.5, 1000 steps.*
"""

ROUNDED: Final = """
So the torch classes round bfloat16 factors at random by default
([decision 15](../decisions/0015-rounding.md)); `rlora.step` and `rlora.optax` round to the nearest,
as in the first table: keep parameters in float32 there. `rlora.torch.findings` says so where half
of the entries of a factor stay as they are under a step.

## Rounding a trained adapter

Rounding the factors to bfloat16 changes the product by `|ΔBA|² = 2^-16 / 3 · Σ |b_k|² |a_k|²`,
summed over the directions of rank: it does not matter how a direction is divided between the
factors, but how many directions share one product. AdamW's steps are alike in all r, and the
roundings average out; the default concentrates what is learnt in few.

`rlora.rebalance` gives factors of the same product whose directions carry nearly equal parts, and
`rlora.torch.round_adapter(model)` an adapter's state in bfloat16 by it. Rounded so, the default's
adapter changes about as much as AdamW's:

*An adapter trained 800 steps at a rate from 1e-2 to 0 and then rounded; medians of eight draws, of
the change also the largest.*
"""

GROW: Final = """
With noise the change of the loss is lost in what no weight can predict.

`python docs/reference/rounding.py` makes [the record](rounding.csv) of these two tables in some
minutes.

## Methods that grow

`scaled_adamw` is held by a filter and by equal steps of both factors
([decision 10](../decisions/0010-null-space.md)). Methods that divide by a Gram matrix without one,
and are bold here, are for ranks below both sides of the weight and learning rates that decay;
`rlora.torch.findings` names while it happens a factor that has grown six times further than AdamW's
steps could have taken it, a pair with r above a side, and steps that bfloat16 loses.
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


def line(label: str, record: Sequence[Row]) -> list[str]:
    """The row of a method."""
    lines = [x for x in record if x["method"] == label]
    entry, loss = "entry_over_adamw", "loss_over_adamw"
    return [
        f"`{label}`",
        f"{sum(int(x['not_finite']) for x in lines)} of {sum(int(x['runs']) for x in lines)}",
        most(lines, "loss_over_first", "float32", "float64", bound=1.0),
        most(lines, "loss_over_first", "bfloat16", bound=1.0),
        *(most(lines, entry, dtype, bound=PROMISED) for dtype in DTYPES),
        most(lines, loss, "float32", bound=math.inf),
        most(lines, loss, "bfloat16", bound=NEAR),
    ]


def grid(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    """A table in Markdown."""
    return [f"| {' | '.join(cells)} |" for cells in (columns, ["---"] * len(columns), *rows)]


def rounding() -> dict[tuple[str, ...], Row]:
    """The record of roundings: by what was measured, m, n, r, rank, noise and label."""
    with ROUNDING.open(encoding="utf-8", newline="") as file:
        keys = ("what", "m", "n", "r", "rank", "noise", "label")
        return {tuple(x[key] for key in keys): x for x in csv.DictReader(file)}


def kept_in_bfloat16() -> list[str]:
    """Losses of factors that are kept in bfloat16, nearest and stochastic."""
    record = rounding()
    labels = ("float32", "nearest", "stochastic")
    cases = dict.fromkeys(key[1:6] for key in record if key[0] == "kept")
    rows = []
    for case in cases:
        found = [record["kept", *case, label] for label in labels]
        m, n, r, rank, _ = case
        rows.append([f"{m} x {n}, {r}, {rank}", *map(both, found)])
    columns = ("m x n, r, rank", "float32", "bfloat16, nearest", "bfloat16, stochastic")
    return grid(columns, rows)


def rounded_afterwards() -> list[str]:
    """Changes of trained adapters that are rounded to bfloat16."""
    record = rounding()
    rows = []
    for case in dict.fromkeys(key[1:6] for key in record if key[0] == "change"):
        m, n, r, rank, noise = case
        labels = ("AdamW", "default", "rebalanced")
        of = {what: [record[what, *case, label] for label in labels]
              for what in ("terms", "loss", "law")}  # fmt: skip
        rows.append([
            f"{m} x {n}, {r}, {rank}",
            noise,
            both(record["change", *case, "default"]),
            both(record["change", *case, "rebalanced"]),
            *(" / ".join(short(x["median"]) for x in of[what]) for what in of),
        ])  # fmt: skip
    columns = (
        "m x n, r, rank",
        "noise",
        "change of BA over AdamW's, squared: median / largest",
        "rebalanced",
        "Σ over the product squared: AdamW / default / rebalanced",
        "change of the loss over its start",
        "measured for the third in the formula",
    )
    return grid(columns, rows)


def both(row: Row) -> str:
    """Median and largest."""
    return f"{short(row['median'])} / {short(row['largest'])}"


def short(text: str) -> str:
    """A number in two digits."""
    return f"{float(text):.2g}"


def page() -> str:
    """The whole page, from the records."""
    record = read()
    methods = grid(COLUMNS, [line(label, record) for label in ROWS])
    parts = [HEAD, *methods, BFLOAT16, *kept_in_bfloat16(), ROUNDED, *rounded_afterwards(), GROW]
    return "\n".join(parts)


if __name__ == "__main__":
    refresh(sys.argv[1:] or list(ROWS))
    PAGE.write_text(page(), encoding="utf-8")
    print(f"wrote {PAGE.name}")

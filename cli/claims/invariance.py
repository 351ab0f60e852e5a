"""Independence of the product's path of how the product is factored at the start."""

from collections.abc import Iterator, Sequence
from typing import Final

from rlora.cli.chart import Curve, Panel
from rlora.testing import GAUGES

from .claim import Check, Claim, Outcome, Setting
from .papers import RITE
from .theory import ROUNDING, ROWS, STEPS, Theory

SHOWN: Final = (1e-17, 1e2)
"""Ends of the figure, where runs stand that agree in every bit, or that diverge."""

QUICK_STEPS: Final = 20
"""By then every difference that theory leaves room for is as large as it gets, or nearly."""

Figures = Sequence[Sequence[float]]


def run(setting: Setting) -> Outcome:
    """The worst difference of the products of two runs, method by method and gauge by gauge."""
    steps = QUICK_STEPS if setting.quick else STEPS
    figures = [row.measure(setting.backend, steps) for row in setting.track(ROWS, "methods")]
    return Outcome(checks(figures), (panel(figures),))


def checks(figures: Figures) -> tuple[Check, ...]:
    """Nothing where theory finds nothing, and something where it denies that."""
    cases = list(_cases(figures))
    none = [figure for theory, gauge, figure in cases if gauge in theory.exact]
    some = [(theory, figure) for theory, gauge, figure in cases if gauge not in theory.exact]
    least = min(figure / theory.least for theory, figure in some)
    most = max(figure / theory.most for theory, figure in some if theory.most < float("inf"))
    return (
        Check("largest difference where theory has none", max(none), "<=", ROUNDING),
        Check("smallest where theory has one, over its lower bound", least, ">=", 1),
        Check("largest over the upper bound, where there is one", most, "<=", 1),
    )


def _cases(figures: Figures) -> Iterator[tuple[Theory, str, float]]:
    for row, of_row in zip(ROWS, figures, strict=True):
        for gauge, figure in zip(GAUGES, of_row, strict=True):
            yield row.theory, gauge, figure


def panel(figures: Figures) -> Panel:
    """A row for each method, a dot for each gauge."""
    low, high = SHOWN
    columns = [[min(max(x, low), high) for x in column] for column in zip(*figures, strict=True)]
    places = range(len(ROWS))
    return Panel(
        "Left of the line lies rounding",
        "relative difference of products",
        "",
        tuple(Curve(gauge, x, places) for gauge, x in zip(GAUGES, columns, strict=True)),
        log_x=True,
        rows=tuple(row.label for row in ROWS),
        threshold=ROUNDING,
    )


CLAIM: Final = Claim(
    "invariance",
    "The path of the product does not depend on how it was split into factors for exactly the "
    "methods, and under exactly the changes of basis, for which theory says so.",
    f"{RITE}. Definition 1; for the other methods the same algebra.",
    run,
)

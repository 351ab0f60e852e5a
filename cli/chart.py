"""Charts as data: curves, and the panels that they share. `plots` draws them."""

from collections.abc import Sequence
from typing import NamedTuple

Interval = tuple[float, float]


class Curve(NamedTuple):
    """A line of a chart."""

    label: str
    x: Sequence[float]
    y: Sequence[float]
    intervals: Sequence[Interval | None] = ()
    """An interval through each point, or None."""

    hollow: Sequence[bool] = ()
    """True for points whose marks are hollow: not to be relied on."""


class Panel(NamedTuple):
    """Curves that share their axes."""

    title: str
    x: str
    y: str
    curves: tuple[Curve, ...]
    """In the order of the legend. The same label has the same look in every panel."""

    log_x: bool = False
    log_y: bool = True
    rows: tuple[str, ...] = ()
    """Names of y = 0, 1, 2, ..., from the top down; the curves are then dots in these rows."""

    threshold: float | None = None
    """Place of a line across: on the y axis, or on the x axis of a panel with rows."""

    roof: tuple[float, float] | None = None
    """Slope and height of the line that no point can be above; the curves are then dots."""

    least: float = 10.0
    """Least ratio of the ends of a logarithmic y axis, or noise would look large."""

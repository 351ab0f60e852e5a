"""The figure of a claim, by matplotlib: its panels one under another, as a telephone shows them."""

import math
import textwrap
from collections.abc import Sequence
from functools import partial
from typing import Any, Final

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FixedLocator, FuncFormatter, Locator, LogLocator, NullLocator

from . import plot_style
from .claims.claim import Panel
from .plot_style import COLORS, DASHES, INK, MARKERS, WIDTH

LINE: Final = 0.185
"""Inches of a line of text."""
ROW: Final = 0.23
"""Inches of a row of dots: two lines of its small name."""
NAMES: Final = 46
"""Letters of a row's name in a line."""
LONGEST_OF_TWO: Final = 22
"""Letters of a label in a legend of two columns."""
MARKED: Final = 12
"""Marks on a curve, about."""
SMALL, LARGE = 1e-2, 1e5
"""Between them a tick is written out."""


def as_svg(title: str, panels: Sequence[Panel]) -> str:
    """Draw a figure as a file, its text as text."""
    return plot_style.as_svg(partial(draw, title, panels))


def as_png(title: str, panels: Sequence[Panel]) -> bytes:
    """Draw a figure as a bitmap."""
    return plot_style.as_png(partial(draw, title, panels))


def draw(title: str, panels: Sequence[Panel]) -> Figure:
    """Draw panels under a title, a legend under each that has labels of its own."""
    looks = _looks(panels)
    legends = [_labels(panel) if _ends(panels, i) else [] for i, panel in enumerate(panels)]
    heading = textwrap.wrap(title, 58)
    heights = [
        _tall(panel) + LINE * _lines(labels) for panel, labels in zip(panels, legends, strict=True)
    ]
    figure = Figure(figsize=(WIDTH, sum(heights) + LINE * len(heading) + 0.1))
    # On screens that cut at the edge, a tick's label at the end of an axis needs room.
    figure.set_layout_engine("constrained", w_pad=0.09)
    figure.suptitle("\n".join(heading), fontsize=10.2)
    parts = figure.subfigures(len(panels), 1, height_ratios=heights, squeeze=False)[:, 0]
    for part, panel, labels in zip(parts, panels, legends, strict=True):
        _draw_panel(part.add_subplot(), panel, looks)
        if labels:
            part.legend(
                [Line2D([], [], **looks[label]) for label in labels],
                labels,
                loc="outside lower center",
                ncols=_columns(labels),
                handlelength=3,
            )
    return figure


def _ends(panels: Sequence[Panel], i: int) -> bool:
    """Return whether the next panel has other labels: then the legend stands under this one."""
    return i + 1 == len(panels) or _labels(panels[i]) != _labels(panels[i + 1])


def _labels(panel: Panel) -> list[str]:
    return [curve.label for curve in panel.curves]


def _columns(labels: Sequence[str]) -> int:
    return 2 if len(labels) > 1 and max(map(len, labels)) <= LONGEST_OF_TWO else 1


def _lines(labels: Sequence[str]) -> int:
    return -(-len(labels) // _columns(labels)) if labels else 0


def _tall(panel: Panel) -> float:
    return ROW * len(panel.rows) + 0.75 if panel.rows else 2.35


def _looks(panels: Sequence[Panel]) -> dict[str, dict[str, Any]]:
    """Colour, mark and dashes of each label, the same in every panel."""
    labels = dict.fromkeys(label for panel in panels for label in _labels(panel))
    rows = all(panel.rows for panel in panels)
    return {
        label: {
            "color": COLORS[i % len(COLORS)],
            "marker": MARKERS[i % len(MARKERS)],
            "linestyle": "none" if rows else DASHES[i % len(DASHES)],
        }
        for i, label in enumerate(labels)
    }


def _draw_panel(axes: Axes, panel: Panel, looks: dict[str, dict[str, Any]]) -> None:
    axes.set_title("\n".join(textwrap.wrap(panel.title, 66)), loc="left")
    axes.set_xlabel(panel.x)
    axes.set_ylabel(panel.y)
    axes.grid(visible=True)
    axes.set_axisbelow(True)
    _scale(axes, panel)
    if panel.rows:
        _draw_rows(axes, panel, looks)
        return
    if panel.threshold is not None:
        axes.axhline(panel.threshold, color=INK, linewidth=1)
    for i, curve in enumerate(panel.curves):
        # The first are wider, or equal curves would hide each other.
        width = 1.2 + 1.6 * (1 - (i + 1) / len(panel.curves))
        every = max(1, len(curve.x) // MARKED)
        axes.plot(
            curve.x, curve.y, linewidth=width, markevery=(i % every, every), **looks[curve.label]
        )


def _draw_rows(axes: Axes, panel: Panel, looks: dict[str, dict[str, Any]]) -> None:
    if panel.threshold is not None:
        axes.axvline(panel.threshold, color=INK, linewidth=1)
    count = len(panel.curves)
    for i, curve in enumerate(panel.curves):
        # A little aside, or equal values would hide each other.
        aside = 0.6 * ((i + 0.5) / count - 0.5)
        look = {**looks[curve.label], "linestyle": "none", "markersize": 3.4}
        axes.plot(curve.x, [y + aside for y in curve.y], **look)
    names = ["\n".join(textwrap.wrap(name, NAMES)) for name in panel.rows]
    axes.set_yticks(range(len(names)), names, fontsize=5.9)
    axes.set_ylim(len(names) - 0.5, -0.5)


def _scale(axes: Axes, panel: Panel) -> None:
    for axis, log, scale in (
        (axes.xaxis, panel.log_x, axes.set_xscale),
        (axes.yaxis, panel.log_y and not panel.rows, axes.set_yscale),
    ):
        if not log:
            continue
        scale("log")
        axis.set_major_formatter(FuncFormatter(lambda value, _: power(value)))
        axis.set_minor_locator(NullLocator())
    if panel.log_x:
        axes.xaxis.set_major_locator(_ticks(panel))
    if panel.log_y and not panel.rows:
        _at_least_a_decade(axes, panel)


def _ticks(panel: Panel) -> Locator:
    """At the points, if all curves have the same few; else at decades."""
    xs = panel.curves[0].x
    if panel.rows or len(xs) > MARKED or any(list(c.x) != list(xs) for c in panel.curves):
        return LogLocator(numticks=5 if panel.rows else 7)
    return FixedLocator(list(xs[:: -(-len(xs) // 7)]))


def _at_least_a_decade(axes: Axes, panel: Panel) -> None:
    """Or noise would look large, and no tick would have a number."""
    ys = [y for curve in panel.curves for y in curve.y if y > 0 and math.isfinite(y)]
    if ys and max(ys) < 10 * min(ys):
        middle, half = math.sqrt(min(ys) * max(ys)), math.sqrt(10) * 1.2
        axes.set_ylim(middle / half, middle * half)
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))


def power(value: float) -> str:
    """A tick of a logarithmic axis: as short as it can be."""
    if value > 0 and not SMALL <= value < LARGE:
        digit, exponent = f"{value:.0e}".split("e")
        return f"{digit}e{int(exponent)}"
    return f"{value:g}"

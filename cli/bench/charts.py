"""Charts of records as pictures, by matplotlib."""

import re
import textwrap
import zlib
from collections.abc import Iterable, Sequence
from functools import partial
from html import escape
from typing import Any, Final

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, NullLocator

from rlora.cli import plot_style
from rlora.cli.plot_style import COLORS, DASHES, FAINT, INK, MARKERS, PAPER, WIDTH

from .chart_data import KINDS, Chart, Curve, Panel, Point, Roof

VARIANT_DASHES: Final[dict[str, Any]] = {"before": (0, (1, 1)), "after": (0, (2, 1.2))}
ORDER: Final = (
    *("scaled_adamw", "lora_rite", "lora_pro_adamw", "peft", "alt_lora_plus", "ref_lora"),
    *("lora_muon", "adapre_lora", "alt_lora", "riemannion", "lora_fa", "lora_plus", "rac_lora"),
    *("lora_sb", "scaled_sgd", "lora_pro_sgd", "torch.adamw", "optax.adamw"),
)
"""Methods whose look is given by their place here; that of others by their names."""

LONGEST, LONGEST_OF_TWO = 40, 21
"""Letters of a name in a legend of one column and of two."""


def as_svg(chart: Chart) -> str:
    """Draw a chart as a file of its own, its text as text."""
    return plot_style.as_svg(partial(draw, chart))


def as_png(chart: Chart) -> bytes:
    """Draw a chart as a bitmap."""
    return plot_style.as_png(partial(draw, chart))


def for_page(chart: Chart, name: str) -> str:
    """Draw a chart as part of a page: in its colours, with ids of its own and an alternative."""
    svg = as_svg(chart)
    box = re.search(r'viewBox="([\d. ]+)"', svg)
    body = svg[svg.index(">", svg.index("<svg")) + 1 :]
    body = re.sub(r"<defs>\s*<style.*?</defs>", "", body, count=1, flags=re.DOTALL)
    body = re.sub(r'(\bid="|href="#|url\(#)', rf"\1{name}-", body)
    for ours, theirs in ((INK, "currentColor"), (FAINT, "var(--faint)"), (PAPER, "none")):
        body = body.replace(ours, theirs)
    size, label = box[1] if box else "", escape(chart.words())
    return f'<svg viewBox="{size}" role="img" aria-label="{label}">{body}'


def draw(chart: Chart) -> Figure:
    """Draw a chart with its legend under it."""
    legend = _legend(chart)
    columns = 2 if all(len(label) <= LONGEST_OF_TWO for _, label in legend) else 1
    tall = 2.3 if len(chart.panels) == 1 else 1.8 * len(chart.panels)
    title = [KINDS[chart.kind].title, *textwrap.wrap(chart.where, 60)]
    if chart.roof:
        title.append(f"{chart.roof[0] / 1e9:.3g} GB/s, {chart.roof[1] / 1e9:.3g} Gflop/s at best")
    height = tall + 0.185 * (-(-len(legend) // columns) + len(title)) + 0.55
    figure = Figure(figsize=(WIDTH, height), layout="constrained")
    figure.suptitle("\n".join(title), fontsize=10.2)
    grid = figure.subplots(len(chart.panels), 1, sharex=True, squeeze=False)[:, 0]
    for axes, panel in zip(grid, chart.panels, strict=True):
        axes.grid(visible=True)
        axes.set_axisbelow(True)
        _draw_panel(axes, chart, panel)
    grid[-1].set_xlabel(KINDS[chart.kind].x)
    figure.legend(
        [handle for handle, _ in legend],
        [label for _, label in legend],
        loc="outside lower center",
        ncols=columns,
        handlelength=3,
    )
    return figure


def _draw_panel(axes: Axes, chart: Chart, panel: Panel) -> None:
    axes.set_ylabel(panel.y)
    axes.set_title(panel.name, loc="left")
    if chart.roof:
        _draw_rates(axes, panel, chart.roof)
        return
    points = [point for curve in panel.curves for point in curve.points]
    axes.set_xscale("log", base=2)
    _ticks(axes, sorted({point.x for point in points}))
    spread = min(0.4, 0.05 * len(panel.curves))
    for i, curve in enumerate(panel.curves):
        # A little aside, or equal values would hide each other.
        aside = 2 ** (spread * ((i + 0.5) / len(panel.curves) - 0.5))
        _draw_curve(axes, curve, aside)
    if chart.kind.startswith("overhead"):
        axes.axhline(1, color=INK, linewidth=1, linestyle=(0, (4, 2)))
        _ratio_axis(axes, points)
    else:
        axes.set_ylim(bottom=0, top=1.08 * max(1.0, *(point.y for point in points)))


def _draw_curve(axes: Axes, curve: Curve, aside: float) -> None:
    look = _look(curve.method)
    x, y = [aside * point.x for point in curve.points], [point.y for point in curve.points]
    axes.plot(x, y, color=look["color"], linestyle=look["linestyle"])
    for at, point in zip(x, curve.points, strict=True):
        if point.interval:
            axes.plot([at, at], point.interval, "_-", color=look["color"], linewidth=0.9)
    _marks(axes, curve, aside, look)


def _marks(axes: Axes, curve: Curve, aside: float, look: dict[str, Any]) -> None:
    for steady, face in ((True, look["color"]), (False, "none")):
        here: list[Point] = [point for point in curve.points if point.steady == steady]
        axes.plot(
            [aside * point.x for point in here],
            [point.y for point in here],
            color=look["color"],
            marker=look["marker"],
            markerfacecolor=face,
            linestyle="none",
        )


def _draw_rates(axes: Axes, panel: Panel, roof: Roof) -> None:
    xs = [point.x for curve in panel.curves for point in curve.points]
    ridge, highest = roof[1] / roof[0], roof[1] / 1e9
    ends = min(*xs, ridge) / 3, max(*xs, ridge) * 3
    slope = [ends[0], ridge, ends[1]], [ends[0] * roof[0] / 1e9, highest, highest]
    axes.plot(*slope, color=INK, linewidth=1.2)
    for curve in panel.curves:
        _marks(axes, curve, 1.0, _look(curve.method))
    axes.set_xscale("log")
    axes.set_yscale("log")
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axis.set_minor_locator(NullLocator())


def _ratio_axis(axes: Axes, points: Iterable[Point]) -> None:
    ends = [1.0, *(y for point in points for y in point.interval or (point.y,))]
    low, high = min(ends) / 1.2, max(ends) * 1.2
    axes.set_yscale("log")
    axes.set_ylim(low, max(high, 2.4 * low))
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))


def _ticks(axes: Axes, values: Sequence[float]) -> None:
    every = -(-len(values) // 8)
    axes.xaxis.set_major_locator(FixedLocator(list(values[::every])))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))


def _legend(chart: Chart) -> list[tuple[Line2D, str]]:
    panels = reversed(chart.panels)
    names = dict.fromkeys(curve.method for panel in panels for curve in panel.curves)
    cases = []
    for name in names:
        look = _look(name) | ({"linestyle": "none"} if chart.roof else {})
        short = name if len(name) <= LONGEST else f"{name[: LONGEST - 3]}..."
        # matplotlib leaves labels out that begin with an underscore.
        cases.append((Line2D([], [], **look), f" {short}" if short[:1] == "_" else short))
    if chart.roof:
        cases.append((Line2D([], [], color=INK, linewidth=1.2), "peaks of the run"))
    elif chart.kind.startswith("overhead"):
        cases.append((Line2D([], [], color=INK, linestyle=(0, (4, 2)), linewidth=1), "plain"))
    return cases


def _look(method: str) -> dict[str, Any]:
    """Colour, mark and dashes: the same for a method in every chart and every report."""
    base, _, variant = method.partition(" ")[0].partition(":")
    if method in ("adamw", "sgd"):
        return {"color": INK, "marker": "." if method == "sgd" else "*", "linestyle": "-"}
    known = base if base in ORDER else method
    place = ORDER.index(known) if known in ORDER else len(ORDER) + zlib.crc32(known.encode()) % 997
    extra = 1 + list(VARIANT_DASHES).index(variant) if variant in VARIANT_DASHES else 0
    return {
        "color": COLORS[place % len(COLORS)],
        "marker": MARKERS[(place + 3 * extra) % len(MARKERS)],
        "linestyle": VARIANT_DASHES.get(variant, DASHES[place // len(COLORS) % len(DASHES)]),
    }

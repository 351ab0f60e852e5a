"""The figure of a chart, by matplotlib: its panels one under another, as a telephone shows them.

The same figure gives the same bytes every time.
"""

import io
import math
import re
import textwrap
import warnings
import zlib
from collections.abc import Callable, Sequence
from functools import partial
from html import escape
from typing import Any, Final

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure  # not pyplot: this one never looks for a display
from matplotlib.lines import Line2D
from matplotlib.ticker import FixedLocator, FuncFormatter, Locator, LogLocator, NullLocator

from .chart import Curve, Panel

INK, FAINT, PAPER = "#1b1f24", "#d8dee3", "#fffffe"
"""Colours of text and axes, of grids, of the background; a page puts its own in their place."""

COLORS: Final = (
    *("#0068a6", "#ff6000", "#5ba664", "#7826ff"),
    *("#bf311d", "#36a3b2", "#22735f", "#4d8fff"),
)
"""Any two differ for colour-blind eyes too, and each stands out from white and from black."""

MARKERS: Final = ("o", "s", "^", "D", "v", "P", "X", "<", ">", "p")
DASHES: Final[tuple[Any, ...]] = ("-", (0, (5, 1.5)), (0, (3, 1, 1, 1)))

STYLE: Final[dict[Any, Any]] = {
    "font.size": 9.3,
    "axes.titlesize": 9.3,
    "axes.facecolor": "none",
    **dict.fromkeys(("axes.edgecolor", "axes.labelcolor", "text.color"), INK),
    **dict.fromkeys(("xtick.color", "ytick.color"), INK),
    **dict.fromkeys(("axes.spines.top", "axes.spines.right"), False),
    "grid.color": FAINT,
    "grid.linewidth": 0.6,
    "legend.frameon": False,
    "lines.linewidth": 1.4,
    "lines.markersize": 5.0,
    "svg.fonttype": "none",
    "svg.hashsalt": "rlora",
    # Names are from records: a dollar sign in them is no formula.
    "text.parse_math": False,
}
WIDTH, DPI = 4.6, 200
"""Inches; narrow, so that a telephone shows the text in its size."""
LINE, ROW = 0.185, 0.23
"""Inches of a line of text, and of a row of dots: two lines of its small name."""
NAMES: Final = 46
"""Letters of a row's name in a line."""
LONGEST, LONGEST_OF_TWO = 40, 22
"""Letters of a label in a legend of one column and of two."""
MARKED: Final = 12
"""Marks on a curve, about."""
SMALL, LARGE = 1e-2, 1e5
"""Between them a tick is written out."""

VARIANT_DASHES: Final[dict[str, Any]] = {"before": (0, (1, 1)), "after": (0, (2, 1.2))}
ORDER: Final = (
    *("scaled_adamw", "lora_rite", "lora_pro_adamw", "peft", "alt_lora_plus", "ref_lora"),
    *("lora_muon", "adapre_lora", "alt_lora", "riemannion", "lora_fa", "lora_plus", "rac_lora"),
    *("lora_sb", "scaled_sgd", "lora_pro_sgd", "torch.adamw", "optax.adamw"),
)
"""Methods whose look is given by their place here; that of others by their names."""


def as_svg(title: str, panels: Sequence[Panel], *, by_name: bool = False) -> str:
    """Draw a figure as a file, its text as text.

    With `by_name` a label looks the same in every figure, else its place among the labels decides.
    """
    return svg_of(partial(draw, title, panels, by_name=by_name))


def as_png(title: str, panels: Sequence[Panel], *, by_name: bool = False) -> bytes:
    """Draw a figure as a bitmap."""
    out, figure = io.BytesIO(), partial(draw, title, panels, by_name=by_name)
    _save(figure, out, format="png", dpi=DPI, metadata={"Software": None})
    return out.getvalue()


def svg_of(figure: Callable[[], Figure]) -> str:
    """Draw a file of its own, its text as text."""
    out = io.StringIO()
    nothing = dict.fromkeys(("Date", "Creator", "Format", "Type"))
    _save(figure, out, format="svg", metadata=nothing)
    return out.getvalue()


def _save(figure: Callable[[], Figure], out: io.StringIO | io.BytesIO, **options: Any) -> None:
    with mpl.rc_context(), warnings.catch_warnings():
        mpl.rcdefaults()  # whatever style the user has
        mpl.rcParams.update(STYLE)
        # A name in a script that the font lacks: an SVG has it as text all the same.
        warnings.filterwarnings("ignore", message="Glyph")
        figure().savefig(out, facecolor=PAPER, **options)


def inline(svg: str, name: str, alternative: str) -> str:
    """Make a file part of a page: in its colours, with ids of its own and an alternative text."""
    box = re.search(r'viewBox="([\d. ]+)"', svg)
    body = svg[svg.index(">", svg.index("<svg")) + 1 :]
    body = re.sub(r"<defs>\s*<style.*?</defs>", "", body, count=1, flags=re.DOTALL)
    body = re.sub(r'(\bid="|href="#|url\(#)', rf"\1{name}-", body)
    for ours, theirs in ((INK, "currentColor"), (FAINT, "var(--faint)"), (PAPER, "none")):
        body = body.replace(ours, theirs)
    size, label = box[1] if box else "", escape(alternative)
    return f'<svg viewBox="{size}" role="img" aria-label="{label}">{body}'


def draw(title: str, panels: Sequence[Panel], *, by_name: bool = False) -> Figure:
    """Draw panels under a title, a legend under each that has labels of its own."""
    labels = list(dict.fromkeys(label for panel in panels for label in _labels(panel)))
    looks = {label: look(label) if by_name else _numbered(i) for i, label in enumerate(labels)}
    legends = [_labels(panel) if _ends(panels, i) else [] for i, panel in enumerate(panels)]
    heading = [part for line in title.split("\n") for part in textwrap.wrap(line, 58)]
    heights = [
        _height(panel) + LINE * -(-len(labels) // _columns(labels))
        for panel, labels in zip(panels, legends, strict=True)
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
                [Line2D([], [], **(looks[label] | _dots(panel))) for label in labels],
                [_short(label) for label in labels],
                loc="outside lower center",
                ncols=_columns(labels),
                handlelength=3,
            )
    return figure


def _ends(panels: Sequence[Panel], i: int) -> bool:
    """Return whether the next panel has other labels: then the legend stands under this one."""
    return i + 1 == len(panels) or {*_labels(panels[i])} != {*_labels(panels[i + 1])}


def _labels(panel: Panel) -> list[str]:
    return [curve.label for curve in panel.curves]


def _short(label: str) -> str:
    short = label if len(label) <= LONGEST else f"{label[: LONGEST - 3]}..."
    # matplotlib leaves labels out that begin with an underscore.
    return f" {short}" if short[:1] == "_" else short


def _columns(labels: Sequence[str]) -> int:
    return 2 if len(labels) > 1 and max(map(len, labels)) <= LONGEST_OF_TWO else 1


def _dots(panel: Panel) -> dict[str, Any]:
    """Change the look of a curve to that of dots, small ones in rows."""
    if panel.rows:
        return {"linestyle": "none", "markersize": 3.4}
    return {"linestyle": "none"} if panel.roof else {}


def _height(panel: Panel) -> float:
    return ROW * len(panel.rows) + 0.75 if panel.rows else 2.35


def _numbered(i: int) -> dict[str, Any]:
    """Colour, mark and dashes of the label in this place."""
    return {
        "color": COLORS[i % len(COLORS)],
        "marker": MARKERS[i % len(MARKERS)],
        "linestyle": DASHES[i % len(DASHES)],
    }


def look(method: str) -> dict[str, Any]:
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


def _draw_panel(axes: Axes, panel: Panel, looks: dict[str, dict[str, Any]]) -> None:
    axes.set_title("\n".join(textwrap.wrap(panel.title, 66)), loc="left")
    axes.set_xlabel(panel.x)
    axes.set_ylabel(panel.y)
    axes.grid(visible=True)
    axes.set_axisbelow(True)
    _scale(axes, panel)
    if panel.threshold is not None:
        (axes.axvline if panel.rows else axes.axhline)(panel.threshold, color=INK, linewidth=1)
    if panel.roof:
        _draw_roof(axes, panel, *panel.roof)
    count = len(panel.curves)
    for i, curve in enumerate(panel.curves):
        # A little aside, or equal values would hide each other; equal curves show by their width.
        aside = (i + 0.5) / count - 0.5
        width = 1.2 + 1.6 * (1 - (i + 1) / count)
        if panel.rows:
            curve = curve._replace(y=[y + 0.6 * aside for y in curve.y])
        elif curve.intervals:
            curve = curve._replace(x=[x * 2 ** (min(0.4, 0.05 * count) * aside) for x in curve.x])
        _draw_curve(axes, curve, looks[curve.label] | _dots(panel), width, i)
    if panel.rows:
        names = ["\n".join(textwrap.wrap(name, NAMES)) for name in panel.rows]
        axes.set_yticks(range(len(names)), names, fontsize=5.9)
        axes.set_ylim(len(names) - 0.5, -0.5)


def _draw_curve(axes: Axes, curve: Curve, look: dict[str, Any], width: float, i: int) -> None:
    x, y, color = list(curve.x), list(curve.y), look["color"]
    axes.plot(x, y, color=color, linestyle=look["linestyle"], linewidth=width)
    for at, ends in zip(x, curve.intervals, strict=False):
        if ends:
            axes.plot([at, at], ends, "_-", color=color, linewidth=0.9)
    every = 1 if look["linestyle"] == "none" else max(1, len(x) // MARKED)
    hollow = curve.hollow or [False] * len(x)
    for face, wanted in ((color, False), ("none", True)):
        kept = [j for j in range(i % every, len(x), every) if hollow[j] == wanted]
        axes.plot(
            [x[j] for j in kept],
            [y[j] for j in kept],
            color=color,
            marker=look["marker"],
            markerfacecolor=face,
            markersize=look.get("markersize"),
            linestyle="none",
        )


def _draw_roof(axes: Axes, panel: Panel, slope: float, height: float) -> None:
    xs = [height / slope, *(x for curve in panel.curves for x in curve.x)]
    ends = min(xs) / 3, max(xs) * 3
    axes.plot([ends[0], xs[0], ends[1]], [ends[0] * slope, height, height], color=INK)


def _scale(axes: Axes, panel: Panel) -> None:
    log_y = panel.log_y and not panel.rows
    for axis, log, scale in (
        (axes.xaxis, panel.log_x, axes.set_xscale),
        (axes.yaxis, log_y, axes.set_yscale),
    ):
        if log:
            scale("log")
            axis.set_major_formatter(FuncFormatter(lambda value, _: power(value)))
            axis.set_minor_locator(NullLocator())
    if panel.log_x:
        axes.xaxis.set_major_locator(_ticks(panel))
    if log_y and not panel.roof:
        _widen(axes, panel)


def _ticks(panel: Panel) -> Locator:
    """At the points, if there are few; else at decades."""
    xs = sorted({x for curve in panel.curves for x in curve.x})
    if panel.rows or panel.roof or len(xs) > MARKED:
        return LogLocator(numticks=5 if panel.rows else 7)
    return FixedLocator(xs[:: -(-len(xs) // 7)])


def _widen(axes: Axes, panel: Panel) -> None:
    """Widen a logarithmic axis to its least length, and give a short one more ticks."""
    ends = [end for curve in panel.curves for x in curve.intervals if x for end in x]
    ys = [y for curve in panel.curves for y in curve.y] + ends + [panel.threshold or 0]
    ys = [y for y in ys if y > 0 and math.isfinite(y)]
    if not ys or max(ys) >= 100 * min(ys):
        return
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    if max(ys) < panel.least * min(ys):
        middle, half = math.sqrt(min(ys) * max(ys)), math.sqrt(panel.least) * 1.2
        axes.set_ylim(middle / half, middle * half)


def power(value: float) -> str:
    """A tick of a logarithmic axis: as short as it can be."""
    if value > 0 and not SMALL <= value < LARGE:
        digit, exponent = f"{value:.0e}".split("e")
        return f"{digit}e{int(exponent)}"
    return f"{value:g}"

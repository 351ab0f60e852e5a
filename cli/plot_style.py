"""Style of every picture, and saving: the same bytes from the same figure every time."""

import io
import warnings
from collections.abc import Callable
from typing import Any, Final

import matplotlib as mpl
from matplotlib.figure import Figure  # not pyplot: this one never looks for a display

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
    "axes.edgecolor": INK,
    "axes.labelcolor": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "text.color": INK,
    "xtick.color": INK,
    "ytick.color": INK,
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


def as_svg(draw: Callable[[], Figure]) -> str:
    """Draw a file of its own, its text as text."""
    out = io.StringIO()
    nothing = dict.fromkeys(("Date", "Creator", "Format", "Type"))
    _save(draw, out, format="svg", metadata=nothing)
    return out.getvalue()


def as_png(draw: Callable[[], Figure]) -> bytes:
    """Draw a bitmap."""
    out = io.BytesIO()
    _save(draw, out, format="png", dpi=DPI, metadata={"Software": None})
    return out.getvalue()


def _save(draw: Callable[[], Figure], out: io.StringIO | io.BytesIO, **options: Any) -> None:
    with mpl.rc_context(), warnings.catch_warnings():
        mpl.rcdefaults()  # whatever style the user has
        mpl.rcParams.update(STYLE)
        # A name in a script that the font lacks: an SVG has it as text all the same.
        warnings.filterwarnings("ignore", message="Glyph")
        draw().savefig(out, facecolor=PAPER, **options)

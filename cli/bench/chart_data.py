"""Data of a report's charts: the rows of records, gathered into curves."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Final, NamedTuple

from rlora.cli.chart import Curve, Interval, Panel
from rlora.cli.console import one_line

from .join import Measured, join, setups
from .problem import SHAPE
from .schema import Record, Row

Roof = tuple[float, float]
"""Bytes and flops per second."""


class Kind(NamedTuple):
    """Kind of chart: titles, and how to get its data."""

    title: str
    x: str
    about: str
    lacks: str
    command: str


_RATIO: Final = (
    "A step over that of the baseline, plain AdamW or SGD (the line at 1), in the same run, with "
    "its 95 % interval. Hollow marks: unstable."
)
KINDS: Final[Mapping[str, Kind]] = {
    "overhead-rank": Kind(
        "Overhead against rank",
        "rank",
        _RATIO,
        "two ranks of one model",
        "rlora bench run --rank 4,16,64",
    ),
    "overhead-layers": Kind(
        "Overhead against layers",
        "layers",
        _RATIO,
        "two numbers of layers of one shape and rank",
        "rlora bench run --suite scaling",
    ),
    "overhead-width": Kind(
        "Overhead against width",
        "width of the weight",
        _RATIO,
        "two widths of square weights at one rank and number of layers",
        "rlora bench run --suite scaling",
    ),
    "memory-rank": Kind(
        "Memory against rank",
        "rank",
        "Bytes over the state of plain AdamW: what the optimizer keeps, and the most that a step "
        "holds for a while beside it.",
        "two ranks of one model beside adamw",
        "rlora bench run --rank 4,16,64",
    ),
    "roofline": Kind(
        "Roofline",
        "arithmetic intensity, flop/byte",
        "The rate of the products in a step against what they ask of the memory; the roof is the "
        "peaks measured in the run. Far below it, calls and r x r algebra set the pace. Higher "
        "ranks stand farther right; methods without products have no mark.",
        "both peaks and methods whose flops are known",
        "rlora bench run --method scaled_adamw,lora_rite",
    ),
}
"""By the name of the chart's file."""


class Chart(NamedTuple):
    """One picture."""

    kind: str
    where: str
    panels: list[Panel]

    @property
    def title(self) -> str:
        """Title of the picture; of a roofline with its peaks."""
        lines = [KINDS[self.kind].title, self.where]
        for slope, height in (panel.roof for panel in self.panels if panel.roof):
            lines.append(f"{slope:.3g} GB/s, {height:.3g} Gflop/s at best")
        return "\n".join(lines)

    def words(self) -> str:
        """Say for each method what there is to see."""
        said = [f"{KINDS[self.kind].title}: {self.where}."]
        for panel in self.panels:
            said.append(f"{', '.join(filter(None, (panel.title, panel.y)))}, by {panel.x}:")
            said += [f"{curve.label} {_course(curve)};" for curve in panel.curves]
        return " ".join(said)


def _course(curve: Curve) -> str:
    points = list(zip(curve.x, curve.y, strict=True))
    return " to ".join(f"{y:.3g} at {x:.3g}" for x, y in dict.fromkeys((points[0], points[-1])))


class Point(NamedTuple):
    """A mark, with its interval where there is one."""

    x: float
    y: float
    interval: Interval | None
    hollow: bool


def charts(records: Sequence[Record]) -> list[Chart]:
    """Give every chart that the records have the data for, in the order of `KINDS`."""
    rows = join(records)
    return [
        *_swept("overhead-rank", rows, _by_rank, OVERHEAD),
        *_swept("overhead-layers", rows, _by_layers, OVERHEAD),
        *_swept("overhead-width", rows, _by_width, OVERHEAD),
        *_swept("memory-rank", rows, _by_rank, MEMORY),
        *_rooflines(rows, _peaks(records)),
    ]


Place = tuple[str, float] | None
"""The chart that a row is on, and its x; None for a row that is on none."""


def _by_rank(one: Measured) -> Place:
    rank = one.row["rank"]
    return None if isinstance(rank, list) else (_where(one, one.source), rank)


def _by_layers(one: Measured) -> Place:
    found = SHAPE.fullmatch(one.source)
    if found is None:
        return None
    m, n, layers = map(int, found.groups())
    return _where(one, f"weights of {m} x {n}, rank {one.row['rank']}"), layers


def _by_width(one: Measured) -> Place:
    found = SHAPE.fullmatch(one.source)
    if found is None or found[1] != found[2]:
        return None
    return _where(one, f"layers: {found[3]}, rank {one.row['rank']}"), int(found[1])


def _where(one: Measured, what: str) -> str:
    parts = (what, one.home, one_line(one.row["dtype"]), one.setup)
    return ", ".join(part for part in parts if part)


Measure = Callable[[Measured, float], Point | None]


def _overhead(one: Measured, x: float) -> Point | None:
    if one.plain or not _plausible(one.row["ratio"]):
        return None
    return _point(one, x, one.row["ratio"], one.row["ratio_interval"])


def _state(one: Measured, x: float) -> Point | None:
    return _share(one, x, one.row["state_bytes"])


def _temporary(one: Measured, x: float) -> Point | None:
    return _share(one, x, one.row["peak_temporary_bytes"])


def _share(one: Measured, x: float, value: int | None) -> Point | None:
    if not _plausible(one.baseline) or not (value == 0 or _plausible(value)):
        return None
    return _point(one, x, (value or 0) / (one.baseline or 1))


def _point(
    one: Measured, x: float, y: float, interval: Sequence[float] | None = None
) -> Point | None:
    if not _plausible(x):
        return None
    low, high = interval if interval and all(map(_plausible, interval)) else (y, y)
    around = (min(low, y), max(high, y)) if interval else None
    return Point(float(x), float(y), around, one.row["verdict"] != "ok")


def _plausible(value: float | None) -> bool:
    """Return whether a logarithmic axis can show it; records may say anything."""
    return value is not None and 1e-12 < value < 1e18


OVERHEAD: Final = (("", "step / baseline", _overhead),)
MEMORY: Final = (
    ("state", "× AdamW's state", _state),
    ("peak temporary", "× AdamW's state", _temporary),
)
"""Panels: title, axis and measure."""


def _swept(
    kind: str,
    rows: Iterable[Measured],
    place: Callable[[Measured], Place],
    measures: Sequence[tuple[str, str, Measure]],
) -> Iterator[Chart]:
    """Make a chart for each place where a method has two points or more."""
    places: dict[str, list[tuple[Measured, float]]] = {}
    for one in rows:
        if (found := place(one)) is not None:
            places.setdefault(found[0], []).append((one, found[1]))
    for where, here in places.items():
        panels = [
            Panel(
                title,
                KINDS[kind].x,
                y,
                _curves((one, measure(one, x)) for one, x in here),
                log_x=True,
                log_y=measures is OVERHEAD,
                threshold=float(measures is OVERHEAD),
                least=2.4,
            )
            for title, y, measure in measures
        ]
        if all(any(len(curve.x) > 1 for curve in panel.curves) for panel in panels):
            yield Chart(kind, where, panels)


def _curves(points: Iterable[tuple[Measured, Point | None]]) -> tuple[Curve, ...]:
    found: dict[str, list[Point]] = {}
    for one, point in points:
        if point is not None:
            found.setdefault(_label(one.row), []).append(point)
    curves = [
        Curve(name, *map(list, zip(*sorted(points), strict=True))) for name, points in found.items()
    ]
    # As they stand above each other at the right, so does a legend name them.
    return tuple(sorted(curves, key=lambda curve: -curve.y[-1]))


def _label(row: Row) -> str:
    method, of = one_line(row["method"]), row["ratio_to"]
    return method if of in ("adamw", row["method"]) else one_line(f"{method} / {of}")


def _peaks(records: Sequence[Record]) -> dict[tuple[str, ...], Roof]:
    """Take the best rates of every backend on every set-up."""
    found: dict[tuple[str, ...], Roof] = {}
    for record, setup in zip(records, setups(records), strict=True):
        for peak in record["peaks"]:
            key = (setup, peak["backend"], peak["device"], record["command"]["dtype"])
            before = found.get(key, (0.0, 0.0))
            rates = peak["bytes_per_s"], peak["flops_per_s"]
            if all(map(_plausible, rates)):
                found[key] = max(before[0], rates[0]), max(before[1], rates[1])
    return found


def _rooflines(rows: Iterable[Measured], peaks: Mapping[tuple[str, ...], Roof]) -> Iterator[Chart]:
    places: dict[tuple[str, Roof], list[tuple[Measured, Point | None]]] = {}
    for one in rows:
        row = one.row
        flops, moved, seconds = row["flops"], row["bytes_moved"], row["median_s"]
        roof = peaks.get((one.setup, row["backend"], row["device"], row["dtype"]))
        if roof and all(map(_plausible, (flops, moved, seconds))):
            parts = (one_line(f"{row['backend']} {row['device']}"), row["dtype"], one.setup)
            where = ", ".join(one_line(part) for part in parts if part)
            point = _point(one, flops / moved, flops / seconds / 1e9)
            places.setdefault((where, roof), []).append((one, point))
    for (where, roof), here in places.items():
        if curves := _curves(here):
            x, in_g = KINDS["roofline"].x, (roof[0] / 1e9, roof[1] / 1e9)
            panel = Panel("", x, "Gflop/s", curves, log_x=True, roof=in_g)
            yield Chart("roofline", where, [panel])

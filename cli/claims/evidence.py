"""The record that a claim's experiment leaves behind: its checks, its curves, its conditions."""

import math
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final

import numpy as np

import rlora
from rlora.cli.chart import Curve, Panel
from rlora.cli.environment import environment
from rlora.cli.records import ENVIRONMENT, TEXT, TEXTS, TIME, closed, fault, optional, read_json

from .claim import Claim, Outcome, Setting

NAME: Final = "rlora-claim/1"
POINTS, DIGITS = 100, 6
"""Points of a curve, and digits of its numbers: more than a figure shows."""

_NUMBER: Final = optional({"type": "number"})
"""None for what has flown away or never arrived."""
_TRUTH: Final = {"type": "boolean"}
_NUMBERS: Final = {"type": "array", "items": _NUMBER}

_CHECK: Final = closed(
    {"what": TEXT, "value": _NUMBER, "bound": TEXT, "threshold": _NUMBER, "holds": _TRUTH}
)
_PANEL: Final = closed(
    {
        "title": TEXT,
        "x": TEXT,
        "y": TEXT,
        "curves": {
            "type": "array",
            "items": closed({"label": TEXT, "x": _NUMBERS, "y": _NUMBERS}),
        },
        "log_x": _TRUTH,
        "log_y": _TRUTH,
        "rows": TEXTS,
        "threshold": _NUMBER,
    }
)
SCHEMA: Final = closed(
    {
        "schema": {"const": NAME},
        "claim": TEXT,
        "statement": TEXT,
        "source": TEXT,
        "verdict": TEXT,
        "as_documented": _TRUTH,
        "checks": {"type": "array", "items": _CHECK},
        "panels": {"type": "array", "items": _PANEL},
        "quick": _TRUTH,
        "backend": TEXT,
        "rlora": TEXT,
        "created": TIME,
        "seconds": {"type": "number"},
        "environment": ENVIRONMENT,
    }
)
"""JSON Schema of the record."""


def verdict(claim: Claim, outcome: Outcome) -> str:
    """Say in words what came out, beside what is documented."""
    found = "holds" if outcome.holds else "fails"
    if claim.as_documented(outcome):
        return found if claim.holds else f"{found}, as documented"
    return f"{found.upper()}, documented as {'holding' if claim.holds else 'failing'}"


def make_evidence(
    claim: Claim, outcome: Outcome, setting: Setting, seconds: float
) -> dict[str, Any]:
    """Make the record of an experiment; valid by `SCHEMA`."""
    return {
        "schema": NAME,
        "claim": claim.name,
        "statement": claim.statement,
        "source": claim.source,
        "verdict": verdict(claim, outcome),
        "as_documented": claim.as_documented(outcome),
        "checks": [
            {**check._asdict(), "value": _number(check.value), "holds": check.holds}
            for check in outcome.checks
        ],
        "panels": [_panel(panel) for panel in outcome.panels],
        "quick": setting.quick,
        "backend": setting.backend.name,
        "rlora": rlora.__version__,
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "seconds": round(seconds, 1),
        "environment": environment(),
    }


def _panel(panel: Panel) -> dict[str, Any]:
    curves = [thinned(curve, log=panel.log_x) for curve in panel.curves]
    return {
        **{key: getattr(panel, key) for key in _PANEL["properties"]},
        "curves": [
            {"label": c.label, "x": [*map(_number, c.x)], "y": [*map(_number, c.y)]} for c in curves
        ],
        "rows": list(panel.rows),
    }


def thinned(curve: Curve, *, log: bool) -> Curve:
    """A curve of as many points as a figure shows, evenly along its axis, the ends among them."""
    count = len(curve.x)
    if count <= POINTS:
        return curve
    places = np.geomspace(1, count, POINTS) - 1 if log else np.linspace(0, count - 1, POINTS)
    kept = sorted({round(float(place)) for place in places})
    return Curve(curve.label, _at(curve.x, kept), _at(curve.y, kept))


def _at(values: Sequence[float], kept: Sequence[int]) -> list[float]:
    return [values[i] for i in kept]


def _number(x: float) -> float | None:
    return float(f"{x:.{DIGITS}g}") if math.isfinite(x) else None


def read_evidence(path: Path) -> dict[str, Any]:
    """Read a record, and see that it is one; a ValueError says where it stops to be."""
    record: dict[str, Any] = read_json(path, "rlora reproduce")
    if (found := fault(record, SCHEMA)) is not None:
        msg = f"{path.name} is no record of rlora reproduce: {found}"
        raise ValueError(msg)
    return record


def title_of(record: dict[str, Any]) -> str:
    """The statement, with the verdict before it unless it simply holds."""
    found = record["verdict"]
    return str(record["statement"] if found == "holds" else f"[{found}] {record['statement']}")


def panels_of(record: dict[str, Any]) -> tuple[Panel, ...]:
    """The panels of a record, to be drawn; NaN for a number that is missing."""
    return tuple(
        Panel(
            **{
                **panel,
                "curves": tuple(
                    Curve(c["label"], _drawable(c["x"]), _drawable(c["y"])) for c in panel["curves"]
                ),
                "rows": tuple(panel["rows"]),
            }
        )
        for panel in record["panels"]
    )


def _drawable(values: Sequence[float | None]) -> list[float]:
    return [math.nan if value is None else value for value in values]

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
from rlora.cli.records import read_json

from .claim import Claim, Outcome, Setting

NAME: Final = "rlora-claim/1"
POINTS, DIGITS = 100, 6
"""Points of a curve, and digits of its numbers: more than a figure shows."""

PANEL: Final = ("title", "x", "y", "log_x", "log_y", "rows", "threshold")
"""All of a panel but its curves."""


def verdict(claim: Claim, outcome: Outcome) -> str:
    """Say in words what came out, beside what is documented."""
    found = "holds" if outcome.holds else "fails"
    if claim.as_documented(outcome):
        return found if claim.holds else f"{found}, as documented"
    return f"{found.upper()}, documented as {'holding' if claim.holds else 'failing'}"


def make_evidence(
    claim: Claim, outcome: Outcome, setting: Setting, seconds: float
) -> dict[str, Any]:
    """Make the record of an experiment; None stands for numbers that are not finite."""
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
        **{key: getattr(panel, key) for key in PANEL},
        "curves": [
            {"label": c.label, "x": [*map(_number, c.x)], "y": [*map(_number, c.y)]} for c in curves
        ],
    }


def thinned(curve: Curve, *, log: bool) -> Curve:
    """A curve of as many points as a figure shows, evenly along its axis, the ends among them."""
    count = len(curve.x)
    if count <= POINTS:
        return curve
    places = np.geomspace(1, count, POINTS) - 1 if log else np.linspace(0, count - 1, POINTS)
    kept = sorted({round(float(place)) for place in places})
    return Curve(curve.label, [curve.x[i] for i in kept], [curve.y[i] for i in kept])


def _number(x: float) -> float | None:
    return float(f"{x:.{DIGITS}g}") if math.isfinite(x) else None


def read_evidence(path: Path) -> dict[str, Any]:
    """Read a record; a ValueError says that the file is none."""
    record: Any = read_json(path, "rlora reproduce")
    if not isinstance(record, dict) or record.get("schema") != NAME:
        msg = f"{path.name} is no record of rlora reproduce: its schema is not {NAME}"
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
            **{key: panel[key] for key in PANEL},
            curves=tuple(
                Curve(c["label"], _drawable(c["x"]), _drawable(c["y"])) for c in panel["curves"]
            ),
        )
        for panel in record["panels"]
    )


def _drawable(values: Sequence[float | None]) -> list[float]:
    return [math.nan if value is None else value for value in values]

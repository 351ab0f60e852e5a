"""Kinds of target: each holds one figure of the rows of one problem against its limit."""

from collections.abc import Mapping
from typing import Any, Final, NamedTuple

from .cases import Key
from .cost_model import state_numbers
from .problem import named
from .schema import Row
from .stats import median_ratio

Check = dict[str, Any]
"""One line of the verdict; `schema.SCHEMA` has its keys."""

Limits = Mapping[str | None, Mapping[int, float]]
"""By preset and rank; those of None are for presets that are not named."""

Found = Mapping[Key, Row]
"""The rows of one preset and rank."""

TORCH_ADAMW: Final = ("torch", "adamw")

SLACK: Final = 2.0
"""Multiple of the prediction that a method may take."""

GRAM_COPIES: Final = 8
"""Allowance of a step beside its directions, in copies of a pair's two r x r Grams: the Grams, the
damped ones, the identity, a factor, its inverse, the product, what is masked, and a stack of it."""


def make_check(
    what: str,
    preset: str,
    rank: int | None,
    sense: str,
    limit: float,
    measured: float,
    *rows: Row,
    goal: float | None = None,
) -> Check:
    """Hold a figure against a limit: "at most", "at least" or "exactly".

    It is no surer than the timings of the rows that it is from.
    """
    passed = {
        "at most": measured <= limit,
        "at least": measured >= limit,
        "exactly": measured == limit,
    }
    return {
        "what": what,
        "preset": preset,
        "rank": rank,
        "sense": sense,
        "limit": limit,
        "measured": measured,
        "passed": passed[sense],
        "stable": all(row["verdict"] == "ok" for row in rows),
        "goal": goal,
    }


class Ratio(NamedTuple):
    """Steps of two cases, and the most or least that their ratio should be."""

    over: Key
    under: Key
    limits: Limits | None = None
    """None stands for twice what bytes and flops predict."""

    sense: str = "at most"
    goal: Mapping[int, float] | None = None
    """By rank, what is to be reached one day."""

    @property
    def words(self) -> str:
        """Name of the measured quantity."""
        predicted = f", {SLACK:g} x predicted" if self.limits is None else ""
        return f"{' '.join(self.over)} / {' '.join(self.under)}{predicted}"

    def check(self, found: Found) -> Check | None:
        """Give the verdict; None where it was not measured."""
        over, under = found.get(self.over), found.get(self.under)
        if not over or not under:
            return None
        limit, rank = self._limit(over, under), over["rank"]
        ratio = median_ratio(over["samples_s"], under["samples_s"])
        if limit is None or ratio is None:
            return None
        goal = (self.goal or {}).get(rank)
        return make_check(
            self.words, over["preset"], rank, self.sense, limit, ratio, over, under, goal=goal
        )

    def _limit(self, over: Row, under: Row) -> float | None:
        if self.limits is not None:
            return self.limits.get(over["preset"], self.limits[None]).get(over["rank"])
        if over["model_s"] and under["model_s"]:
            return float(SLACK * over["model_s"] / under["model_s"])
        return None


class Temporaries(NamedTuple):
    """Bytes that a torch step holds for a while: the directions once, and r x r work."""

    method: str

    @property
    def words(self) -> str:
        """Name of the measured quantity."""
        return f"torch {self.method}, temporary bytes"

    def check(self, found: Found) -> Check | None:
        """Give the verdict; None where it was not measured."""
        row = found.get(("torch", self.method))
        if not row or row["peak_temporary_bytes"] is None:
            return None
        numbers = row["parameters"] + GRAM_COPIES * 2 * row["pairs"] * row["rank"] ** 2
        limit = numbers * _wide(row)
        peak = row["peak_temporary_bytes"]
        return make_check(self.words, row["preset"], row["rank"], "at most", limit, peak)


class State(NamedTuple):
    """Bytes that a torch class keeps: those of the method's arrays, and not one more."""

    method: str

    @property
    def words(self) -> str:
        """Name of the measured quantity."""
        return f"torch {self.method}, state bytes"

    def check(self, found: Found) -> Check | None:
        """Give the verdict; None where it was not measured."""
        row = found.get(("torch", self.method))
        # torch counts its steps in float32 beside moments of float64.
        if not row or row["dtype"] == "float64":
            return None
        shapes, rank = named(row["preset"]).pairs(), row["rank"]
        limit = _wide(row) * sum(state_numbers(self.method, m, n, rank) for m, n in shapes)
        kept = row["state_bytes"]
        return make_check(self.words, row["preset"], row["rank"], "exactly", limit, kept)


def _wide(row: Row) -> int:
    """Bytes of a number in a computation, at least those of float32."""
    return max(4, int(row["dtype"][-2:]) // 8)

"""Kinds of target: each holds one figure of the rows of one problem against its limit."""

from collections.abc import Mapping
from typing import Any, Final, NamedTuple, Protocol

from .cases import Key
from .cost_model import state_numbers
from .presets import named
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


class Target(Protocol):
    """Limit that a suite holds the rows of a problem against."""

    @property
    def words(self) -> str:
        """Name of the measured quantity."""

    def check(self, found: Found) -> Check | None:
        """Give the verdict; None where it was not measured."""


class Ratio(NamedTuple):
    """Steps of two cases, and the most or least that their ratio should be."""

    over: Key
    under: Key
    limits: Limits
    sense: str = "at most"
    goal: Mapping[int, float] | None = None
    """By rank, what is to be reached one day."""

    @property
    def words(self) -> str:
        return f"{' '.join(self.over)} / {' '.join(self.under)}"

    def check(self, found: Found) -> Check | None:
        over, under = found.get(self.over), found.get(self.under)
        if not over or not under:
            return None
        preset, rank = over["preset"], over["rank"]
        limit = self.limits.get(preset, self.limits[None]).get(rank)
        goal = None if self.goal is None else self.goal.get(rank)
        ratio = median_ratio(over["samples_s"], under["samples_s"])
        if limit is None or ratio is None:
            return None
        return make_check(
            self.words, preset, rank, self.sense, limit, ratio, over, under, goal=goal
        )


class Predicted(NamedTuple):
    """A torch method's step over AdamW's, at most twice what their bytes and flops predict."""

    method: str

    @property
    def words(self) -> str:
        return f"torch {self.method} / torch adamw, {SLACK:g} x predicted"

    def check(self, found: Found) -> Check | None:
        mine, plain = found.get(("torch", self.method)), found.get(TORCH_ADAMW)
        if not mine or not plain or not mine["model_s"] or not plain["model_s"]:
            return None
        ratio = median_ratio(mine["samples_s"], plain["samples_s"])
        if ratio is None:
            return None
        limit = SLACK * mine["model_s"] / plain["model_s"]
        rank = mine["rank"]
        return make_check(self.words, mine["preset"], rank, "at most", limit, ratio, mine, plain)


class Temporaries(NamedTuple):
    """Bytes that a torch step holds for a while: the directions once, and r x r work."""

    method: str

    @property
    def words(self) -> str:
        return f"torch {self.method}, temporary bytes"

    def check(self, found: Found) -> Check | None:
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
        return f"torch {self.method}, state bytes"

    def check(self, found: Found) -> Check | None:
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

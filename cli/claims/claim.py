"""Claims, and outcomes of their experiments."""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, Literal, NamedTuple, TypeVar

from rich import progress
from rich.console import Console

from rlora import Factors, Transform, step
from rlora.cli.chart import Curve, Panel
from rlora.core.backend import Backend
from rlora.core.factors import Array

T = TypeVar("T")


class Setting(NamedTuple):
    """Setting of an experiment: backend and size."""

    backend: Backend
    """Backend whose arrays the method under test steps, in float64."""

    quick: bool
    """Flag: a smaller experiment with the same verdict will do."""

    def track(self, items: Iterable[T], label: str) -> Iterable[T]:
        """Items, with a bar on a terminal's stderr that says how many are done."""
        stderr = Console(stderr=True)
        off = not stderr.is_terminal
        return progress.track(items, label, console=stderr, transient=True, disable=off)

    def array(self, x: Any) -> Array:
        """A NumPy array as one of the backend, in float64."""
        return self.backend.asarray(x, "float64")

    def arrays(self, pair: Factors) -> Factors:
        """A pair of NumPy arrays likewise."""
        return Factors(*map(self.array, pair))

    def path(
        self,
        method: Transform,
        start: Factors,
        grads: Callable[[Factors], Factors],
        lr: float,
    ) -> Iterator[Factors]:
        """The pairs that a method goes through, from the start on, without end."""

        def move(pair: Factors, state: Any) -> Any:
            return step(method, pair, grads(pair), state, lr)

        move = self.backend.compile(move)
        pair, state = start, method.init(start)
        while True:
            yield pair
            pair, state = move(pair, state)


class Check(NamedTuple):
    """A measured value beside the threshold that it must keep."""

    what: str
    value: float
    bound: Literal["<=", ">="]
    threshold: float

    @property
    def holds(self) -> bool:
        """Return whether it holds; a NaN never does. No NumPy boolean, which JSON cannot have."""
        if self.bound == "<=":
            return bool(self.value <= self.threshold)
        return bool(self.value >= self.threshold)


class Outcome(NamedTuple):
    """Result of an experiment."""

    checks: tuple[Check, ...]
    panels: tuple[Panel, ...]

    @property
    def holds(self) -> bool:
        """Return whether the claim holds: every check."""
        return all(check.holds for check in self.checks)


class Claim(NamedTuple):
    """A statement of a paper, and the experiment that tries it."""

    name: str
    """In kebab-case; of the command line and of the files."""

    statement: str
    source: str
    """Authors, title, arXiv, year, theorem."""

    run: Callable[[Setting], Outcome]
    """The experiment: seeded, of CPU size."""

    holds: bool = True
    """The documented verdict."""

    def as_documented(self, outcome: Outcome) -> bool:
        """Return whether the outcome is the documented one. A value that is no number never is."""
        measured = not any(math.isnan(check.value) for check in outcome.checks)
        return measured and outcome.holds == self.holds


def lines(
    title: str,
    x: tuple[str, Sequence[float]],
    y: str,
    found: Mapping[str, Any],
    *,
    log_x: bool = True,
    log_y: bool = True,
) -> Panel:
    """A panel of lines by their labels, over the same places; some may end before the others."""
    label, places = x
    curves = [Curve(name, places[: len(values)], values) for name, values in found.items()]
    return Panel(title, label, y, tuple(curves), log_x, log_y)

"""Claims, and outcomes of their experiments."""

import math
from collections.abc import Callable, Iterable, Iterator
from typing import Any, Literal, NamedTuple, Protocol, TypeVar

from rlora import Factors, Transform, step
from rlora.cli.chart import Curve as Curve, Panel as Panel
from rlora.core.backend import Backend
from rlora.core.factors import Array

T = TypeVar("T")


class Track(Protocol):
    """Passes items on, with a bar that says how many are done."""

    def __call__(self, items: Iterable[T], label: str) -> Iterable[T]: ...


class Setting(NamedTuple):
    """Setting of an experiment: backend and size.

    Parameters
    ----------
    backend : Backend
        Whose arrays the method under test steps, in float64.
    quick : bool
        Whether a smaller experiment with the same verdict will do.
    track : callable
        ``for x in track(items, "what they are")`` shows a bar.
    """

    backend: Backend
    quick: bool
    track: Track

    def array(self, x: Any) -> Array:
        """A NumPy array as one of the backend, in float64."""
        return self.backend.asarray(x, "float64")

    def path(
        self,
        method: Transform,
        start: Factors,
        grads: Callable[[Factors], Factors],
        lr: float,
        *,
        scaling: float = 1.0,
    ) -> Iterator[Factors]:
        """The pairs that a method goes through, from the start on, without end."""

        def move(pair: Factors, state: Any) -> Any:
            return step(method, pair, grads(pair), state, lr)

        move = self.backend.compile(move)
        pair, state = start, method.init(start, scaling)
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
        """Return whether it holds; a NaN never does."""
        if self.bound == "<=":
            return self.value <= self.threshold
        return self.value >= self.threshold


class Outcome(NamedTuple):
    """Result of an experiment."""

    checks: tuple[Check, ...]
    panels: tuple[Panel, ...]

    @property
    def holds(self) -> bool:
        """Return whether the claim holds: every check."""
        return all(check.holds for check in self.checks)


class Claim(NamedTuple):
    """A statement of a paper, and the experiment that tries it.

    Parameters
    ----------
    name : str
        In kebab-case; of the command line and of the files.
    statement : str
        One sentence.
    source : str
        Authors, title, arXiv, year, theorem.
    run : callable
        The experiment: seeded, of CPU size.
    holds : bool
        The documented verdict; False for a claim that is documented as failing.
    """

    name: str
    statement: str
    source: str
    run: Callable[[Setting], Outcome]
    holds: bool = True

    def as_documented(self, outcome: Outcome) -> bool:
        """Return whether the outcome is the documented one. A value that is no number never is."""
        measured = not any(math.isnan(check.value) for check in outcome.checks)
        return measured and outcome.holds == self.holds

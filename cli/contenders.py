"""What is timed: one optimizer each, with its own parameters and state, ready to step."""

from abc import ABC, abstractmethod
from collections.abc import Callable
from functools import partial
from typing import Any, Final, NamedTuple

import rlora
from rlora import Factors, Transform
from rlora.core.backend import Backend
from rlora.core.decay import add_decayed_weights
from rlora.core.factors import Array
from rlora.core.moments import scale_by_adam

from . import memory
from .problem import Problem

LR: Final = 1e-4
"""Small enough that the factors are after many steps much as they were."""


class Contender(ABC):
    """One row of the table. A subclass does one step of an optimizer and waits for the device."""

    name: str
    ratio_to: str
    """Name of the plain method it is compared with; its own, if it is one."""

    backend: str
    device: str

    @abstractmethod
    def refresh(self) -> None:
        """Before every step and outside the clock: gradients as a backward pass leaves them."""

    @abstractmethod
    def step(self) -> None:
        """One step, finished when this returns."""

    @abstractmethod
    def state_bytes(self) -> int:
        """Bytes of all arrays of the optimizer's state."""

    def peak_temporary_bytes(self) -> int | None:
        """Most bytes a step holds at once beyond what was there before; None if unknown.

        For a contender of its own, as this does steps in which time has no meaning.
        """
        return None


class Entry(NamedTuple):
    """A contender to be; building it takes its share of the memory."""

    name: str
    ratio_to: str
    build: Callable[[], Contender]


class Arena(NamedTuple):
    """Where the contest is held: a backend, a dtype and a device that it knows."""

    backend: Backend
    dtype: str
    device: str | None

    def array(self, x: Any) -> Array:
        """Make a NumPy array one of this backend."""
        return self.backend.asarray(x, self.dtype, self.device)

    def factors(self, pairs: list[Factors]) -> list[Factors]:
        """All pairs as arrays of this backend."""
        return [Factors(self.array(A), self.array(B)) for A, B in pairs]


def baseline_of(method: str) -> str:
    """Name the plain method that a method is compared with."""
    return "sgd" if method.endswith("sgd") else "adamw"


def plain(name: str) -> Transform:
    """Plain AdamW or SGD out of the library's own links."""
    if name == "adamw":
        return rlora.chain(scale_by_adam(), add_decayed_weights(0.01))
    return rlora.chain(add_decayed_weights(0.0))


def functional_entries(
    problem: Problem, arena: Arena, plains: list[str], methods: list[str]
) -> list[Entry]:
    """Plain methods and methods of the library, through the functional API."""
    import rlora.methods

    params, grads = arena.factors(problem.pairs), arena.factors(problem.grads)

    def entry(name: str, ratio_to: str, make: Callable[[], Transform]) -> Entry:
        return Entry(
            name, ratio_to, lambda: Functional(name, ratio_to, make(), params, grads, arena)
        )

    return [
        *(entry(name, name, partial(plain, name)) for name in plains),
        *(entry(name, baseline_of(name), getattr(rlora.methods, name)) for name in methods),
    ]


class Functional(Contender):
    """A Transform through `rlora.step`, compiled where the backend compiles.

    Parameters and state are fed back, as in training; gradients are shared and stay.
    """

    def __init__(
        self,
        name: str,
        ratio_to: str,
        method: Transform,
        params: list[Factors],
        grads: list[Factors],
        arena: Arena,
    ) -> None:
        self.name, self.ratio_to, self.backend = name, ratio_to, arena.backend.name
        self.device = str(getattr(params[0].A, "device", "cpu"))
        self._library = arena.backend
        self._params, self._grads, self._state = params, grads, method.init(params)
        self._step = arena.backend.compile(
            lambda params, grads, state: rlora.step(method, params, grads, state, LR)
        )

    def refresh(self) -> None:
        """Nothing to do: a pure step leaves its gradients as they were."""

    def step(self) -> None:
        self._params, self._state = self._step(self._params, self._grads, self._state)
        arrays = [x for pair in self._params for x in pair]
        self._library.synchronize(*arrays, *rlora.flatten_state(self._state).values())

    def state_bytes(self) -> int:
        return sum(map(memory.nbytes, rlora.flatten_state(self._state).values()))

    def peak_temporary_bytes(self) -> int | None:
        if self.backend == "numpy":
            return memory.traced(self.step)
        if self.backend == "jax":
            return memory.of_xla(self._step, self._params, self._grads, self._state)
        return None

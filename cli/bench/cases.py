"""Cases to be timed: one optimizer each, with its own parameters and state, ready to step."""

import inspect
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any, Final, NamedTuple

import rlora
import rlora.methods
from rlora import Factors, Transform
from rlora.core.backend import Backend
from rlora.core.decay import add_decayed_weights
from rlora.core.factors import Array
from rlora.core.moments import scale_by_adam

from . import memory
from .problem import Problem

LR: Final = 1e-4
"""Small enough that the factors are after many steps much as they were."""

Key = tuple[str, str]
"""Backend and name: who is who in a timing."""


class Stepper(ABC):
    """One row of the table. A subclass does one step of an optimizer and waits for the device."""

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

    def compile(self) -> float | None:
        """Compile ahead of the first step; its seconds, or None where nothing is compiled."""
        return None

    def peak_temporary_bytes(self) -> int | None:
        """Most bytes a step holds at once beyond what was there before; None if unknown."""
        return None

    def operations(self) -> int | None:
        """Count the operations that a step hands to the library; None if that cannot be seen."""
        return None


class Case(NamedTuple):
    """One row of the table to be: building it takes its share of the memory."""

    backend: str
    name: str
    ratio_to: Key
    """The baseline it is compared with; itself, if it is one."""

    build: Callable[[], Stepper]

    @property
    def key(self) -> Key:
        return self.backend, self.name


class ArraySpec(NamedTuple):
    """Place of a measurement: a backend, a dtype and a device that it knows."""

    backend: Backend
    dtype: str
    device: str | None

    @property
    def name(self) -> str:
        """Name of the backend."""
        return self.backend.name

    def array(self, x: Any) -> Array:
        """Make a NumPy array one of this backend."""
        return self.backend.asarray(x, self.dtype, self.device)

    def factors(self, pairs: list[Factors]) -> list[Factors]:
        """All pairs as arrays of this backend."""
        return [Factors(self.array(A), self.array(B)) for A, B in pairs]


VARIANTS: Final = ("before", "after")
"""Placements after a method's colon: a placement of its preconditioner other than its own."""


def split_variant(method: str) -> tuple[str, dict[str, Any]]:
    """Give the method's name and its options: ``scaled_adamw:after`` has placement "after"."""
    name, _, variant = method.partition(":")
    return name, {"placement": variant} if variant else {}


def method_names() -> list[str]:
    """Every method, and every variant of it."""
    return [
        name + variant
        for name in rlora.methods.__all__
        for variant in ("", *(f":{placement}" for placement in VARIANTS))
        if not variant or "placement" in inspect.signature(getattr(rlora.methods, name)).parameters
    ]


BASELINES: Final = {"adamw": "AdamW", "sgd": "SGD"}
"""Methods that others are compared with, and their classes in ``torch.optim``."""


def baseline_of(method: str) -> str:
    """Name the baseline that a method is compared with."""
    return "sgd" if method.endswith("sgd") else "adamw"


def plain(name: str) -> Transform:
    """Plain AdamW or SGD out of the library's own transformations."""
    if name == "adamw":
        return rlora.chain(scale_by_adam(), add_decayed_weights(0.01))
    return rlora.chain(add_decayed_weights(0.0))


def make_method(method: str) -> Transform:
    """Make a method, or a plain one, by its name."""
    if method in BASELINES:
        return plain(method)
    name, options = split_variant(method)
    made: Transform = getattr(rlora.methods, name)(**options)
    return made


def functional_cases(problem: Problem, spec: ArraySpec, methods: list[str]) -> list[Case]:
    """Plain methods and methods of the library, through the functional API."""
    params, grads = spec.factors(problem.pairs), spec.factors(problem.grads)

    def case(name: str) -> Case:
        def build() -> Stepper:
            method = make_method(name)
            kind, donate = (DonatedStepper, True) if spec.name == "numpy" else (PureStepper, False)
            return kind(
                spec,
                params,
                grads,
                method.init(params),
                partial(_stepped, method, donate),
                lambda state: rlora.flatten_state(state).values(),
            )

        return Case(spec.name, name, (spec.name, baseline_of(name)), build)

    return [case(name) for name in methods]


def _stepped(
    method: Transform, donate: bool, params: list[Factors], grads: list[Factors], state: Any
) -> tuple[list[Factors], Any]:
    moved: tuple[list[Factors], Any] = rlora.step(method, params, grads, state, LR, donate=donate)
    return moved


class PureStepper(Stepper):
    """A pure step, compiled where the backend compiles.

    Parameters and state are fed back, as in training; gradients are shared and stay.
    """

    def __init__(
        self,
        spec: ArraySpec,
        params: list[Factors],
        grads: list[Factors],
        state: Any,
        step: Callable[..., tuple[list[Factors], Any]],
        leaves: Callable[[Any], Iterable[Array]],
    ) -> None:
        self.device = str(getattr(params[0].A, "device", "cpu"))
        self._library, self._leaves = spec.backend, leaves
        self._params, self._grads, self._state = params, grads, state
        self._step = spec.backend.compile(step)

    def compile(self) -> float | None:
        lower = getattr(self._step, "lower", None)
        if lower is None:
            return None
        start = time.perf_counter()
        self._step = lower(self._params, self._grads, self._state).compile()
        return time.perf_counter() - start

    def refresh(self) -> None:
        """Nothing to do: a pure step leaves its gradients as they were."""

    def step(self) -> None:
        self._params, self._state = self._step(self._params, self._grads, self._state)
        arrays = [x for pair in self._params for x in pair]
        self._library.synchronize(*arrays, *self._leaves(self._state))

    def state_bytes(self) -> int:
        return sum(map(memory.nbytes, self._leaves(self._state)))

    def peak_temporary_bytes(self) -> int | None:
        if self._library.name == "numpy":
            return memory.traced(self.step)
        if hasattr(self._step, "memory_analysis"):
            return memory.of_xla(self._step)
        return None


class DonatedStepper(PureStepper):
    """A step that may write over what it is given: copies, as cases share their arrays."""

    def __init__(
        self, spec: ArraySpec, params: list[Factors], grads: list[Factors], *rest: Any
    ) -> None:
        super().__init__(spec, _copies(params), grads, *rest)
        self._source = grads

    def refresh(self) -> None:
        self._grads = _copies(self._source)


def _copies(pairs: list[Factors]) -> list[Factors]:
    return [Factors(pair.A.copy(), pair.B.copy()) for pair in pairs]

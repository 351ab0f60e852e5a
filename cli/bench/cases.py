"""Cases to be timed: one optimizer each, with its own parameters and state, ready to step."""

import inspect
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator
from typing import Any, Final, NamedTuple

import rlora
import rlora.methods
from rlora import Factors, Transform
from rlora.core.backend import Backend
from rlora.core.decay import add_decayed_weights
from rlora.core.factors import Array
from rlora.core.moments import scale_by_adam

from . import memory
from .problem import BenchProblem

LR: Final = 1e-4
"""Small enough that the factors are after many steps much as they were."""

Key = tuple[str, str]
"""Backend and name: who is who in a timing."""


class Case(ABC):
    """One row of the table. A subclass does one step of an optimizer and waits for the device."""

    def __init__(self, key: Key, ratio_to: Key, device: str) -> None:
        self.key, self.device = key, device
        self.ratio_to = ratio_to
        """The baseline it is compared with; itself, if it is one."""

        self.samples: list[float] = []
        self.build_s = 0.0
        self.compile_s: float | None = None
        self.first_call_s = 0.0
        self.operations: int | None = None
        self.peak: int | None = None

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
        """Most bytes a step holds at once beyond what was there before; None if unknown."""
        return None

    def count_operations(self) -> int | None:
        """Count the operations that a step hands to the library; None if that cannot be seen."""
        return None


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


def make_method(method: str) -> Transform:
    """Make a method, or plain AdamW or SGD out of the library's own transformations."""
    if method == "adamw":
        return rlora.chain(scale_by_adam(), add_decayed_weights(0.01))
    if method == "sgd":
        return rlora.chain(add_decayed_weights(0.0))
    name, options = split_variant(method)
    made: Transform = getattr(rlora.methods, name)(**options)
    return made


def functional_cases(problem: BenchProblem, spec: ArraySpec, methods: list[str]) -> Iterator[Case]:
    """Plain methods and methods of the library, by the functional API, built one by one."""
    params, grads = spec.factors(problem.pairs), spec.factors(problem.grads)
    return (_functional_case(spec, name, params, grads) for name in methods)


def _functional_case(
    spec: ArraySpec, name: str, params: list[Factors], grads: list[Factors]
) -> Case:
    method, donate = make_method(name), spec.name == "numpy"

    def step(params: Any, grads: Any, state: Any) -> Any:
        return rlora.step(method, params, grads, state, LR, donate=donate)

    def leaves(state: Any) -> Iterable[Array]:
        return rlora.flatten_state(state).values()

    ratio_to, state = (spec.name, baseline_of(name)), method.init(params)
    return PureCase(spec, name, ratio_to, params, grads, state, step, leaves, donate=donate)


class PureCase(Case):
    """A step of a pure function, compiled where the backend compiles.

    Parameters and state are fed back, as in training; cases share their gradients. One that donates
    may write over what it is given, and so is given copies.
    """

    def __init__(
        self,
        spec: ArraySpec,
        name: str,
        ratio_to: Key,
        params: list[Factors],
        grads: list[Factors],
        state: Any,
        step: Callable[[Any, Any, Any], Any],
        leaves: Callable[[Any], Iterable[Array]],
        *,
        donate: bool = False,
    ) -> None:
        device = str(getattr(params[0].A, "device", "cpu"))
        super().__init__((spec.name, name), ratio_to, device)
        self._library, self._leaves = spec.backend, leaves
        self._params, self._grads, self._state = params, grads, state
        if donate:
            self._params = _copies(params)
        self._donated = grads if donate else None
        self._step = spec.backend.compile(step)
        if hasattr(self._step, "lower"):
            start = time.perf_counter()
            self._step = self._step.lower(self._params, grads, state).compile()
            self.compile_s = time.perf_counter() - start

    def refresh(self) -> None:
        if self._donated is not None:
            self._grads = _copies(self._donated)

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


def _copies(pairs: list[Factors]) -> list[Factors]:
    return [Factors(pair.A.copy(), pair.B.copy()) for pair in pairs]

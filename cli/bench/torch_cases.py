"""Cases that other libraries own: classes of `rlora.torch`, torch's optimizers, optax."""

import importlib
import inspect
from collections.abc import Callable
from typing import Any

from . import memory
from .cases import (
    BASELINES,
    LR,
    ArraySpec,
    Case,
    Key,
    PureStepper,
    Stepper,
    baseline_of,
    split_variant,
)
from .problem import Problem
from .third_party import ThirdParty


def torch_class(method: str) -> Any:
    """Find the class of `rlora.torch` for a method by its name; None if it has none."""
    module = importlib.import_module("rlora.torch")
    for name in module.__all__:
        if name.lower() == method.replace("_", ""):
            return getattr(module, name)
    return None


class SharedTensors:
    """Gradients that all torch cases share, and a copy from which they are written anew.

    PEFT's wrapper overwrites the gradients it is given; a real backward pass would write them
    again before the next step. So that all have the same, they are rewritten before every step.
    """

    def __init__(self, problem: Problem, spec: ArraySpec) -> None:
        self.spec, self.problem = spec, problem
        arrays = [x for pair in spec.factors(problem.grads) for x in pair]
        self.source, self.grads = arrays, [x.clone() for x in arrays]

    def model(self) -> Any:
        """Make a module with nothing but the factors, under the names that PEFT gives them."""
        torch = importlib.import_module("torch")
        model, fresh = torch.nn.Module(), iter(self.grads)
        for i, pair in enumerate(self.problem.pairs):
            layer = torch.nn.Module()
            for name, x in zip(("lora_A", "lora_B"), pair, strict=True):
                holder = torch.nn.Module()
                # A clone, because a CPU tensor may share its memory with the NumPy array.
                holder.weight = torch.nn.Parameter(self.spec.array(x).clone())
                holder.weight.grad = next(fresh)
                layer.add_module(name, torch.nn.ModuleDict({"default": holder}))
            model.add_module(f"layer{i}", layer)
        return model

    def refresh(self) -> None:
        """Write the gradients anew."""
        for grad, source in zip(self.grads, self.source, strict=True):
            grad.copy_(source)
        self.spec.backend.synchronize(*self.grads)


def torch_cases(
    shared: SharedTensors, methods: list[str], others: list[ThirdParty], ratio_to: Key
) -> list[Case]:
    """Plain optimizers of torch and classes of `rlora.torch`, then others beside `ratio_to`."""

    def case(name: str, ratio_to: Key, make: Callable[[Any], Any]) -> Case:
        return Case("torch", name, ratio_to, lambda: TorchStepper(make, shared))

    return [
        *(case(name, ("torch", baseline_of(name)), _method(name)) for name in methods),
        *(case(other.name, ratio_to, other.make) for other in others),
    ]


def _method(method: str) -> Callable[[Any], Any]:
    if method in BASELINES:
        kind = getattr(importlib.import_module("torch.optim"), BASELINES[method])
        return lambda model: kind(model.parameters(), lr=LR, fused=True)
    name, options = split_variant(method)
    kind = torch_class(name)
    if "fused" in inspect.signature(kind).parameters:
        options["fused"] = True
    return lambda model: kind(model, lr=LR, **options)


def optax_case(problem: Problem, spec: ArraySpec, other: ThirdParty, ratio_to: Key) -> Case:
    """A GradientTransformation, jitted with the update of the parameters."""
    jax, optax = (importlib.import_module(name) for name in ("jax", "optax"))

    def build() -> Stepper:
        transformation = other.make(None)
        params, grads = spec.factors(problem.pairs), spec.factors(problem.grads)

        def step(params: Any, grads: Any, state: Any) -> tuple[Any, Any]:
            updates, state = transformation.update(grads, state, params)
            return optax.apply_updates(params, updates), state

        state = transformation.init(params)
        return PureStepper(spec, params, grads, state, step, jax.tree.leaves)

    return Case("jax", other.name, ratio_to, build)


class TorchStepper(Stepper):
    """A torch optimizer over a model of its own."""

    def __init__(self, make: Callable[[Any], Any], shared: SharedTensors) -> None:
        self.device = str(shared.grads[0].device)
        self._make, self._shared, self._backend = make, shared, shared.spec.backend
        # The model stays alive with its optimizer, as in training.
        self._model = shared.model()
        self._optimizer = make(self._model)

    def refresh(self) -> None:
        self._shared.refresh()

    def step(self) -> None:
        self._optimizer.step()
        self._backend.synchronize(*self._shared.grads)

    def state_bytes(self) -> int:
        tensors = [x for state in self._optimizer.state.values() for x in state.values()]
        return sum(x.nbytes for x in tensors if hasattr(x, "nbytes"))

    def operations(self) -> int:
        return memory.operations(self.step)

    def peak_temporary_bytes(self) -> int | None:
        kind = self.device.partition(":")[0]
        meter = {"cpu": memory.of_torch_cpu, "cuda": memory.of_torch_cuda}.get(kind)
        if meter is None:
            return None
        # A new one, because what the first step lays out and keeps counts too.
        fresh = TorchStepper(self._make, self._shared)
        held, _ = meter(fresh.step)
        fresh.refresh()
        _, peak = meter(fresh.step)
        # Memory that an optimizer keeps between steps without its being state is no less taken.
        return peak + max(0, held - fresh.state_bytes())

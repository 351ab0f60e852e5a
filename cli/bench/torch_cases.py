"""Cases that other libraries own, and the rest of a training step: forward and backward."""

import importlib
import inspect
import statistics
import time
from collections.abc import Callable
from typing import Any, Final

import numpy as np

from . import memory
from .cases import BASELINES, LR, ArraySpec, Case, Key, PureCase, baseline_of, split_variant
from .problem import TOKENS, BenchProblem

REPEATS: Final = 3


def torch_class(method: str) -> Any:
    """Find the class of `rlora.torch` for a method by its name; None if it has none."""
    module = importlib.import_module("rlora.torch")
    for name in module.__all__:
        if name.lower() == method.replace("_", ""):
            return getattr(module, name)
    return None


def make_optimizer(method: str, model: Any) -> Any:
    """Make a plain optimizer of torch, or a class of `rlora.torch`."""
    if method in BASELINES:
        kind = getattr(importlib.import_module("torch.optim"), BASELINES[method])
        return kind(model.parameters(), lr=LR, fused=True)
    name, options = split_variant(method)
    kind = torch_class(name)
    if "fused" in inspect.signature(kind).parameters:
        options["fused"] = True
    return kind(model, lr=LR, **options)


class SharedTensors:
    """Gradients that all torch cases share, and a copy from which they are written anew.

    PEFT's wrapper overwrites the gradients it is given; a real backward pass would write them
    again before the next step. So that all have the same, they are rewritten before every step.
    """

    def __init__(self, problem: BenchProblem, spec: ArraySpec) -> None:
        self.spec, self.problem = spec, problem
        self.source = [x for pair in spec.factors(problem.grads) for x in pair]
        self.grads = [x.clone() for x in self.source]

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


class TorchCase(Case):
    """A torch optimizer over a model of its own."""

    def __init__(
        self, name: str, ratio_to: Key, make: Callable[[Any], Any], shared: SharedTensors
    ) -> None:
        super().__init__(("torch", name), ratio_to, str(shared.grads[0].device))
        self._make, self._shared = make, shared
        # The model stays alive with its optimizer, as in training.
        self._model = shared.model()
        self._optimizer = make(self._model)

    @classmethod
    def of_method(cls, method: str, shared: SharedTensors) -> "TorchCase":
        """Make the case of a method or a baseline."""
        ratio_to = ("torch", baseline_of(method))
        return cls(method, ratio_to, lambda model: make_optimizer(method, model), shared)

    def refresh(self) -> None:
        self._shared.refresh()

    def step(self) -> None:
        self._optimizer.step()
        self._shared.spec.backend.synchronize(*self._shared.grads)

    def state_bytes(self) -> int:
        tensors = [x for state in self._optimizer.state.values() for x in state.values()]
        return sum(x.nbytes for x in tensors if hasattr(x, "nbytes"))

    def count_operations(self) -> int | None:
        try:
            return memory.operations(self.step)
        except RuntimeError as error:
            if "dispatch mode" not in str(error):
                raise
            # Torch compiles no whole step, as torchao's, while it is watched, nor later on.
            importlib.import_module("torch").compiler.reset()
            return None

    def peak_temporary_bytes(self) -> int | None:
        kind = self.device.partition(":")[0]
        meter = {"cpu": memory.of_torch_cpu, "cuda": memory.of_torch_cuda}.get(kind)
        if meter is None:
            return None
        # A new one, because what the first step lays out and keeps counts too.
        fresh = TorchCase(self.key[1], self.ratio_to, self._make, self._shared)
        held, _ = meter(fresh.step)
        fresh.refresh()
        _, peak = meter(fresh.step)
        # Memory that an optimizer keeps between steps without its being state is no less taken.
        return peak + max(0, held - fresh.state_bytes())


def optax_case(problem: BenchProblem, spec: ArraySpec, transformation: Any, ratio_to: Key) -> Case:
    """A GradientTransformation, jitted with the update of the parameters."""
    jax, optax = (importlib.import_module(name) for name in ("jax", "optax"))
    params, grads = spec.factors(problem.pairs), spec.factors(problem.grads)

    def step(params: Any, grads: Any, state: Any) -> tuple[Any, Any]:
        updates, state = transformation.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    state = transformation.init(params)
    return PureCase(spec, "optax.adamw", ratio_to, params, grads, state, step, jax.tree.leaves)


def forward_backward_seconds(problem: BenchProblem, spec: ArraySpec) -> float:
    """Sum over all layers; layers of one shape are timed once, as their weights would not fit.

    A layer is ``x W0ᵀ + (x Aᵀ) Bᵀ`` with W0 frozen. Backward goes to A, B and x, as the layer
    before needs it. Attention, norms and activations between the layers are left out.
    """
    return sum(count * _layer_seconds(shape, spec) for shape, count in problem.shapes.items())


def _layer_seconds(shape: tuple[int, int, int], spec: ArraySpec) -> float:
    m, n, r = shape
    rng, torch = np.random.default_rng(0), importlib.import_module("torch")

    def tensor(*size: int) -> Any:
        return spec.array(rng.standard_normal(size, np.float32) / size[-1] ** 0.5)

    W, G = tensor(m, n), tensor(TOKENS, m)
    x, A, B = (tensor(*s).requires_grad_() for s in ((TOKENS, n), (r, n), (m, r)))

    def once() -> float:
        start = time.perf_counter()
        y = torch.nn.functional.linear(x, W) + (x @ A.mT) @ B.mT
        grads = torch.autograd.grad(y, (x, A, B), G)
        spec.backend.synchronize(*grads)
        return time.perf_counter() - start

    once()
    return statistics.median(once() for _ in range(REPEATS))

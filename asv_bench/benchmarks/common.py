"""Base of all benchmarks: parameters, the problem, skips, warm steps on one thread.

Old commits run these files too, so whatever a commit may lack is looked up in `setup`, and a lack
is a skip (NotImplementedError, asv's word for it).
"""

import contextlib
import importlib
import inspect
import math
import os
import sys
from collections.abc import Callable
from typing import Any

import numpy as np

BACKENDS = tuple(os.environ.get("RLORA_ASV_BACKENDS", "numpy,jax,torch").split(","))
"""Also known: cupy, torch:cuda. They cost a column of blanks where there is no such device."""

# Once, before asv forks a process for each set of parameters, so that none pays for it again.
# torch's optimizers load its compiler. To list the benchmarks, asv's "discover", takes none of it.
_LOADED = {"torch": ("torch", "torch._dynamo", "rlora.torch"), "jax": ("jax", "optax")}
for _library in {name.partition(":")[0] for name in BACKENDS} & _LOADED.keys():
    for _module in _LOADED[_library] if "discover" not in sys.argv[:2] else ():
        with contextlib.suppress(ImportError):
            importlib.import_module(_module)

PLAIN = "adamw"
"""The baseline: torch.optim.AdamW (fused), optax.adamw, elsewhere the library's own AdamW."""


def _methods() -> list[str]:
    try:
        return list(importlib.import_module("rlora.methods").__all__)
    except (ImportError, AttributeError):  # a broken commit has the plain rows
        return []


def opens_with(first: str, names: list[str]) -> tuple[str, ...]:
    """Put a method first: asv's page opens a plot with the first values of each parameter."""
    return tuple(sorted(names, key=lambda name: name != first))


METHODS = opens_with("scaled_adamw", [PLAIN, *_methods()])
RANKS = (16, 4, 64)  # the first for the same reason: at 16 every backend takes part
LR = 1e-4
"""Small enough that the factors are after many steps much as they were."""

_SMOLLM2 = [(576, 576), (192, 576), (192, 576), (576, 576), (1536, 576), (1536, 576), (576, 1536)]


def shapes(name: str) -> list[tuple[int, int]]:
    """(m, n) of the weights behind a name such as "4 of 1024x1024"."""
    if name == "SmolLM2-135M layer":  # q, k, v, o, gate, up, down: four shapes
        return _SMOLLM2
    count, _, size = name.partition(" of ")
    m, n = map(int, size.split("x"))
    return [(m, n)] * int(count)


def titled(title: str) -> Callable[[Any], Any]:
    """Name a benchmark for asv's pages, which look for that on the function only."""

    def mark(function: Any) -> Any:
        function.pretty_name = title
        return function

    return mark


def skip(reason: str) -> Any:
    """Leave this set of parameters blank."""
    raise NotImplementedError(reason)


def load_backend(backend: str) -> Any:
    """The rlora backend of a name such as "numpy" or "torch:cuda"."""
    try:
        return importlib.import_module("rlora.backends").get(backend.partition(":")[0])
    except (ImportError, AttributeError) as error:  # BackendError is an ImportError
        return skip(f"{backend}: {error}")


def attribute(module: str, name: str) -> Any:
    """``module.name``, or a skip where the commit has none."""
    try:
        return getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError) as error:
        return skip(str(error))


def arrays(backend: str, rank: int, shape: str) -> tuple[list[Any], list[Any]]:
    """Factors of full rank, A ~ N(0, 1/n) and B ~ N(0, 1e-4), and gradients ~ N(0, 1e-4)."""
    rng = np.random.default_rng(0)
    on, (_, _, device) = load_backend(backend), backend.partition(":")
    factors = attribute("rlora", "Factors")

    def normal(scale: float, *size: int) -> Any:
        x = np.float32(scale) * rng.standard_normal(size, np.float32)
        try:
            return on.asarray(x, "float32", device or None)
        except (RuntimeError, ValueError) as error:
            return skip(f"{backend}: {error}")

    sizes = shapes(shape)
    pairs = [factors(normal(n**-0.5, rank, n), normal(1e-2, m, rank)) for m, n in sizes]
    grads = [factors(normal(1e-2, rank, n), normal(1e-2, m, rank)) for m, n in sizes]
    return pairs, grads


class Pure:
    """A pure step ``(params, grads, state) -> (params, state)``, compiled where that exists."""

    def __init__(self, backend: str, rank: int, shape: str, init: Any, step: Any) -> None:
        self._backend = load_backend(backend)
        self._params, self._grads = arrays(backend, rank, shape)
        self.state = init(self._params)
        self._step = self._backend.compile(step)

    def __call__(self) -> None:
        self._params, self.state = self._step(self._params, self._grads, self.state)
        self._backend.synchronize(*leaves(self._params), *leaves(self.state))

    def state_bytes(self) -> int:
        return sum(math.prod(x.shape) * x.dtype.itemsize for x in leaves(self.state))


class Shell:
    """A torch optimizer over a module with nothing but LoRA pairs under PEFT's names."""

    def __init__(self, backend: str, rank: int, shape: str, make: Callable[[Any], Any]) -> None:
        import torch

        torch.set_num_threads(1)
        self._backend = load_backend(backend)
        self._parameters, self._model = [], torch.nn.Module()
        for i, (pair, grad) in enumerate(zip(*arrays(backend, rank, shape), strict=True)):
            layer = torch.nn.Module()
            for name, x, g in zip(("lora_A", "lora_B"), pair, grad, strict=True):
                holder = torch.nn.Module()
                holder.weight = torch.nn.Parameter(x.clone())
                holder.weight.grad = g.clone()
                layer.add_module(name, torch.nn.ModuleDict({"default": holder}))
                self._parameters.append(holder.weight)
            self._model.add_module(f"layer{i}", layer)
        self._optimizer = make(self._model)

    def __call__(self) -> None:
        self._optimizer.step()
        self._backend.synchronize(*self._parameters)

    def state_bytes(self) -> int:
        self()  # torch makes the state in the first step
        tensors = [x for state in self._optimizer.state.values() for x in state.values()]
        return sum(x.nbytes for x in tensors if hasattr(x, "nbytes"))


Step = Pure | Shell


def leaves(tree: Any) -> list[Any]:
    """All arrays of nested tuples, lists and dicts."""
    if isinstance(tree, dict):
        tree = list(tree.values())
    if isinstance(tree, (tuple, list)):
        return [x for child in tree for x in leaves(child)]
    return [] if tree is None else [tree]


def build(backend: str, method: str, rank: int, shape: str) -> Step:
    """An optimizer with its own parameters, ready to step."""
    if backend.startswith("torch"):
        return Shell(backend, rank, shape, _torch(method))
    if method == PLAIN and backend == "jax":
        return _optax(backend, rank, shape)
    method_ = _plain() if method == PLAIN else attribute("rlora.methods", method)()
    step = attribute("rlora", "step")
    return Pure(backend, rank, shape, method_.init, lambda p, g, s: step(method_, p, g, s, LR))


def _plain() -> Any:
    adam = attribute("rlora.core.moments", "scale_by_adam")()
    decay = attribute("rlora.core.decay", "add_decayed_weights")(0.01)
    return attribute("rlora", "chain")(adam, decay)


def _optax(backend: str, rank: int, shape: str) -> Step:
    adamw = attribute("optax", "adamw")(LR, weight_decay=0.01)
    apply = attribute("optax", "apply_updates")

    def step(params: Any, grads: Any, state: Any) -> tuple[Any, Any]:
        updates, state = adamw.update(grads, state, params)
        return apply(params, updates), state

    return Pure(backend, rank, shape, adamw.init, step)


def _torch(method: str) -> Callable[[Any], Any]:
    if method == PLAIN:
        adamw = attribute("torch.optim", "AdamW")
        return lambda model: adamw(model.parameters(), lr=LR, fused=True)
    names = attribute("rlora.torch", "__all__")
    named = [name for name in names if name.lower() == method.replace("_", "")]
    kind = attribute("rlora.torch", named[0]) if named else skip(f"no torch class of {method}")
    fused = {"fused": True} if "fused" in inspect.signature(kind).parameters else {}
    return lambda model: kind(model, lr=LR, **fused)


def warm(step: Step) -> Step:
    """The optimizer after the steps that compile and lay out memory."""
    for _ in range(3):
        step()
    return step


class Suite:
    """The base class: what a benchmark is parametrised by, and how long asv may take over it.

    asv sets up before every sample. Here that prepares, compiles and warms up once.
    """

    version = "1"  # to be raised when a benchmark's meaning changes, and only then
    timeout = 60
    rounds = 1
    repeat = (5, 20, 0.3)
    warmup_time = 0.0
    param_names = ("backend", "method", "rank", "shape")
    params = (BACKENDS, METHODS, RANKS, ("4 of 1024x1024",))
    _ready: tuple[Any, ...] | None = None

    def setup(self, *params: Any) -> None:
        if self._ready != params:
            self.prepare(*params)
            self._ready = params

    def prepare(self, *params: Any) -> None:
        """Make what the benchmark works on, ready to be measured, or skip."""
        raise NotImplementedError

"""PyTorch's contenders: classes of `rlora.torch`, torch's own optimizers, PEFT's wrapper."""

import importlib
import inspect
from collections.abc import Callable
from typing import Any, Final

from rlora import BackendError

from . import memory
from .contenders import LR, Arena, Contender, Entry, baseline_of
from .problem import Problem

EXTRAS: Final = ("torch.adamw", "peft")
"""What `--against` takes."""

PLAIN: Final = {"adamw": "AdamW", "sgd": "SGD"}


def torch_class(method: str) -> Any:
    """Find the class of `rlora.torch` for a method by its name; None if it has none."""
    module = importlib.import_module("rlora.torch")
    for name in module.__all__:
        if name.lower() == method.replace("_", ""):
            return getattr(module, name)
    return None


class TorchArena:
    """Gradients that all torch contenders share, and a copy from which they are written anew.

    PEFT's wrapper overwrites the gradients it is given; a real backward pass would write them
    again before the next step. So that all have the same, they are rewritten before every step.
    """

    def __init__(self, problem: Problem, arena: Arena) -> None:
        self.arena, self.problem = arena, problem
        arrays = [x for pair in arena.factors(problem.grads) for x in pair]
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
                holder.weight = torch.nn.Parameter(self.arena.array(x).clone())
                holder.weight.grad = next(fresh)
                layer.add_module(name, torch.nn.ModuleDict({"default": holder}))
            model.add_module(f"layer{i}", layer)
        return model

    def refresh(self) -> None:
        """Write the gradients anew."""
        for grad, source in zip(self.grads, self.source, strict=True):
            grad.copy_(source)
        self.arena.backend.synchronize(*self.grads)


def torch_entries(
    problem: Problem, arena: Arena, plains: list[str], methods: list[str], extras: list[str]
) -> list[Entry]:
    """Plain torch optimizers, classes of `rlora.torch`, and what `--against` names."""
    shared = TorchArena(problem, arena)

    def entry(name: str, ratio_to: str, make: Callable[[Any], Any]) -> Entry:
        return Entry(name, ratio_to, lambda: OfTorch(name, ratio_to, make, shared))

    return [
        *(entry(name, name, _plain(name)) for name in plains),
        *(entry(name, baseline_of(name), _class(torch_class(name))) for name in methods),
        *(entry(name, "adamw", _extra(name)) for name in extras),
    ]


def riemannian() -> Any:
    """Find PEFT's function, or raise a BackendError that says which PEFT has it."""
    try:
        return importlib.import_module("peft.optimizers").create_riemannian_optimizer
    except (ImportError, AttributeError) as error:
        msg = f"--against peft needs a newer PEFT (pip install -U peft): {error}"
        raise BackendError(msg) from error


def _plain(name: str) -> Callable[[Any], Any]:
    kind = getattr(importlib.import_module("torch.optim"), PLAIN[name])
    return lambda model: kind(model.parameters(), lr=LR, fused=True)


def _class(kind: Any) -> Callable[[Any], Any]:
    fused = {"fused": True} if "fused" in inspect.signature(kind).parameters else {}
    return lambda model: kind(model, lr=LR, **fused)


def _extra(name: str) -> Callable[[Any], Any]:
    if name == "torch.adamw":
        return _plain("adamw")
    AdamW = importlib.import_module("torch.optim").AdamW
    create = riemannian()
    return lambda model: create(model, AdamW, lr=LR, fused=True)


class OfTorch(Contender):
    """A torch optimizer over a model of its own."""

    def __init__(
        self, name: str, ratio_to: str, make: Callable[[Any], Any], shared: TorchArena
    ) -> None:
        self.name, self.ratio_to, self.backend = name, ratio_to, "torch"
        self.device = str(shared.grads[0].device)
        self._shared, self._library = shared, shared.arena.backend
        # The model stays alive with its optimizer, as in training.
        self._model = shared.model()
        self._optimizer = make(self._model)

    def refresh(self) -> None:
        self._shared.refresh()

    def step(self) -> None:
        self._optimizer.step()
        self._library.synchronize(*self._shared.grads)

    def state_bytes(self) -> int:
        tensors = [x for state in self._optimizer.state.values() for x in state.values()]
        return sum(x.nbytes for x in tensors if hasattr(x, "nbytes"))

    def peak_temporary_bytes(self) -> int | None:
        kind = self.device.partition(":")[0]
        meter = {"cpu": memory.of_torch_cpu, "cuda": memory.of_torch_cuda}.get(kind)
        if meter is None:
            return None
        held, _ = meter(self.step)
        self.refresh()
        _, peak = meter(self.step)
        # Memory that an optimizer keeps between steps without its being state is no less taken.
        return peak + max(0, held - self.state_bytes())

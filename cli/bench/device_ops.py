"""Operations and waits of a step on a device, seen without one: by torch's fake CUDA tensors.

They have shapes and no numbers. The step takes the same way through the code as on a device, each
operation can be counted, and to read a number back is an error.
"""

import importlib
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Final

import click

from .cases import LR, split_variant
from .memory import watching
from .targets import Check, make_check
from .torch_cases import torch_class

FEW: Final = 2
MANY: Final = 8
"""Layers of the two models whose steps are compared."""

SHAPES: Final = ((64, 48), (48, 96))
RANK: Final = 8

WAITING: Final = frozenset(
    ("_linalg_eigh", "_linalg_svd", "linalg_eig", "linalg_lstsq", "_linalg_check_errors")
)
"""Operations that, by torch's manual, on CUDA hold up the host until the device is done."""

COPYING: Final = frozenset(("copy_", "_to_copy", "_foreach_copy_"))
"""These wait where they go from one device to another."""


@dataclass
class Seen:
    """Count of operations, views apart, and names of those that waited, in one step."""

    operations: int = 0
    waits: list[str] = field(default_factory=list)
    finished: bool = False


def device_op_checks(method: str) -> list[Check]:
    """Two targets for a method: its operations do not grow with the layers, and none waits."""
    try:
        few, many = (seen_in_a_step(optimizer_of(method), layers) for layers in (FEW, MANY))
    except (RuntimeError, AssertionError, ImportError) as error:
        reason = str(error).partition("\n")[0]
        click.echo(f"{method}: no step on a device that is not there: {reason}", err=True)
        return []
    name, where = f"torch {method}", f"{FEW} and {MANY} layers"
    waits = make_check(f"{name}, waits for the device", where, RANK, "exactly", 0, len(few.waits))
    if not (few.finished and many.finished):
        return [waits]
    what, growth = f"{name}, growth of device operations", many.operations / few.operations
    return [make_check(what, where, RANK, "exactly", 1.0, growth), waits]


def optimizer_of(method: str) -> Callable[[Any], Any]:
    """Return what makes a method's class over a model, with its plain part in one kernel."""
    name, options = split_variant(method)
    kind = torch_class(name)
    # Of torch's fused SGD there is no fake version.
    options["foreach" if name.endswith("sgd") else "fused"] = True
    return lambda model: kind(model, lr=LR, **options)


def seen_in_a_step(make: Callable[[Any], Any], layers: int) -> Seen:
    """Watch the second step of an optimizer over so many layers of each shape.

    A step that reads a number back is watched until there.
    """
    fake = importlib.import_module("torch._subclasses.fake_tensor")
    read_back = (fake.DataDependentOutputException, fake.DynamicOutputShapeException)
    seen = Seen()
    with warnings.catch_warnings(), fake.FakeTensorMode(), without_guards():
        warnings.simplefilter("ignore")  # fake tensors have no address, and say so
        optimizer = make(_model(layers))
        try:
            optimizer.step()
            with _watching(seen):
                optimizer.step()
            seen.finished = True
        except read_back as error:
            seen.waits.append(str(error.func))
    return seen


def _model(layers: int) -> Any:
    torch = importlib.import_module("torch")
    model = torch.nn.Module()
    for i in range(layers):
        for j, (m, n) in enumerate(SHAPES):
            layer = torch.nn.Module()
            for name, shape in (("lora_A", (RANK, n)), ("lora_B", (m, RANK))):
                p = torch.nn.Parameter(torch.empty(shape, device="cuda"))
                p.grad = torch.empty_like(p)
                layer.register_parameter(name, p)
            model.add_module(f"layer{i}_{j}", layer)
    return model


def _watching(seen: Seen) -> Any:
    leaves = importlib.import_module("torch.utils._pytree").tree_leaves

    def add(op: Any, args: Any, result: Any) -> None:
        if op.namespace == "aten" and not op.is_view:
            name = op.overloadpacket.__name__
            seen.operations += 1
            devices = {x.device for x in leaves((args, result)) if hasattr(x, "device")}
            if name in WAITING or (name in COPYING and len(devices) > 1):
                seen.waits.append(name)

    return watching(add)


@contextmanager
def without_guards() -> Iterator[None]:
    """Do without the guard of the current device in Python's operators.

    Where torch is built without CUDA there is none, and `x[...]` and `~x` would fail.
    """
    torch = importlib.import_module("torch")
    mode = importlib.import_module("torch.overrides").TorchFunctionMode
    instead = {torch.Tensor.__getitem__: _item, torch.Tensor.__invert__: torch.bitwise_not}

    def call(_: Any, f: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        there = f in instead and args[0].device.type != "cpu"
        return (instead[f] if there else f)(*args, **(kwargs or {}))

    with type("Operators", (mode,), {"__torch_function__": call})():
        yield


def _item(x: Any, key: Any) -> Any:
    """``x[key]`` for numbers, slices, None and an ellipsis."""
    keys = key if isinstance(key, tuple) else (key,)
    left, axis = sum(k is not None and k is not ... for k in keys), 0
    cut = importlib.import_module("torch").ops.aten.slice
    for k in keys:
        if k is ...:
            axis = x.ndim - left
        elif k is None:
            x, axis = x.unsqueeze(axis), axis + 1
        elif isinstance(k, slice):
            x, axis, left = cut(x, axis, k.start, k.stop, k.step or 1), axis + 1, left - 1
        else:
            x, left = x.select(axis, k), left - 1
    return x

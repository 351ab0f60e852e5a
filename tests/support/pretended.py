"""A CUDA device that is not there: tensors in the CPU's memory that say they lie on it.

A step takes the way that it takes on a device, and with numbers, which torch's fake tensors have
not: so what it computes there can be compared with what it computes on a CPU.
"""

from contextlib import contextmanager

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

from rlora.cli.bench.device_ops import COPYING, WAITING, without_guards

DEVICE = torch.device("cuda:0")


class Pretended(torch.Tensor):
    """A tensor that says it is on `DEVICE`; `held` is what it stands for."""

    @staticmethod
    def __new__(cls, held):
        return torch.Tensor._make_wrapper_subclass(
            cls, held.shape, strides=held.stride(), storage_offset=held.storage_offset(),
            dtype=held.dtype, device=DEVICE,
        )  # fmt: skip

    def __init__(self, held):
        self.held = held

    def __repr__(self):
        return f"Pretended({self.held})"

    @classmethod
    def __torch_dispatch__(cls, operation, types, args=(), kwargs=None):
        return run(operation, args, kwargs or {})[0]


def is_device(device):
    return device is not None and torch.device(device).type == DEVICE.type


def run(operation, args, kwargs):
    """The result of an operation, and whether the host and the device wait for each other."""
    tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
    given = [x for x in tensors if isinstance(x, Pretended)]
    name, there = operation.overloadpacket.__name__, bool(given)
    hosted = any(not isinstance(x, Pretended) and x.ndim for x in tensors)
    if given and hosted and name not in COPYING:
        msg = f"{name} takes tensors of the host and of the device"
        raise RuntimeError(msg)
    if kwargs.get("device") is not None:
        there = is_device(kwargs["device"])
        kwargs = {**kwargs, "device": torch.device("cpu")}
    args, kwargs = tree_map_only(Pretended, lambda x: x.held, (args, kwargs))
    result = operation(*args, **kwargs)
    leaves = [x for x in tree_leaves(result) if x is not None]
    read = bool(given) and not all(there and isinstance(x, torch.Tensor) for x in leaves)
    across = name in COPYING and {isinstance(x, Pretended) for x in tensors} | {there} == {0, 1}
    if there:
        known = {id(x.held): x for x in given}  # for what was written in place
        new = lambda x: known[id(x)] if id(x) in known else Pretended(x)  # noqa: E731
        result = tree_map_only(torch.Tensor, new, result)
    return result, read or across or (bool(given) and name in WAITING)


class Operations(TorchDispatchMode):
    """Runs every operation, and names in `waits` those that hold up the host."""

    _mode_key = torch._C._TorchDispatchModeKey.FAKE  # else torch would look for the device

    def __init__(self):
        super().__init__()
        self.waits = []

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        result, waits = run(operation, args, kwargs or {})
        if waits:
            self.waits.append(operation.overloadpacket.__name__)
        return result


NUMBERS = {
    torch.Tensor.item: lambda x: x,
    torch.Tensor.__bool__: bool,
    torch.Tensor.__float__: float,
    torch.Tensor.__int__: int,
    torch.Tensor.__index__: int,
}


class Functions(TorchFunctionMode):
    """Python functions of torch that make or read a tensor without an operation of their own."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if function in (torch.asarray, torch.tensor) and is_device(kwargs.get("device")):
            return function(*args, **{**kwargs, "device": "cpu"}).to(DEVICE)
        if function in NUMBERS and isinstance(args[0], Pretended):
            return NUMBERS[function](torch.ops.aten._local_scalar_dense(args[0]))
        return function(*args, **kwargs)


@contextmanager
def pretended_device():
    """A context with a device; gives the names of operations that hold up the host."""
    with Operations() as operations, without_guards(), Functions():
        yield operations.waits

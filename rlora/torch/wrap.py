"""The same for any torch optimizer class."""

import functools
import inspect
from typing import Any

from torch.optim import Optimizer

from rlora.torch.optimizer import GramPreconditioned


@functools.cache
def precondition(optimizer: Any) -> type[Optimizer]:
    """The optimizer class that does the same on gradients preconditioned pair by pair.

    Parameters
    ----------
    optimizer : type
        Any subclass of torch's Optimizer whose step needs no closure.

    Returns
    -------
    type
        A subclass of it. Its constructor takes a model, ``named_parameters()``, groups with names,
        or tensors with ``pairs=[(A, B), ...]``, then the parent's arguments and ``damping``,
        ``damping_mode``, ``placement``, ``order``, ``compute_dtype`` and ``adapter`` as
        `ScaledAdamW` has them.

    Raises
    ------
    TypeError
        When it is no optimizer class.
    ValueError
        When its step needs a closure: it would evaluate the loss again within a step, on
        gradients that nobody preconditions.

    Examples
    --------
    >>> import torch, rlora.torch
    >>> layer = torch.nn.Module()
    >>> layer.lora_A = torch.nn.Parameter(torch.ones(4, 16))
    >>> layer.lora_B = torch.nn.Parameter(torch.zeros(32, 4))
    >>> optimizer = rlora.torch.precondition(torch.optim.NAdam)(layer, lr=1e-3)
    >>> isinstance(optimizer, torch.optim.NAdam)
    True
    """
    if not (isinstance(optimizer, type) and issubclass(optimizer, Optimizer)):
        msg = f"expected a subclass of torch.optim.Optimizer, got {optimizer!r}"
        raise TypeError(msg)
    closure = inspect.signature(optimizer.step).parameters.get("closure")
    if closure is not None and closure.default is inspect.Parameter.empty:
        msg = (
            f"{optimizer.__name__} evaluates the loss again within its step, on gradients that "
            f"nobody preconditions; use an optimizer whose closure is optional, such as AdamW"
        )
        raise ValueError(msg)
    name = f"Preconditioned{optimizer.__name__}"
    doc = f"{optimizer.__name__} on gradients preconditioned pair by pair."
    return type(name, (GramPreconditioned, optimizer), {"__doc__": doc, "__reduce__": _reduce})


def _reduce(self: Any) -> tuple[Any, ...]:
    # The class was made here, so a pickle must make it again.
    parent = type(self).__bases__[1]
    return _revive, (parent,), self.__getstate__()


def _revive(parent: Any) -> Optimizer:
    kind = precondition(parent)
    return kind.__new__(kind)

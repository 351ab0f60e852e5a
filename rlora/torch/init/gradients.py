"""The full gradient dL/dW of frozen linear layers, from what goes in and what comes back.

A linear layer sees X (t, n) and gets dY (t, m), so ``G = dYᵀ X`` (m, n), whatever W is stored in.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, nn

from rlora.core import errors
from rlora.torch.init.rows import Rows
from rlora.torch.pairing.layers import Target, linear_target

T = TypeVar("T")
Loss = Callable[[Any, Any], Tensor]


def full_gradients(
    model: nn.Module,
    modules: Iterable[str],
    batches: Iterable[Any],
    loss: Loss,
    consume: Callable[[str, Tensor], T],
    *,
    layers_per_pass: int | None = None,
    offload: bool = False,
) -> dict[str, T]:
    """Hand the full gradient of each chosen linear layer to a function, one layer at a time.

    ``G = dL/dW``, (m, n), the mean over the batches, in at least float32. The weights may be
    frozen, in half precision or quantised: they are not read, and no ``.grad`` is written.

    Parameters
    ----------
    model : nn.Module
        Runs in the mode it is in: `eval()` gives a gradient without dropout.
    modules : iterable of str
        Names of nn.Linear modules, or of transformers' Conv1D, in ``model.named_modules()``.
    batches : iterable
        Arguments of `loss`, one after another. With several passes it must restart for each, as
        a list or a DataLoader does.
    loss : callable
        ``loss(model, batch)`` is a scalar tensor.
    consume : callable
        ``consume(name, G)``. G is freed when it returns, before the next is formed; what it
        returns is kept.
    layers_per_pass : int, optional
        Number of layers that share one pass over the batches; None is all of them.
    offload : bool
        Keep X and dY in host memory.

    Returns
    -------
    dict of str to object
        Results of `consume`, by name.

    Raises
    ------
    PairingError
        For a name that is no linear layer, or a layer that no gradient reaches.
    TypeError
        When `batches` is one tensor or one dict, or no iterable; when `loss` is no function.
    RuntimeError
        Under ``torch.inference_mode()``.
    ShapeError, NamespaceError, NumericsError, ShardingError, ValueError
        When the loss is no finite scalar tensor or a gradient is not finite; for a model inside
        DataParallel, DDP or torch.compile; for no batches, or batches that can be read only once
        where several passes are asked for.

    Notes
    -----
    At any time at most one G exists. Beside it X and dY of the layers of a pass are kept, in their
    own dtype: t (m + n) numbers for each layer, t the tokens of all batches; layers with a common
    input share it unless it is offloaded. More than ``t = m n / (m + n)`` tokens take more than
    the gradients of all layers would: then lower `layers_per_pass`. With 1 the gradient is summed
    as it comes, nothing else is kept, and the time is a forward and backward pass for each layer.

    Layers used several times and gradient checkpointing are right; with ``use_reentrant=True`` the
    checkpoint's input must require a gradient, as in training. Parameters are frozen during a
    pass, and then as before, as are running statistics and torch's random state.

    Examples
    --------
    >>> import torch
    >>> from rlora.torch.init.gradients import full_gradients
    >>> model = torch.nn.Sequential(torch.nn.Linear(3, 2, bias=False)).requires_grad_(False)
    >>> batches = [torch.ones(4, 3), torch.ones(4, 3)]
    >>> loss = lambda model, x: model(x).sum(1).mean()
    >>> full_gradients(model, ["0"], batches, loss, lambda name, G: G.tolist())
    {'0': [[1.0, 1.0, 1.0], [1.0, 1.0, 1.0]]}
    """
    known = dict(model.named_modules())
    targets = {name: linear_target(name, known.get(name)) for name in modules}
    found = capture(model, targets, batches, loss, consume, layers_per_pass, offload)
    if missing := sorted(targets.keys() - found.keys()):
        msg = f"the loss never calls {', '.join(missing)}; leave such layers out"
        raise errors.PairingError(msg)
    return found


def capture(
    model: nn.Module,
    targets: Mapping[str, Target],
    batches: Iterable[Any],
    loss: Loss,
    consume: Callable[[str, Tensor], T],
    layers_per_pass: int | None = None,
    offload: bool = False,
    kind: type[Rows] = Rows,
) -> dict[str, T]:
    """As `full_gradients`, of targets, or of what another kind of `Rows` makes of them.

    Layers that the loss never calls are left out.
    """
    _check_bare(model)
    if isinstance(batches, (Tensor, Mapping)):
        came = f"one {type(batches).__name__}"
        msg = f"batches must be an iterable of batches, got {came}; for one batch pass [batch]"
        raise TypeError(msg)
    is_iterable = hasattr(batches, "__iter__") or hasattr(batches, "__getitem__")
    if not is_iterable or not callable(loss):
        came = f"{type(batches).__name__} and {type(loss).__name__}"
        msg = f"expected an iterable of batches, then a function loss(model, batch), got {came}"
        raise TypeError(msg)
    if torch.is_inference_mode_enabled():
        msg = "nothing can be recorded under torch.inference_mode(); call this outside of it"
        raise RuntimeError(msg)
    names = list(targets)
    size = len(names) if layers_per_pass is None else layers_per_pass
    if isinstance(size, bool) or not isinstance(size, int) or (size < 1 and names):
        msg = f"layers_per_pass must be None or a whole number of at least 1, got {size!r}"
        raise ValueError(msg)
    if size < len(names) and iter(batches) is batches:
        msg = (
            f"{len(names)} layers with layers_per_pass={size} need several passes over the "
            f"batches, but {type(batches).__name__} can be read once; pass a list"
        )
        raise ValueError(msg)
    results: dict[str, T] = {}
    for start in range(0, len(names), max(size, 1)):
        group = [
            kind(name, targets[name], offload=offload, sum_at_once=size == 1)
            for name in names[start : start + size]
        ]
        count = _pass(model, group, batches, loss)
        for rows in group:
            if rows.called:
                results[rows.name] = consume(rows.name, rows.result(count))
    return results


def _pass(model: nn.Module, group: Sequence[Rows], batches: Iterable[Any], loss: Loss) -> int:
    """Run forward and backward over all batches with taps on a group of layers."""
    count = 0
    with _undisturbed(model):
        handles = [rows.tap() for rows in group]
        try:
            for batch in batches:
                value = loss(model, batch)
                _check_loss(value, count)
                # Without a graph no layer of this group took part.
                if value.requires_grad and group[0].backward:
                    cast("Any", value).backward()
                count += 1
                del value, batch
        finally:
            for handle in handles:
                handle.remove()
    if count == 0:
        msg = "got no batch to take the gradient of"
        raise ValueError(msg)
    return count


def _check_bare(model: nn.Module) -> None:
    parallel = isinstance(model, (nn.parallel.DistributedDataParallel, nn.DataParallel))
    if parallel or hasattr(model, "_orig_mod"):
        inside = ".module" if parallel else "._orig_mod"
        msg = f"no hooks work inside {type(model).__name__}; pass what is inside, its {inside}"
        raise errors.ShardingError(msg)


def _check_loss(value: Any, batch: int) -> None:
    if not isinstance(value, Tensor):
        msg = (
            f"loss(model, batch) must be a scalar tensor, got {type(value).__name__}; of what a "
            f"transformers model returns: model(**batch).loss"
        )
        raise errors.NamespaceError(msg)
    if value.numel() != 1 or not value.is_floating_point():
        msg = f"the loss must be a real scalar, got {value.dtype} of shape {tuple(value.shape)}"
        raise errors.ShapeError(msg)
    if not torch.isfinite(value):
        msg = f"the loss of batch {batch} is {value.item()}"
        raise errors.NumericsError(msg)


@contextmanager
def _undisturbed(model: nn.Module) -> Iterator[None]:
    """No parameter collects a gradient inside; statistics and random state are put back after.

    Frozen parameters, rather than ``autograd.grad``: reentrant checkpointing knows only backward.
    """
    parameters = list(model.parameters())
    trainable = [p for p in parameters if p.requires_grad]
    norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._NormBase)]
    buffers = [(buffer, buffer.clone()) for norm in norms for buffer in norm.buffers()]
    devices = sorted({p.device.index for p in parameters if p.device.type == "cuda"})
    with torch.random.fork_rng(devices), torch.enable_grad():
        try:
            for p in trainable:
                p.requires_grad_(False)
            yield
        finally:
            for p in trainable:
                p.requires_grad_(True)
            with torch.no_grad():
                for buffer, before in buffers:
                    buffer.copy_(before)

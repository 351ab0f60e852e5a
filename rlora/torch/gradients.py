"""The full gradient dL/dW of frozen linear layers, from what goes in and what comes back.

A linear layer sees X (t, n) and gets dY (t, m), so ``G = dYᵀ X`` (m, n), whatever W is stored in.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, nn

from rlora.core import errors
from rlora.core.dispatch import get_backend
from rlora.torch.layers import Target, linear_target

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
    >>> from rlora.torch.gradients import full_gradients
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
) -> dict[str, T]:
    """As `full_gradients`, of targets; layers that the loss never calls are left out."""
    _check_bare(model)
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
            _Rows(name, targets[name], offload=offload, sum_at_once=size == 1)
            for name in names[start : start + size]
        ]
        count = _pass(model, group, batches, loss)
        for rows in group:
            if rows.called:
                results[rows.name] = consume(rows.name, rows.gradient(count))
    return results


def _pass(model: nn.Module, group: Sequence["_Rows"], batches: Iterable[Any], loss: Loss) -> int:
    """Run forward and backward over all batches with taps on a group of layers."""
    count = 0
    with _undisturbed(model):
        handles = [rows.tap() for rows in group]
        try:
            for batch in batches:
                value = loss(model, batch)
                _check_loss(value, count)
                if value.requires_grad:  # otherwise no layer of this group took part
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


class _Rows:
    """Records of one layer: its inputs and output gradients, or the sum of their products."""

    def __init__(self, name: str, target: Target, *, offload: bool, sum_at_once: bool) -> None:
        self.name, self.target = name, target
        self.offload, self.sum_at_once = offload, sum_at_once
        self.called = self.reached = False
        self._kept: list[tuple[Tensor, Tensor, int]] = []
        self._sum: Tensor | None = None

    def tap(self) -> Any:
        """A forward hook through which the output's gradient comes back here."""

        def hook(module: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
            x = next((v for v in (*args, *kwargs.values()) if isinstance(v, Tensor)), None)
            self.called = True
            self._check(x, output)
            anchor = output.new_zeros((), requires_grad=True)  # frozen layers have no graph else
            return cast("Any", _Tap).apply(output, x, anchor, self)

        return self.target.module.register_forward_hook(hook, with_kwargs=True)

    def _check(self, x: Any, output: Any) -> None:
        m, n = self.target.shape
        came, went = (tuple(getattr(v, "shape", ())) for v in (x, output))
        if came[-1:] != (n,) or went != (*came[:-1], m):
            msg = f"{self.name} should map (.., {n}) to (.., {m}), but mapped {came} to {went}"
            raise errors.ShapeError(msg)

    def add(self, x: Tensor, dy: Tensor) -> None:
        self.reached = True
        x, dy = x.detach().reshape(-1, x.shape[-1]), dy.detach().reshape(-1, dy.shape[-1])
        if self.sum_at_once:
            self._sum = self._zeros(x, dy) if self._sum is None else self._sum
            self._accumulate(self._sum, x, dy)
            return
        if self.offload:
            x, dy = x.to("cpu", copy=True), dy.to("cpu", copy=True)
        self._kept.append((x, dy, x._version))

    def gradient(self, count: int) -> Tensor:
        """``G = 1/count Σ dYᵀ X``, (m, n); what it was made of is let go."""
        if not self.reached:
            msg = (
                f"no gradient reaches {self.name}: its output is detached from the loss, or under "
                f"no_grad, or in a checkpoint with use_reentrant=True whose input needs none (use "
                f"use_reentrant=False); or leave the layer out"
            )
            raise errors.PairingError(msg)
        G, self._sum = self._sum, None
        if G is None:
            G = self._zeros(*self._kept[0][:2])
            while self._kept:
                x, dy, version = self._kept.pop(0)
                if x._version != version:
                    msg = (
                        f"an input of {self.name} was overwritten after its batch; give each "
                        f"batch memory of its own, or set offload=True"
                    )
                    raise errors.NumericsError(msg)
                self._accumulate(G, x, dy)
        G.div_(count)
        if not all(map(torch.isfinite, torch.aminmax(G))):  # isfinite(G) would be a second matrix
            msg = f"the gradient of {self.name} is not finite; run the model in a wider dtype"
            raise errors.NumericsError(msg)
        return G

    def _zeros(self, x: Tensor, dy: Tensor) -> Tensor:
        dtype = torch.promote_types(torch.promote_types(x.dtype, dy.dtype), torch.float32)
        return torch.zeros(self.target.shape, dtype=dtype, device=self.target.device)

    @torch.no_grad()
    def _accumulate(self, G: Tensor, x: Tensor, dy: Tensor) -> None:
        with get_backend(G).exact(G):
            G.addmm_(dy.to(G.device, G.dtype).mT, x.to(G.device, G.dtype))


class _Tap(torch.autograd.Function):
    """The identity; its backward hands X and dY on.

    X is saved as autograd saves things, so a checkpoint that recomputes it does not count it twice.
    """

    @staticmethod
    def forward(ctx: Any, output: Tensor, x: Tensor, anchor: Tensor, rows: _Rows) -> Tensor:
        ctx.rows = rows
        ctx.save_for_backward(x)
        return output.clone()  # not a view: what follows may write into it

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        (x,), (dy,) = ctx.saved_tensors, grads
        ctx.rows.add(x, dy)
        return dy, None, dy.new_zeros(()), None

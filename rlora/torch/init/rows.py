"""Records of what goes into one linear layer and of the gradient that comes back."""

from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn

from rlora.core import errors
from rlora.core.dispatch import get_backend
from rlora.torch.pairing.layers import Target


class Rows:
    """Records of one layer: its inputs and output gradients, or the sum of their products."""

    backward: ClassVar[bool] = True
    """True if gradients are needed."""

    def __init__(self, name: str, target: Target, *, offload: bool, sum_at_once: bool) -> None:
        self.name, self.target = name, target
        self.offload, self.sum_at_once = offload, sum_at_once
        self.called = self.reached = False
        self._kept: list[tuple[Tensor, Tensor, int]] = []
        self._inputs: list[tuple[Tensor, int]] = []
        self._sum: Tensor | None = None

    def tap(self) -> Any:
        """A forward hook through which the output's gradient comes back here."""

        def hook(module: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
            x = next((v for v in (*args, *kwargs.values()) if isinstance(v, Tensor)), None)
            self.called = True
            self._check(x, output)
            return self.passed(x, output)

        return self.target.module.register_forward_hook(hook, with_kwargs=True, prepend=True)

    def passed(self, x: Any, output: Any) -> Any:
        """Return what takes the output's place, or None where the output itself may go on."""
        anchor = output.new_zeros((), requires_grad=True)  # frozen layers have no graph else
        return cast("Any", _Tap).apply(output, x, anchor, self)

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

    def result(self, count: int) -> Tensor:
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
                self.unwritten(x, version)
                self._accumulate(G, x, dy)
        G.div_(count)
        if not all(map(torch.isfinite, torch.aminmax(G))):  # isfinite(G) would be a second matrix
            msg = f"the gradient of {self.name} is not finite; run the model in a wider dtype"
            raise errors.NumericsError(msg)
        return G

    def unwritten(self, x: Tensor, version: int) -> None:
        """Raise where an input is no longer what the layer saw."""
        if x._version != version:
            msg = (
                f"an input of {self.name} was overwritten since, by the model or by the next "
                f"batch; give each batch memory of its own, or set offload=True"
            )
            raise errors.NumericsError(msg)

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
    def forward(ctx: Any, output: Tensor, x: Tensor, anchor: Tensor, rows: Rows) -> Tensor:
        ctx.rows = rows
        ctx.save_for_backward(x)
        return output.clone()  # not a view: what follows may write into it

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        (x,), (dy,) = ctx.saved_tensors, grads
        ctx.rows.add(x, dy)
        return dy, None, dy.new_zeros(()), None


class InputRows(Rows):
    """Records of the inputs of one layer alone; nothing is asked of its gradient."""

    backward = False

    def passed(self, x: Any, output: Any) -> None:
        x = x.detach().reshape(-1, x.shape[-1])
        x = x.to("cpu", copy=True) if self.offload else x
        self._inputs.append((x, x._version))

    def result(self, count: int) -> Tensor:
        """X of all batches, (t, n); what it was made of is let go."""
        kept, self._inputs = self._inputs, []
        for x, version in kept:
            self.unwritten(x, version)
        return torch.cat([x for x, _ in kept])

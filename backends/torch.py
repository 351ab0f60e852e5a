"""PyTorch: few kernels for many layers, factorisations that neither raise nor synchronise."""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from rlora.core.backend import ROUNDING, Backend, Workspace
from rlora.core.factors import Array

STACK_BELOW = 65536
"""On a CPU, tensors smaller than this many elements are stacked and multiplied in one batch:
copying them costs less than a call for each. Larger ones cost more to copy than to multiply."""


class TorchBackend(Backend):
    """The verbs that torch does faster than the generic class."""

    def gram_rows(
        self, tall: Sequence[Array], dtype: Any, workspace: Workspace | None = None
    ) -> Array:
        return self._gram(tall, dtype, workspace, lambda A: (A, A.mT), "rows")

    def gram_columns(
        self, tall: Sequence[Array], dtype: Any, workspace: Workspace | None = None
    ) -> Array:
        return self._gram(tall, dtype, workspace, lambda B: (B.mT, B), "columns")

    def apply_left(
        self, P: Sequence[Array], tall: Sequence[Array], workspace: Workspace | None = None
    ) -> list[Array]:
        return self._apply(P, tall, workspace, lambda P, G: (P, G), "left")

    def apply_right(
        self, tall: Sequence[Array], P: Sequence[Array], workspace: Workspace | None = None
    ) -> list[Array]:
        return self._apply(P, tall, workspace, lambda P, G: (G, P), "right")

    def _gram(
        self,
        tall: Sequence[Array],
        dtype: Any,
        workspace: Workspace | None,
        sides: Callable[[Array], tuple[Array, Array]],
        slot: str,
    ) -> Array:
        """Products with the transpose, written bucket by bucket into one stack (K, r, r)."""
        order, start = [], 0
        r = sides(tall[0])[0].shape[-2]
        layers = [math.prod(F.shape[:-2]) for F in tall]
        stack = _take(workspace, ("gram", slot), (sum(layers), r, r), dtype, tall[0].device)
        for members in _buckets(tall, workspace, slot).values():
            stop = start + sum(layers[i] for i in members)
            out = stack[start:stop]
            if _stacks(tall[members[0]]):
                F = _stack([tall[i] for i in members], dtype, workspace)
                if slot == "columns" and (fold := _fold(F)) > 1:
                    # (k, m, r) as (k, m/f, f r): its Gram has those of f slices on its diagonal.
                    F = F.view(F.shape[0], -1, fold * r)
                    blocks = torch.bmm(F.mT, F).view(-1, fold, r, fold, r)
                    torch.sum(blocks.diagonal(dim1=1, dim2=3), -1, out=out)
                else:
                    torch.bmm(*sides(F), out=out)
            else:
                for i, S in zip(members, out.split([layers[i] for i in members]), strict=True):
                    torch.matmul(*sides(tall[i].to(dtype)), out=S.view(*tall[i].shape[:-2], r, r))
            order += members
            start = stop
        return self._in_order(stack, order, layers)

    @staticmethod
    def _in_order(stack: Array, order: list[int], layers: list[int]) -> Array:
        if order == sorted(order):
            return stack
        pieces = dict(zip(order, stack.split([layers[i] for i in order]), strict=True))
        return torch.cat([pieces[i] for i in range(len(order))])

    def _apply(
        self,
        P: Sequence[Array],
        tall: Sequence[Array],
        workspace: Workspace | None,
        sides: Callable[[Array, Array], tuple[Array, Array]],
        slot: str,
    ) -> list[Array]:
        result: list[Array] = list(tall)
        for key, members in _buckets(tall, workspace, slot).items():
            shape, device = key[0], tall[members[0]].device
            dtype = P[members[0]].dtype
            if _stacks(tall[members[0]]):
                G = _stack([tall[i] for i in members], dtype, workspace)
                P_k = torch.stack([P[i] for i in members]).reshape(-1, *P[members[0]].shape[-2:])
                out = _take(workspace, ("out", slot, key), G.shape, dtype, device)
                if slot == "right" and (fold := _fold(G)) > 1:
                    G, P_k = G.view(G.shape[0], -1, fold * G.shape[-1]), _block_diagonal(P_k, fold)
                torch.bmm(*sides(P_k, G), out=out.view(G.shape))
                outs = _views(workspace, ("views", slot, key), out, len(members), shape)
            else:
                outs = [
                    torch.matmul(
                        *sides(P[i], tall[i].to(dtype)),
                        out=_take(workspace, ("out", slot, key, k), shape, dtype, device),
                    )
                    for k, i in enumerate(members)
                ]
            for i, out in zip(members, outs, strict=True):
                result[i] = out
        return result

    def damped_power(
        self, S: Array, exponent: float, damping: float = 0.0, *, relative: bool = True
    ) -> Array:
        """As the generic one, in fewer kernels: for small adapters they are what a step costs."""
        r, info = S.shape[-1], torch.finfo(S.dtype)
        rounding = ROUNDING * r * info.eps
        mean = S.diagonal(dim1=-2, dim2=-1).mean(-1).view(-1, 1, 1)  # (K, 1, 1)
        shift = mean * max(damping, rounding) if relative else (mean * rounding).clamp_(min=damping)
        scale = mean + shift
        live = (scale > info.smallest_normal / rounding) & (scale < info.max)
        unit = torch.where(live, scale, 1.0)
        H = torch.where(live, S, 0.0).div_(unit)  # (K, r, r)
        H.diagonal(dim1=-2, dim2=-1).add_(torch.where(live, shift / unit, 1.0).view(-1, 1))
        P = self.spd_power(H, exponent).mul_(unit**exponent)
        return torch.where(live, P, torch.where(scale.isnan(), scale, 0.0))

    def spd_power(self, S: Array, power: float) -> Array:
        if power != -1.0:
            return super().spd_power(S, power)
        # cholesky_ex neither raises nor waits for the device; the damping keeps members definite.
        L, _ = torch.linalg.cholesky_ex(S)
        eye = torch.eye(S.shape[-1], dtype=S.dtype, device=S.device).expand_as(S)
        W = torch.linalg.solve_triangular(L, eye, upper=False)  # (K, r, r)
        return W.mT @ W

    def pseudo_power(self, S: Array, exponent: float) -> Array:
        if exponent != -0.5 or not eigh_waits(S):
            return super().pseudo_power(S, exponent)
        # The filter (λ / (λ + shift))⁴ takes the place of a cut-off: nothing is left of directions
        # that are lost in rounding.
        r = S.shape[-1]
        mean = S.diagonal(dim1=-2, dim2=-1).mean(-1).view(-1, 1, 1)
        shift = torch.finfo(S.dtype).eps ** 0.5 * mean
        Z, _ = self.newton_schulz(S + shift * torch.eye(r, dtype=S.dtype, device=S.device))
        squared = torch.matrix_power(Z @ S @ Z, 2)
        return squared @ squared @ Z

    def inverse_root(self, V: Array, shift: Array, eps: float) -> Array:
        if not eigh_waits(V):
            return super().inverse_root(V, shift, eps)
        eye = torch.eye(V.shape[-1], dtype=V.dtype, device=V.device)
        mean = V.diagonal(dim1=-2, dim2=-1).mean(-1).view(-1, 1, 1)
        _, root = self.newton_schulz(V + (torch.finfo(V.dtype).eps ** 0.5 * mean + shift) * eye)
        inverse, _ = torch.linalg.inv_ex(root + eps * eye)
        return inverse

    def adam(
        self, mu: Array, nu: Array, g: Array, b1: float, b2: float, c1: Any, root2: Any, eps: Any
    ) -> tuple[Array, Array, Array]:
        mu = torch.lerp(g, mu, b1)
        nu = (b2 * nu).addcmul_(g, g, value=1 - b2)
        d = nu.sqrt().div_(root2).add_(eps)
        return torch.div(mu, d, out=d).div_(c1), mu, nu

    def descend(self, param: Array, d: Array, lr: Array | float) -> Array:
        return torch.sub(param, d, alpha=lr) if isinstance(lr, float) else param - lr * d

    def unstack(self, P: Array, tall: Sequence[Array]) -> Iterator[Array]:
        if all(F.ndim == 2 for F in tall):
            return iter(P.unbind(0))  # one call instead of one for each factor
        return super().unstack(P, tall)

    @contextmanager
    def exact(self, like: Array) -> Iterator[None]:
        """No autocast and no TF32 or bfloat16 products inside."""
        with torch.autocast(like.device.type, enabled=False), _ieee_products():
            yield

    def devices(self) -> list[str]:
        names = ["cpu", *(f"cuda:{i}" for i in range(torch.cuda.device_count()))]
        return names + (["mps"] if torch.backends.mps.is_available() else [])

    def to_numpy(self, x: Array) -> Any:
        return x.detach().cpu().numpy()

    def synchronize(self, *arrays: Array) -> None:
        if torch.cuda.is_available():
            torch.cuda.synchronize()


@contextmanager
def _ieee_products() -> Iterator[None]:
    parts = (torch.backends.cuda, torch.backends.mkldnn)
    matmuls: list[Any] = [getattr(part, "matmul", None) for part in parts]
    if not all(hasattr(matmul, "fp32_precision") for matmul in matmuls):  # before torch 2.9
        before = torch.get_float32_matmul_precision()
        torch.set_float32_matmul_precision("highest")
        try:
            yield
        finally:
            torch.set_float32_matmul_precision(before)
        return
    saved = [matmul.fp32_precision for matmul in matmuls]
    try:
        for matmul in matmuls:
            matmul.fp32_precision = "ieee"
        yield
    finally:
        for matmul, precision in zip(matmuls, saved, strict=True):
            matmul.fp32_precision = precision


def eigh_waits(S: Array) -> bool:
    """Whether torch's eigh would hold up the host until the device is done."""
    return bool(S.device.type == "cuda")


def _buckets(tall: Sequence[Array], workspace: Workspace | None, slot: str) -> dict[Any, list[int]]:
    """Positions of equal shape, dtype and device."""
    buckets: dict[Any, list[int]] | None = (workspace or {}).get(("buckets", slot))
    if buckets is None:
        buckets = {}
        for i, F in enumerate(tall):
            buckets.setdefault((tuple(F.shape), F.dtype, F.device), []).append(i)
        if workspace is not None:
            workspace["buckets", slot] = buckets
    return buckets


def _fold(tall: Array) -> int:
    """How many rows of a thin (k, m, r) to read as one, so that a CPU's kernels have work."""
    m, r = tall.shape[-2:]
    fold = 16 // r if tall.device.type == "cpu" else 1
    return fold if fold > 1 and m % fold == 0 else 1


def _block_diagonal(P: Array, fold: int) -> Array:
    """(k, r, r) as (k, f r, f r) with `fold` copies on the diagonal."""
    k, r, _ = P.shape
    eye = torch.eye(fold, dtype=P.dtype, device=P.device)
    return torch.einsum("fg,kij->kfigj", eye, P).reshape(k, fold * r, fold * r)


def _stacks(F: Array) -> bool:
    # On an accelerator the number of launches should not depend on the number of layers.
    return bool(F.device.type != "cpu" or F.numel() < STACK_BELOW)


def _stack(tall: list[Array], dtype: Any, workspace: Workspace | None) -> Array:
    """Factors of one shape as (K, ., .) in `dtype`; good until the next call."""
    F = tall[0]
    if F.dtype != dtype:
        return torch.stack(tall).to(dtype).view(-1, *F.shape[-2:])
    # One flat buffer for every bucket: it stays in the cache.
    size = len(tall) * F.numel()
    flat = _take(workspace, ("stack", dtype), (size,), dtype, F.device)
    return torch.stack(tall, out=flat.view(len(tall), *F.shape)).view(-1, *F.shape[-2:])


def _take(
    workspace: Workspace | None, key: Any, shape: Sequence[int], dtype: Any, device: Any
) -> Array:
    """Uninitialised memory: the workspace's from the last call where it fits, else new.

    Fresh pages are what a large allocation on a CPU spends most of its time on. On an accelerator
    the caching allocator is quick, and holding on to memory between steps is worse.
    """
    shape = tuple(shape)
    if workspace is None or device.type != "cpu":
        return torch.empty(shape, dtype=dtype, device=device)
    held = workspace.get(key)
    if held is None or held.dtype != dtype or held.numel() < math.prod(shape):
        held = workspace[key] = torch.empty(shape, dtype=dtype, device=device)
    return held if held.shape == shape else held.view(-1)[: math.prod(shape)].view(shape)


def _views(
    workspace: Workspace | None, key: Any, stack: Array, count: int, shape: Sequence[int]
) -> Any:
    """The members of a stack; the same tensor objects again while the stack is the same memory."""
    if workspace is None:
        return stack.view(count, *shape).unbind(0)
    held = workspace.get(key)
    if held is None or held[0] is not stack:
        held = workspace[key] = (stack, stack.view(count, *shape).unbind(0))
    return held[1]


BACKEND = TorchBackend

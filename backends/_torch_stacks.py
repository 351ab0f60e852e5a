"""Stacks of factors of one shape, read and written together: few kernels, little new memory."""

import math
from collections.abc import Sequence
from typing import Any

import torch

from rlora.core.backend import LARGE, Arrays, Workspace
from rlora.core.factors import Array

from ._torch_cpu import empty

STACK = 1 << 20
"""On a CPU, so many numbers are stacked and multiplied in one batch, in memory that stays in the
cache: copying them costs less than a call for each tensor."""


FOLDED_GRAM, FOLDED_PRODUCT = 1 << 19, 1 << 17
"""Numbers from which on `fold_of` gains time: of a Gram's factors, and of what P multiplies."""

PRODUCTS: dict[int, Any] = {
    **dict.fromkeys(range(4, 65), torch.matmul),
    3: torch.bmm,
    2: torch.mm,
}
"""The product of torch for so many axes: `torch.matmul` costs more for each call."""


def buckets_of(X: Arrays, workspace: Workspace | None, slot: str) -> dict[Any, list[int]]:
    """Positions of equal shape, dtype and device; on a CPU as many as are stacked at once."""
    buckets: dict[Any, list[int]] | None = (workspace or {}).get(("buckets", slot))
    if buckets is None:
        alike: dict[Any, list[int]] = {}
        for i, F in enumerate(X):
            alike.setdefault((tuple(F.shape), F.dtype, F.device), []).append(i)
        buckets = {}
        for key, members in alike.items():
            F = X[members[0]]
            most = len(members) if F.device.type != "cpu" else max(1, STACK // max(1, F.numel()))
            for start in range(0, len(members), most):
                buckets[*key, start] = members[start : start + most]
        if workspace is not None:
            workspace["buckets", slot] = buckets
    return buckets


def fold_of(X: Array, least: int) -> int:
    """The number of rows of a thin (k, m, r) to read as one, so that a CPU's kernels have work.

    1 below `least` numbers, where the calls that this takes cost more than it gains.
    """
    m, r = X.shape[-2:]
    fold = 16 // r
    if fold < 2 or m % fold or X.numel() < least:
        return 1
    return fold if X.device.type == "cpu" and X.is_contiguous() else 1


def rows_times(X: Array, Y: Array) -> Array:
    """``X Yᵀ`` of (..., r, n)."""
    if X.ndim == 3 and all(fold_of(F.mT, FOLDED_GRAM) > 1 for F in (X, Y)):
        return folded_columns(X.mT, Y.mT)
    return PRODUCTS[X.ndim](X, Y.mT)


def folded_columns(X: Array, Y: Array) -> Array:
    """``Xᵀ Y`` of thin (..., m, r), read as (..., m/f, f r): f slices of it are on the diagonal."""
    r, fold = X.shape[-1], fold_of(X, 0)
    X, Y = X.view(*X.shape[:-2], -1, fold * r), Y.view(*Y.shape[:-2], -1, fold * r)
    blocks = torch.matmul(X.mT, Y).view(-1, fold, r, fold, r)
    return blocks.diagonal(dim1=1, dim2=3).sum(-1)


def gram_of(slot: str, F: Array, out: Array | None = None) -> Array:
    """``F Fᵀ`` ("rows") or ``Fᵀ F`` ("columns") of (..., ., .), in `out` if it is given."""
    if slot == "rows":
        return PRODUCTS[F.ndim](F, F.mT, out=out)
    if fold_of(F, FOLDED_GRAM) > 1:
        S = folded_columns(F, F)
        return S if out is None else out.copy_(S.view_as(out))
    return PRODUCTS[F.ndim](F.mT, F, out=out)


def gram_stack(slot: str, X: Arrays, dtype: Any, workspace: Workspace | None) -> Array:
    """`Backend.gram_rows` ("rows") or `Backend.gram_columns` ("columns"), bucket by bucket."""
    if len(X) == 1 and X[0].ndim == 3:  # of equal layers
        return gram_of(slot, X[0].to(dtype))
    order, pieces, start = [], [], 0
    r = X[0].shape[-2 if slot == "rows" else -1]
    layers = [math.prod(F.shape[:-2]) for F in X]
    stack = take(workspace, ("gram", slot), (sum(layers), r, r), dtype, X[0].device)
    for members in buckets_of(X, workspace, slot).values():
        some, stop = [X[i] for i in members], start + sum(layers[i] for i in members)
        out = None if stack is None else stack[start:stop]
        if is_stacked(some[0]):
            pieces.append(gram_of(slot, stacked(some, dtype, workspace), out))
        elif out is not None:  # on a CPU
            lead = some[0].shape[:-2]
            for F, S in zip(some, out.view(len(some), *lead, r, r), strict=True):
                gram_of(slot, F.to(dtype), S)
        order += members
        start = stop
    if stack is None:
        stack = pieces[0] if len(pieces) == 1 else torch.cat(pieces)
    return stack if order == sorted(order) else reordered(stack, order, layers)


def factors_of(slot: str, P: Array, G: Array, out: Array) -> tuple[Array, Array, Array]:
    """The two factors of ``P G`` ("left") or ``G P`` ("right"), and the memory of the product.

    G of shape (..., r, n) or (..., m, r), P (..., r, r); thin ones with several rows read as one.
    """
    if slot == "left":
        return P, G, out
    if (fold := fold_of(G, FOLDED_PRODUCT)) > 1 and out.is_contiguous():
        shape = (*G.shape[:-2], -1, fold * G.shape[-1])
        return G.view(shape), block_diagonal(P, fold), out.view(shape)
    return G, P, out


def multiply(slot: str, P: Array, G: Array, out: Array | None) -> Array:
    """``P G`` ("left") or ``G P`` ("right") of (K, ., .), in the memory of `out` if it is given."""
    if out is None:
        return torch.bmm(P, G) if slot == "left" else torch.bmm(G, P)
    left, right, folded = factors_of(slot, P, G, out.view(G.shape))
    torch.bmm(left, right, out=folded)
    return out


def multiply_each(slot: str, P: Arrays, X: Arrays, outs: Arrays, keep: float | None = None) -> None:
    """``P X`` ("left") or ``X P`` ("right") of each into `outs`, added to ``keep`` times these."""
    lefts, rights = (P, X) if slot == "left" else (X, P)
    if slot == "right" and any(fold_of(G, FOLDED_PRODUCT) > 1 for G in X):
        folded = [factors_of(slot, *each) for each in zip(P, X, outs, strict=True)]
        lefts, rights, outs = zip(*folded, strict=True)
    for left, right, out in zip(lefts, rights, outs, strict=True):
        if keep is None:
            PRODUCTS[out.ndim](left, right, out=out)
        else:
            (out.addmm_ if out.ndim == 2 else out.baddbmm_)(left, right, beta=keep)


def block_diagonal(P: Array, fold: int) -> Array:
    """(..., r, r) as (..., f r, f r) with `fold` copies on the diagonal."""
    *lead, r, _ = P.shape
    blocks = torch.zeros((*lead, fold, r, fold, r), dtype=P.dtype, device=P.device)
    blocks.diagonal(dim1=-4, dim2=-2).copy_(P.unsqueeze(-1))  # (..., r, r, f)
    return blocks.view(*lead, fold * r, fold * r)


def is_stacked(F: Array) -> bool:
    # On an accelerator the number of launches should not depend on the number of layers.
    return bool(F.device.type != "cpu" or F.numel() < LARGE)


def reordered(stack: Array, order: list[int], layers: list[int]) -> Array:
    """The members of a stack as the list has them: its pieces are those of `order`."""
    pieces = dict(zip(order, stack.split([layers[i] for i in order]), strict=True))
    return torch.cat([pieces[i] for i in range(len(order))])


def stacked(X: list[Array], dtype: Any, workspace: Workspace | None) -> Array:
    """Factors of one shape as (K, ., .) in `dtype`; good until the next call."""
    F = X[0]
    shape = (len(X) * math.prod(F.shape[:-2]), *F.shape[-2:])  # -1 says nothing when empty
    if len(X) == 1:
        return F.to(dtype).reshape(shape)
    if F.dtype != dtype:
        return torch.stack(X).to(dtype).view(shape)
    # One flat buffer for every bucket: it stays in the cache.
    size = len(X) * F.numel()
    flat = take(workspace, ("stack", dtype), (size,), dtype, F.device)
    out = None if flat is None else flat.view(len(X), *F.shape)
    return torch.stack(X, out=out).view(shape)


def take(
    workspace: Workspace | None, key: Any, shape: Sequence[int], dtype: Any, device: Any
) -> Array | None:
    """Uninitialised memory: the workspace's from the last call where it fits, else new.

    None on an accelerator, where torch's own allocator is quick and to hold on to memory would be
    worse.
    """
    if device.type != "cpu":
        return None
    shape = tuple(shape)
    if workspace is None:
        return empty(shape, dtype)
    held = workspace.get(key)
    if held is None or held.dtype != dtype or held.numel() < math.prod(shape):
        held = workspace[key] = torch.empty(shape, dtype=dtype, device=device)
    return held if held.shape == shape else held.view(-1)[: math.prod(shape)].view(shape)


def take_each(
    workspace: Workspace | None,
    key: Any,
    count: int,
    shape: Sequence[int],
    dtype: Any,
) -> list[Array]:
    """So many tensors on a CPU, uninitialised: those of the last call where there are any."""
    key = (key, dtype)
    if workspace is None or key not in workspace:
        made = [empty(shape, dtype) for _ in range(count)]
        if workspace is None:
            return made
        workspace[key] = made
    held: list[Array] = workspace[key]
    return held


def views(
    workspace: Workspace | None, key: Any, stack: Array, count: int, shape: Sequence[int]
) -> Any:
    """The members of a stack; the same tensor objects again while the stack is the same memory."""
    if workspace is None or stack.device.type != "cpu":
        return stack.view(count, *shape).unbind(0)
    held = workspace.get(key)
    if held is None or held[0] is not stack:
        held = workspace[key] = (stack, stack.view(count, *shape).unbind(0))
    return held[1]

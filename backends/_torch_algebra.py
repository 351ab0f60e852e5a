"""The r x r algebra by factorisations and products that do not wait for a device."""

from typing import Any

import torch

from rlora.core.algebra import Damped, cubics
from rlora.core.factors import Array

from ._torch_cpu import damped_if_sound, is_eager_cpu, rounding_of, share_of


def damped(S: Array, damping: float, relative: bool, least: float) -> Damped:
    """`Backend.damped` in fewer kernels: for small adapters they are what a step costs."""
    if is_eager_cpu(S) and (sound := damped_if_sound(S, damping, relative, least)):
        return sound
    info, rounding = torch.finfo(S.dtype), rounding_of(S)
    mean = S.diagonal(dim1=-2, dim2=-1).mean(-1).view(-1, 1, 1)  # (K, 1, 1)
    ratio = max(damping, floor := max(rounding, least))
    shift = None if relative else (mean * floor).clamp_(min=damping)
    scale = mean * (1 + ratio) if shift is None else mean + shift
    # NaN stays; the last binade counts as overflown: two comparisons less.
    unit = scale.clamp(info.smallest_normal / rounding, info.max / 2)
    live = scale == unit
    H = S / unit  # (K, r, r); what is not finite stays in its member, which `restore` replaces
    added: Any = share_of(ratio)
    if shift is not None:
        added = torch.where(live, shift / unit, 1.0).view(-1, 1)
    H.diagonal(dim1=-2, dim2=-1).add_(added)
    return Damped(H, unit, live, unit * 0)


def newton_schulz(S: Array, power: float, damping: float) -> Array:
    """`Backend.newton_schulz` with three operations a step."""
    r, info = S.shape[-1], torch.finfo(S.dtype)
    share = share_of(damping) / r
    eye = torch.eye(r, dtype=S.dtype, device=S.device).expand_as(S)
    trace = S.diagonal(dim1=-2, dim2=-1).sum(-1).view(-1, 1, 1) * (1 + damping)
    unit = trace.clamp(min=info.smallest_normal)  # a smaller one counts as it
    Y = S / unit
    if damping:
        Y.diagonal(dim1=-2, dim2=-1).add_(share)
    (alpha, beta), *steps, last = cubics(info.eps, share)
    Z = torch.baddbmm(eye, eye, Y, beta=alpha, alpha=-beta)  # α I - β Y in one operation
    Y = torch.bmm(Y, Z)
    for alpha, beta in steps:
        T = torch.baddbmm(eye, Z, Y, beta=alpha, alpha=-beta)
        Y, Z = torch.bmm(Y, T), torch.bmm(T, Z)
    T = torch.baddbmm(eye, Z, Y, beta=last[0], alpha=-last[1])
    if power > 0:
        return torch.bmm(Y, T) * unit**power
    return torch.bmm(T, Z) * (trace / unit * unit**power)


def inverse_cholesky_times(S: Array, X: Array) -> Array:
    """``L⁻¹ X`` with the Cholesky factor L of definite S (K, r, r); NaN where S is not definite."""
    L, failed = torch.linalg.cholesky_ex(S)  # neither raises nor waits for the device
    solved = torch.linalg.solve_triangular(L, X, upper=False)
    if is_eager_cpu(S) and not failed.numpy().any():
        return solved
    return solved.masked_fill(failed.view(-1, 1, 1) != 0, torch.nan)


def symmetric_pseudo_half(S: Array) -> Array:
    """``Backend.pseudo_power(S, -0.5)`` by products and the filter of `without_lost`."""
    S, _ = without_tiny(S)
    return without_lost(newton_schulz(S, -0.5, torch.finfo(S.dtype).eps ** 0.5), S)


def cholesky_pseudo_half(S: Array) -> Array:
    """`Backend.pseudo_half` by a Cholesky half and the filter of `without_lost`."""
    damping = torch.finfo(S.dtype).eps ** 0.5
    S, mean = without_tiny(S)
    unit = (mean * (1 + damping)).clamp(min=torch.finfo(S.dtype).smallest_normal)
    S = S / unit
    eye = torch.eye(S.shape[-1], dtype=S.dtype, device=S.device).expand_as(S)
    W = inverse_cholesky_times(torch.add(S, eye, alpha=share_of(damping)), eye)
    return without_lost(W, S) * unit**-0.5


def without_tiny(S: Array) -> tuple[Array, Array]:
    """Grams, 0 where they are too small to be inverted, and their mean eigenvalues (K, 1, 1)."""
    mean = S.diagonal(dim1=-2, dim2=-1).mean(-1).view(-1, 1, 1)
    least = torch.finfo(S.dtype).smallest_normal / rounding_of(S)
    return S.masked_fill(mean <= least, 0.0), mean


def without_lost(W: Array, S: Array) -> Array:
    """A half W of a damped ``S⁻¹`` without the directions of S that are lost in rounding.

    The filter ``(λ / (λ + shift))⁴`` takes the place of a cut-off, which needs eigenvalues.
    """
    F = torch.bmm(torch.bmm(W, S), W.mT)
    F = torch.bmm(F, F)
    return torch.bmm(F, torch.bmm(F, W))

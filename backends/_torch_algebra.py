"""The r x r algebra by products alone, for devices on which an eigendecomposition waits."""

import torch

from rlora.core.algebra import cubics
from rlora.core.factors import Array


def newton_schulz(S: Array) -> tuple[Array, Array]:
    """`Backend.newton_schulz` with three operations a step."""
    eye = torch.eye(S.shape[-1], dtype=S.dtype, device=S.device).expand_as(S)
    trace = S.diagonal(dim1=-2, dim2=-1).sum(-1).view(-1, 1, 1)
    unit = trace.clamp(min=torch.finfo(S.dtype).smallest_normal)  # a smaller one counts as it
    Y, Z = S / unit, eye
    for alpha, beta in cubics(torch.finfo(S.dtype).eps):
        T = torch.baddbmm(eye, Z, Y, beta=alpha, alpha=-beta)  # in one operation
        Y, Z = torch.bmm(Y, T), torch.bmm(T, Z)
    root = unit.sqrt()
    return Z * (trace / unit / root), Y * root


def without_lost(W: Array, S: Array) -> Array:
    """A half W of a damped ``S⁻¹`` without the directions of S that are lost in rounding.

    The filter ``(λ / (λ + shift))⁴`` takes the place of a cut-off, which needs eigenvalues.
    """
    F = torch.bmm(torch.bmm(W, S), W.mT)
    return torch.bmm(torch.matrix_power(F, 4), W)

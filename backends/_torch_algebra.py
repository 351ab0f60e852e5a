"""The r x r algebra by factorisations and products that do not wait for a device."""

from typing import Any

import numpy as np
import torch
from torch import Tensor

from rlora.core.algebra import ROUNDING, Damped
from rlora.core.factors import Array

from ._torch_cpu import is_eager_cpu, kept

MODERATE = 1e-20, 1e20
"""Mean eigenvalues of a damped Gram whose inverse and factors are far from the ends of float32:
its eigenvalues are apart by 1e7 at most."""


def damped(S: Array, damping: Array | float, relative: bool, least: float) -> Damped:
    """`Backend.damped` in fewer kernels: for small adapters they are what a step costs."""
    one = not isinstance(damping, torch.Tensor)
    if one and is_eager_cpu(S) and (sound := damped_if_sound(S, damping, relative, least)):
        return sound
    info, rounding = torch.finfo(S.dtype), rounding_of(S)
    mean = S.diagonal(dim1=-2, dim2=-1).mean(-1).view(-1, 1, 1)  # (K, 1, 1)
    floor = max(rounding, least)
    ratio = max(damping, floor) if relative else 0.0
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


def damped_if_sound(S: Tensor, damping: float, relative: bool, least: float) -> Damped | None:
    """`Backend.damped` where every member has an inverse, else None; its numbers by NumPy.

    NumPy's arithmetic on K numbers takes a fraction of the time of a call of torch. Each member is
    to the bit what `damped` makes of it beside one that has no inverse.
    """
    shift, scale = _shifts(S, damping, relative, least)
    info = torch.finfo(S.dtype)
    if not (scale.min() > info.smallest_normal / rounding_of(S) and scale.max() < info.max / 2):
        return None  # for NaN too
    unit = torch.from_numpy(scale).view(-1, 1, 1)
    H = S / unit
    if relative:
        H.diagonal(dim1=-2, dim2=-1).add_(share_of(max(damping, rounding_of(S), least)))
    else:
        _add_to_diagonal(H, shift / scale)
    return Damped(H, unit, None, None)


def shifted(S: Tensor, damping: float, relative: bool, least: float) -> tuple[Tensor, np.ndarray]:
    """``S + shift I`` as `Backend.damped_power` has it, and which members are `MODERATE`."""
    shift, scale = _shifts(S, damping, relative, least)
    low, high = MODERATE
    return _add_to_diagonal(S.clone(), shift), (low < scale) & (scale < high)


def _shifts(
    S: Tensor, damping: float, relative: bool, least: float
) -> tuple[np.ndarray, np.ndarray]:
    """The shift of each member, and its mean eigenvalue with that."""
    means = S.diagonal(dim1=-2, dim2=-1).mean(-1).numpy()
    floor = max(rounding_of(S), least)
    with np.errstate(over="ignore", invalid="ignore"):  # what is not finite stays visible
        if relative:
            ratio = max(damping, floor)
            return means * ratio, means * (1 + ratio)
        shift = np.maximum(means * floor, damping)
        return shift, means + shift


def _add_to_diagonal(H: Tensor, x: np.ndarray) -> Tensor:
    H.diagonal(dim1=-2, dim2=-1).add_(torch.from_numpy(x).view(-1, 1))
    return H


def share_of(ratio: float) -> float:
    """The share of a shift of ``ratio mean`` in the mean eigenvalue with it."""
    return ratio / (1 + ratio)


def rounding_of(S: Tensor) -> float:
    """The least damping that the rounding of Grams (K, r, r) of trace r can carry."""
    return float(ROUNDING * S.shape[-1] * torch.finfo(S.dtype).eps)


def half_power(S: Array, power: float, damping: float = 0.0, shift: float = 0.0) -> Array:
    """``(S + damping tr(S)/r I)^power + shift I`` for ±½ without an eigh; definite (K, r, r).

    With ``S = L Lᵀ`` and the polar factor U of L, ``S^½ = L Uᵀ`` and ``S^-½ = U L⁻¹``. The factor
    has the root of the condition number, so that an error in it does not reach large eigenvalues.
    """
    unit = traces(S).clamp(min=torch.finfo(S.dtype).smallest_normal)
    H = damped_unit(S, unit, damping)
    L, unit = cholesky_and_unit(H, unit)
    U = polar_factor(L, H, damping / S.shape[-1])
    if power > 0:
        half = torch.bmm(L, U.mT)
    else:
        half = torch.linalg.solve_triangular(L, U, upper=False, left=False)
    size = unit.sqrt() if power > 0 else unit.rsqrt()
    return torch.addcmul(eyes(S, shift), half, size) if shift else half * size


def traces(S: Array) -> Array:
    """Those of (K, r, r), as (K, 1, 1)."""
    return S.diagonal(dim1=-2, dim2=-1).sum(-1).view(-1, 1, 1)


def damped_unit(S: Array, unit: Array, damping: float) -> Array:
    """``S / unit + damping / r I``, with the traces of S as units; `damping` is far below 1."""
    if not damping:
        return S / unit
    return torch.addcdiv(eyes(S, damping / S.shape[-1]), S, unit)


def cholesky_and_unit(H: Array, unit: Array) -> tuple[Array, Array]:
    """Cholesky factors (K, r, r), and the units, negative where H is not definite.

    `sqrt` and `rsqrt` of such a unit, which may be -inf, are NaN, and so is what they multiply; a
    power may be 0 in a compiled graph.
    """
    L, failed = torch.linalg.cholesky_ex(H)  # neither raises nor waits for the device
    return L, torch.sub(unit, failed.view(-1, 1, 1), alpha=torch.finfo(H.dtype).max)


def definite_cholesky(H: Array, *, lift: bool = False) -> Array:
    """Cholesky factors (K, r, r), NaN where H is not definite.

    With `lift`, on a CPU, it may lack definiteness by ten times the damping that rounding mostly
    asks for: sums of thousands of products, of rank one after one token, have been that far off.
    """
    L, failed = torch.linalg.cholesky_ex(H)  # neither raises nor waits for the device
    if is_eager_cpu(H):
        lost = failed != 0
        if not lost.numpy().any():
            return L
        if not lift:
            return L.masked_fill(lost.view(-1, 1, 1), torch.nan)
        some = H[lost]
        mean = some.diagonal(dim1=-2, dim2=-1).mean(-1)
        some.diagonal(dim1=-2, dim2=-1).add_(10 * rounding_of(H) * mean[:, None])
        L[lost], failed[lost] = torch.linalg.cholesky_ex(some)
    return L.masked_fill(failed.view(-1, 1, 1) != 0, torch.nan)


def polar_factor(L: Array, S: Array, least: float) -> Array:
    """The orthogonal U of ``L = P U`` with definite P, by products alone; ``S = L Lᵀ`` of norm 1.

    ``X <- (α I - β X Xᵀ) X`` takes the singular values of X from L's, whose squares are at least
    `least` or 10 eps, to 1.
    """
    X = L
    for alpha, beta in cubics(torch.finfo(L.dtype).eps, least):
        square = S if X is L else torch.bmm(X, X.mT)
        X = torch.baddbmm(X, square, X, beta=alpha, alpha=-beta)
    return X


def cubics(eps: float, least: float = 0.0) -> list[tuple[float, float]]:
    """The α and β of steps ``x <- α x - β x³`` that bring all of ``[sqrt(least), 1]`` to 1.

    `least` counts as 10 eps, what rounding leaves of a zero eigenvalue, where it is smaller.

    Of all odd cubics each is the one that is nearest to 1 on the interval ``[a, b]`` that the step
    before has left: with ``s = a² + ab + b²`` and ``e = sqrt(s / 3)``, its extremum, it is
    ``2 (s x - x³) / (2 e³ + ab (a + b))``, off by the same at a, e and b. The first multiplies a
    small x by 5 and the next ones by 2.6, where ``(3 x - x³) / 2``, the limit for a and b near 1,
    does by 1.5: 11 steps in float32 and 22 in float64 take the place of 23 and 48.

    E. Grishina, M. Smirnov, M. Rakhuba. Accelerating Newton-Schulz Iteration for Orthogonalization
    via Chebyshev-type Polynomials. arXiv:2506.10935, 2025.
    """
    steps = []
    a, b, error = max(least, ROUNDING * eps) ** 0.5, 1.0, 1.0
    while 2 * error**2 >= eps:
        s, ends = a * a + a * b + b * b, a * b * (a + b)
        peak = 2 * (s / 3) ** 1.5  # 2 e³
        beta = 2 / (peak + ends)
        steps.append((beta * s, beta))
        error = beta / 2 * (peak - ends)
        a, b = 1 - error, 1 + error
    return [*steps, (1.5, 0.5)]  # which leaves 1.5 error²


def inverse_cholesky(S: Array, *, upper: bool = False, lift: bool = False) -> Array:
    """`Backend.inverse_cholesky`, NaN where S is not definite: see `definite_cholesky`."""
    L = definite_cholesky(S.flip(-2, -1) if upper else S, lift=lift)
    W = torch.linalg.solve_triangular(L, eyes(S), upper=False)
    return W.flip(-2, -1) if upper else W


def eyes(S: Array, value: float = 1.0) -> Array:
    """``value I`` like a stack (K, r, r)."""
    r, dtype, device = S.shape[-1], S.dtype, S.device

    def make() -> Array:
        eye = torch.eye(r, dtype=dtype, device=device)
        return eye if value == 1.0 else eye.mul_(value)

    return kept(("eye", r, value, dtype, device), make).expand_as(S)


def inverse_root_half(V: Array, eps: float, X: Array, least: float) -> Array:
    """`Backend.inverse_root_half` without an eigh; NaN where the damped V is not definite."""
    root = half_power(V, 0.5, damping_of(V, least), eps)  # far above rounding, or NaN
    L, _ = torch.linalg.cholesky_ex(root)  # `solve`, by LU, may wait for the device
    return torch.linalg.solve_triangular(L, X, upper=False)


def cholesky_pseudo_half(S: Array, least: float) -> Array:
    """`Backend.pseudo_half` by a Cholesky half of the damped S, filtered."""
    return pseudo_halves(S, damping_of(S, least))[0]


def symmetric_pseudo_half(S: Array, least: float) -> Array:
    """``Backend.pseudo_power(S, -0.5)`` by the same half, and the polar factor that it lacks."""
    damping = damping_of(S, least)
    W, L, H = pseudo_halves(S, damping)
    return torch.bmm(polar_factor(L, H, damping / S.shape[-1]), W)


def pseudo_halves(S: Array, damping: float) -> tuple[Array, Array, Array]:
    """W with ``Wᵀ W = pseudo_power(S, -1)``, and ``L Lᵀ = H``, the damped S of trace 1.

    A filter takes the place of a cut-off, which needs eigenvalues: F has ``f = λ / (λ + shift)``,
    made of ``I - shift W Wᵀ``, which loses no digits to the condition number, and W is multiplied
    by ``(3.25 f² - 2.25 f³)²``. With the ``√f`` that is left of ``√λ W`` that is flat at f = 1.
    """
    r, info = S.shape[-1], torch.finfo(S.dtype)
    tiny = info.smallest_normal * r / rounding_of(S)  # too small to be inverted: W is 0
    unit = torch.nn.functional.threshold(traces(S), tiny, torch.inf)
    H = damped_unit(S, unit, damping)
    L, unit = cholesky_and_unit(H, unit)
    eye = eyes(S)
    W = torch.linalg.solve_triangular(L, eye, upper=False)
    F = torch.baddbmm(eye, W, W.mT, alpha=-damping / r)
    squared = torch.bmm(F, F)
    F = torch.baddbmm(squared, squared, F, beta=3.25, alpha=-2.25)
    return torch.bmm(F, torch.bmm(F, W)) * unit.rsqrt(), L, H


def damping_of(S: Array, least: float) -> float:
    """The relative damping d of `pseudo_halves`, and of a root of what such a W has multiplied.

    At least `least`, see `Backend.pseudo_power`.

    Of a Gram C of gradients, W C Wᵀ has rounding up to about eps / d of its trace, which must not
    make it indefinite: the root of eps is where d is as small as it can be for both.
    """
    return max(rounding_of(S), least, float(torch.finfo(S.dtype).eps ** 0.5))

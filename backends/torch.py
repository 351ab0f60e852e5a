"""PyTorch: few kernels for many layers, factorisations that neither raise nor synchronise."""

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext, suppress
from functools import partial
from typing import Any

import torch

from rlora.core.algebra import Damped
from rlora.core.backend import AT_ONCE, IN_CACHE, AdamNumbers, Arrays, Backend, Workspace
from rlora.core.factors import Array

from ._cpu import cholesky_half
from ._torch_algebra import (
    cholesky_pseudo_half,
    damped,
    half_power,
    inverse_cholesky,
    inverse_root_half,
    shifted,
    symmetric_pseudo_half,
)
from ._torch_cpu import (
    are_finite,
    are_within,
    eigh_waits,
    empty,
    fused_adam,
    is_eager_cpu,
    is_plain,
    kept,
    reusing,
)
from ._torch_precision import exact
from ._torch_stacks import (
    buckets_of,
    gram_stack,
    is_stacked,
    multiply,
    multiply_each,
    rows_times,
    stacked,
    take,
    take_each,
    views,
)

WIDE = {
    **dict.fromkeys((torch.bfloat16, torch.float16, torch.float32), torch.float32),
    torch.float64: torch.float64,
}
"""The dtype of the arithmetic for each dtype of factors, as `Backend.compute_dtype` has it."""


class TorchBackend(Backend):
    """The operations that torch does faster than the generic class."""

    def gram_rows(self, X: Arrays, dtype: Any, workspace: Workspace | None = None) -> Array:
        return gram_stack("rows", X, dtype, workspace)

    def gram_columns(self, X: Arrays, dtype: Any, workspace: Workspace | None = None) -> Array:
        return gram_stack("columns", X, dtype, workspace)

    def grams(
        self, A: Arrays, B: Arrays, dtype: Any, workspace: Workspace | None = None
    ) -> tuple[Array, Array]:
        rows = gram_stack("rows", A, dtype, workspace)
        return rows, gram_stack("columns", B, dtype, workspace)

    def cross_rows(self, X: Arrays, Y: Arrays, dtype: Any) -> Array:
        pairs = [(x.to(dtype), y.to(dtype)) for x, y in zip(X, Y, strict=True)]
        return torch.cat([rows_times(x, y).view(-1, x.shape[-2], x.shape[-2]) for x, y in pairs])

    def apply_left(
        self,
        P: Arrays,
        X: Arrays,
        workspace: Workspace | None = None,
        accumulate: Arrays | None = None,
        keep: float = 1.0,
    ) -> list[Array]:
        return self._apply(P, X, workspace, "left", accumulate, keep)

    def apply_right(
        self,
        X: Arrays,
        P: Arrays,
        workspace: Workspace | None = None,
        accumulate: Arrays | None = None,
        keep: float = 1.0,
    ) -> list[Array]:
        return self._apply(P, X, workspace, "right", accumulate, keep)

    within = staticmethod(are_within)

    def piece(self, like: Array) -> int:
        return IN_CACHE if is_eager_cpu(like) else AT_ONCE

    def _apply(
        self,
        P: Arrays,
        X: Arrays,
        workspace: Workspace | None,
        slot: str,
        accumulate: Arrays | None,
        keep: float,
    ) -> list[Array]:
        if accumulate is not None and all(G.ndim < 4 for G in X):
            wide = [G.to(p.dtype) for p, G in zip(P, X, strict=True)]
            multiply_each(slot, P, wide, accumulate, keep)
            return list(accumulate)
        if len(X) == 1 and X[0].ndim == 3:
            G = X[0].to(P[0].dtype)
            out = take(workspace, ("out", slot), G.shape, G.dtype, G.device)
            return [multiply(slot, P[0], G, out)]
        result: list[Array] = list(X)
        for key, members in buckets_of(X, workspace, slot).items():
            some, powers = [X[i] for i in members], [P[i] for i in members]
            shape, device, dtype = key[0], some[0].device, powers[0].dtype
            if is_stacked(some[0]):
                G = stacked(some, dtype, workspace)
                P_k = powers[0] if len(powers) == 1 else torch.stack(powers)
                P_k = P_k.reshape(-1, *P_k.shape[-2:])
                out = take(workspace, ("out", slot, key), G.shape, dtype, device)
                out = multiply(slot, P_k, G, out)
                outs = views(workspace, ("views", slot, key), out, len(members), shape)
            else:
                outs = take_each(workspace, ("out", slot, key), len(some), shape, dtype)
                multiply_each(slot, powers, [G.to(dtype) for G in some], outs)
            for i, out in zip(members, outs, strict=True):
                result[i] = out
        if accumulate is not None:
            torch._foreach_add_(result, list(accumulate), alpha=keep)
        return result

    def matmul(self, X: Array, Y: Array) -> Array:
        if X.ndim == Y.ndim == 3 and X.shape[0] == Y.shape[0]:
            return torch.bmm(X, Y)  # what `torch.matmul` calls after four views
        return torch.matmul(X, Y)

    def plus_product(self, S: Array, c: float, X: Array, Y: Array) -> Array:
        return torch.baddbmm(S, X, Y, alpha=c)

    def eigh(self, S: Array) -> tuple[Array, Array]:
        if S.device.type != "cpu":
            return super().eigh(S)
        if is_eager_cpu(S) and are_finite(S):
            with suppress(RuntimeError):
                w, Q = torch.linalg.eigh(S)
                if are_finite(w):
                    return w, Q
        # MKL's does not converge, or gives NaN, where its squares of entries are subnormal: those
        # far below the rounding of the largest one do not count.
        size = S.abs()
        tiny = size < torch.finfo(S.dtype).eps ** 2 * size.amax((-2, -1), keepdim=True)
        return super().eigh(S.masked_fill(tiny, 0.0))

    def damped(self, S: Array, damping: Array | float, *, relative: bool, least: float) -> Damped:
        return damped(S, damping, relative, least)

    def damped_half(
        self,
        S: Array,
        damping: float = 0.0,
        *,
        relative: bool = True,
        least: float = 0.0,
        upper: bool = False,
    ) -> Array:
        by_size = partial(super().damped_half, relative=relative, least=least, upper=upper)
        if not is_eager_cpu(S):
            return by_size(S, damping)
        # Nothing is divided by its size and multiplied again where that is moderate. Each member
        # decides for itself: what is in another one does not change a bit of it.
        H, moderate = shifted(S, damping, relative, least)
        if moderate.all():
            return self.inverse_cholesky(H, upper=upper)
        W, kept = by_size(S, damping), torch.from_numpy(moderate)
        W[kept] = self.inverse_cholesky(H[kept], upper=upper)
        return W

    def spd_power(self, S: Array, power: float) -> Array:
        if power == -1.0:
            W = self.inverse_cholesky(S)
            return torch.bmm(W.mT, W)
        if abs(power) == 0.5 and eigh_waits(S):
            return half_power(S, power)
        return super().spd_power(S, power)

    def inverse_cholesky(self, S: Array, *, upper: bool = False) -> Array:
        return inverse_cholesky(S, upper=upper, lift=True)

    def pseudo_power(self, S: Array, exponent: float, least: float = 0.0) -> Array:
        if exponent != -0.5 or not eigh_waits(S):
            return super().pseudo_power(S, exponent, least)
        return symmetric_pseudo_half(S, least)

    def pseudo_half(self, S: Array, least: float = 0.0) -> Array:
        if is_eager_cpu(S):
            return cholesky_half(self, S, least, inverse_cholesky)
        if not eigh_waits(S):
            return self.pseudo_power(S, -0.5, least)
        return cholesky_pseudo_half(S, least)

    def inverse_root_half(self, V: Array, eps: float, X: Array, least: float = 0.0) -> Array:
        half = inverse_root_half if eigh_waits(V) else super().inverse_root_half
        return half(V, eps, X, least)

    def adam(
        self, M: Arrays, V: Arrays, G: Arrays, numbers: AdamNumbers
    ) -> tuple[list[Array], ...]:
        b1, b2, *by_array = numbers
        M, V, D = list(M), list(V), []
        for i, (m, v, g, c, root, e) in enumerate(zip(M, V, G, *by_array, strict=True)):
            done = fused_adam(m, v, g, b1, b2, c, root, e) if is_plain(m, v, g) else None
            if done is None:
                m = torch.lerp(g, m, b1)
                v = (b2 * v).addcmul_(g, g, value=1 - b2)
                d = v.sqrt().div_(root).add_(e)
                done = m, v, torch.div(m, d, out=d).div_(c)
            M[i], V[i], d = done
            D.append(d)
        return M, V, D

    def add_scaled(
        self, X: Arrays, D: Arrays, c: Array | float, donate: bool = False
    ) -> list[Array]:
        if not isinstance(c, (float, int)):
            return [x + c * d for x, d in zip(X, D, strict=True)]
        if X and all(x.device.type == "cuda" for x in X):  # one kernel for all of a shape
            return list(torch._foreach_add(list(X), list(D), alpha=c))
        moved = list(X)
        for i, (x, d) in enumerate(zip(X, D, strict=True)):
            memory = (x if donate else empty(d.shape, d.dtype)) if is_plain(x, d) else None
            moved[i] = torch.add(x, d, alpha=c, out=memory)
        return moved

    def constants(self, values: Sequence[float], dtype: Any, like: Array) -> Array:
        key = (tuple(values), dtype, like.device)
        return kept(key, partial(super().constants, values, dtype, like))

    def lerp(self, X: Array, Y: Array, weight: Array) -> Array:
        return torch.lerp(X, Y, weight)

    def reusing(self, workspace: Workspace) -> AbstractContextManager[None]:
        return nullcontext() if torch.compiler.is_compiling() else reusing(workspace)

    def compute_dtype(self, dtype: Any, wanted: str | None = None) -> Any:
        known = WIDE.get(dtype) if wanted is None else None  # instead of taking names apart
        return known or super().compute_dtype(dtype, wanted)

    def address(self, x: Array) -> int:
        plain = type(x) in (torch.Tensor, torch.nn.Parameter) and x.device.type != "meta"
        return x.data_ptr() if plain and not torch.compiler.is_compiling() else id(x)

    def unstack(self, P: Array, X: Arrays) -> list[Array]:
        axes = {F.ndim for F in X}
        if axes == {2}:
            return list(P.unbind(0))  # one call instead of one for each factor
        if axes == {3}:
            return list(P.split([len(F) for F in X]))
        return super().unstack(P, X)

    def for_type(self, kind: type) -> Backend:
        if not hasattr(kind, "device_mesh"):
            return self
        from ._torch_dtensor import OnPieces  # half a second

        on_pieces: Any = type("DTensorBackend", (OnPieces, type(self)), {})
        backend: Backend = on_pieces(self.xp, self.name)
        return backend

    exact = staticmethod(exact)

    def devices(self) -> list[str]:
        mps = ["mps"] if torch.backends.mps.is_available() else []
        return ["cpu", *(f"cuda:{i}" for i in range(torch.cuda.device_count())), *mps]

    def to_numpy(self, x: Array) -> Any:
        return x.detach().cpu().numpy()

    def synchronize(self, *arrays: Array) -> None:
        if torch.cuda.is_available():
            torch.cuda.synchronize()


BACKEND = TorchBackend

"""The r x r algebra, complete on any Array-API namespace: powers and roots of damped Grams.

One stack (K, r, r) holds the matrices of all factors of one rank, K counting every layer of them.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

from rlora.core.factors import Array, device_of

ROUNDING = 10
"""A Gram formed in precision eps has eigenvalues uncertain by about eps * trace; ten times that
keeps every factorisation of a rank-deficient Gram away from zero."""


class Damped(NamedTuple):
    """Definite matrices (K, r, r) of trace about r, and what gives back their sizes, (K, 1, 1)."""

    matrix: Array
    unit: Array
    """The divisors of `matrix`."""
    live: Array | None
    """False for members that have no inverse; None where all are known to have one."""
    dead: Array | None
    """The power of the others: 0, or NaN."""

    def restore(self, xp: Any, power: Array, exponent: float) -> Array:
        """A power of `matrix` as that power of the matrix before it was divided."""
        power = power * self.unit**exponent
        return power if self.live is None else xp.where(self.live, power, self.dead)


class MatrixAlgebra:
    """Factorisations and powers of symmetric matrices: the part of a `Backend` that is r x r."""

    xp: Any
    """The array namespace."""

    def matmul(self, X: Array, Y: Array) -> Array:
        """``X Y`` in the full precision of the arrays' dtype."""
        return self.xp.matmul(X, Y)

    def plus_product(self, S: Array, c: float, X: Array, Y: Array) -> Array:
        """``S + c X Y`` of (K, r, r), in the precision of `matmul`."""
        return S + c * self.matmul(X, Y)

    def spd_power(self, S: Array, power: float) -> Array:
        """``S^power`` of symmetric positive definite matrices (K, r, r) with trace about r."""
        return self.eigen_power(S, power)

    def eigen_power(self, S: Array, power: float, lost: Array | None = None) -> Array:
        """`spd_power` by eigenvalues, of which the `lost` (K, 1, 1) least ones count as none."""
        w, Q = self.eigh(S)
        w = self.above_rounding(w)
        kept = Q if lost is None else self.without_first(Q, lost)
        return self.matmul(kept * self.xp.expand_dims(w**power, axis=-2), Q.mT)

    def without_first(self, Q: Array, lost: Array) -> Array:
        """Matrices (K, r, r) with zeros in the first `lost` (K, 1, 1) of their columns."""
        places = self.xp.arange(Q.shape[-1], dtype=Q.dtype, device=device_of(Q))
        return self.xp.where(places < lost, self.xp.zeros_like(Q), Q)

    def row_space(self, S: Array, lost: Array) -> Array:
        """The projections (K, r, r) on the eigenvectors of S but for the `lost` least ones."""
        _, Q = self.eigh(S)
        return self.matmul(self.without_first(Q, lost), Q.mT)

    def above_rounding(self, w: Array) -> Array:
        """Eigenvalues (K, r) of damped Grams, none below half of the least damping.

        A Gram of thousands of products, which one token leaves of rank one, can be less definite
        than its damping allows for: by 25 eps of its trace (seen, of 768), where 10 are added.
        """
        xp, eps = self.xp, float(self.xp.finfo(w.dtype).eps)
        floor = 0.5 * ROUNDING * eps * xp.sum(w, axis=-1, keepdims=True)
        return xp.clip(xp.maximum(w, floor), min=eps**2)  # a zero Gram comes undamped

    def constants(self, values: Sequence[float], dtype: Any, like: Array) -> Array:
        """Python numbers as (K, 1, 1), on the device of an array: a list would be copied there."""
        make = partial(self.xp.full, dtype=dtype, device=device_of(like))
        runs: list[list[Any]] = []
        for value in map(float, values):  # torch compiles a `groupby` anew for each value
            if not runs or runs[-1][0] != value:
                runs.append([value, 0])
            runs[-1][1] += 1
        return self.xp.concat([make((count, 1, 1), value) for value, count in runs])

    def eigh(self, S: Array) -> tuple[Array, Array]:
        """Eigenvalues (K, r), ascending, and eigenvectors (K, r, r) of symmetric matrices.

        A member that is not finite has NaN eigenvalues; LAPACK may refuse a whole stack for it.
        """
        xp = self.xp
        finite = xp.all(xp.isfinite(S), axis=(-2, -1), keepdims=True)  # (K, 1, 1)
        eye = eye_like(xp, S)
        w, Q = xp.linalg.eigh(xp.where(finite, S, eye))
        return xp.where(finite[..., 0], w, xp.full_like(w, float("nan"))), Q

    def svd(self, X: Array) -> tuple[Array, Array, Array]:
        """The thin ``U, sigma, Vᵀ``; a member that is not finite has NaN singular values."""
        xp = self.xp
        finite = xp.all(xp.isfinite(X), axis=(-2, -1), keepdims=True)
        U, sigma, Vt = xp.linalg.svd(xp.where(finite, X, xp.zeros_like(X)), full_matrices=False)
        return U, xp.where(finite[..., 0], sigma, xp.full_like(sigma, float("nan"))), Vt

    def qr(self, X: Array) -> tuple[Array, Array]:
        """The thin ``Q R`` of (..., m, n)."""
        Q, R = self.xp.linalg.qr(X)
        return Q, R

    def inverse_cholesky(self, S: Array, *, upper: bool = False) -> Array:
        """Triangular W with ``Wᵀ W = S⁻¹`` for definite S (K, r, r) with trace about r.

        Lower W is the inverse of the Cholesky factor of S; upper W is that with rows and columns
        in reverse order. Diagonals are positive.
        """
        xp = self.xp
        w, Q = self.eigh(S)
        w = self.above_rounding(w)
        X = (Q / xp.expand_dims(w**0.5, axis=-2)).mT  # Xᵀ X = S⁻¹
        _, R = self.qr(X if upper else xp.flip(X, axis=-1))
        signs = xp.where(xp.linalg.diagonal(R) < 0, -1.0 + 0 * w, 1.0 + 0 * w)
        R = xp.expand_dims(signs, axis=-1) * R
        return R if upper else xp.flip(R, axis=(-2, -1))

    def damped_power(
        self,
        S: Array,
        exponent: float,
        damping: Array | float = 0.0,
        *,
        relative: bool = True,
        least: float = 0.0,
        lost: Array | None = None,
    ) -> Array:
        """``(S + shift I)^exponent`` for a stack (K, r, r) of Grams, each member by itself.

        The shift is ``damping tr(S)/r``, or ``damping`` itself, then also (K, 1, 1) of them; never
        below ``least tr(S)/r`` nor ``10 eps tr(S)``, what the rounding of the Gram can carry.

        Each member is scaled to trace r first, so that no factor leaves the range of the dtype. A
        member whose trace with the shift is zero or too small to be inverted gives 0: with a zero
        factor its partner is not updated, but for absolute damping. An overflown one gives 0 too,
        the limit; NaN gives NaN for itself.

        `lost` (K, 1, 1) says by how much the rank is above the outer side of each factor. So many
        eigenvalues are 0 whatever its entries are, and their directions are left out: an inverse
        would multiply rounding there by 1/shift, that of a gradient in bfloat16 is large, and
        without damping that part would take all but two digits of the rest.
        """
        H = self.damped(S, damping, relative=relative, least=least)
        if lost is None:
            power = self.spd_power(H.matrix, exponent)
        else:
            power = self.eigen_power(H.matrix, exponent, lost)
        return H.restore(self.xp, power, exponent)

    def damped_half(
        self,
        S: Array,
        damping: float = 0.0,
        *,
        relative: bool = True,
        least: float = 0.0,
        upper: bool = False,
    ) -> Array:
        """Triangular W with ``Wᵀ W = (S + shift I)⁻¹``: the inverse half power without an eigh.

        Damping, zero, overflown and NaN members are as in `damped_power`.
        """
        H = self.damped(S, damping, relative=relative, least=least)
        return H.restore(self.xp, self.inverse_cholesky(H.matrix, upper=upper), -0.5)

    def damped(self, S: Array, damping: Array | float, *, relative: bool, least: float) -> "Damped":
        """The damping and scaling of `damped_power`, which leave definite matrices."""
        xp, r, info = self.xp, S.shape[-1], self.xp.finfo(S.dtype)
        rounding = ROUNDING * r * float(info.eps)
        mean = traces(xp, S) / r  # (K, 1, 1), the mean eigenvalue
        floor = max(rounding, least)
        ratio = xp.clip(damping * xp.ones_like(mean), min=floor)
        shift = ratio * mean if relative else xp.clip(floor * mean, min=damping)
        scale = mean + shift
        live = (scale > float(info.smallest_normal) / rounding) & (scale < float(info.max))
        unit = xp.where(live, scale, xp.ones_like(scale))
        eye = eye_like(xp, S)
        shift = xp.where(live, shift, xp.zeros_like(scale))  # inf times 0 is NaN
        H = xp.where(live, (S + shift * eye) / unit, eye)  # (K, r, r)
        return Damped(H, unit, live, xp.where(xp.isnan(scale), scale, xp.zeros_like(scale)))

    def pseudo_power(self, S: Array, exponent: float, least: float = 0.0) -> Array:
        """``S^exponent`` for a stack (K, r, r) of Grams, 0 in directions that are lost in rounding.

        For methods that normalise their input: a null direction of the Gram, damped or not, would
        come back as large as the others. Lost are eigenvalues of at most `least` of the mean one,
        which is what the factors know (see `RankGroup.lost`), and of what S itself has rounded.
        """
        xp = self.xp
        H, unit, lost = self.of_trace_r(S, least)
        w, Q = self.eigh(H)
        gone = w <= lost
        power = xp.where(gone, xp.zeros_like(w), xp.where(gone, xp.ones_like(w), w) ** exponent)
        return self.matmul(Q * xp.expand_dims(power, axis=-2), Q.mT) * unit**exponent

    def pseudo_half(self, S: Array, least: float = 0.0) -> Array:
        """One of the W with ``Wᵀ W = pseudo_power(S, -1)``, for methods that no choice changes."""
        return self.pseudo_power(S, -0.5, least)

    def of_trace_r(self, S: Array, least: float) -> tuple[Array, Array, float]:
        """Grams of trace r, 0 for one too small, their divisors, and the eigenvalues that are lost.

        See `pseudo_power`.
        """
        xp, r, info = self.xp, S.shape[-1], self.xp.finfo(S.dtype)
        rounding = ROUNDING * r * float(info.eps)
        mean = traces(xp, S) / r
        zero = mean <= float(info.smallest_normal) / rounding  # or too small, as in `damped_power`
        unit = xp.where(zero, xp.ones_like(mean), mean)
        return xp.where(zero, xp.zeros_like(S), S / unit), unit, max(rounding, least)

    def inverse_root_half(self, V: Array, eps: float, X: Array, least: float = 0.0) -> Array:
        """``P X`` for one of the P with ``Pᵀ P = (V^½ + eps I)⁻¹``, semidefinite V (K, r, r).

        An eigenvalue of V that is lost, as `pseudo_power` has it, counts as the largest such one.
        """
        xp = self.xp
        w, Q = self.eigh(V)
        trace = xp.sum(w, axis=-1, keepdims=True)
        share = max(ROUNDING * float(xp.finfo(V.dtype).eps), least / V.shape[-1])
        root = xp.sqrt(xp.maximum(w, share * xp.clip(trace, min=0.0))) + eps
        lost = root == 0  # of V = 0 with eps = 0 no direction is known
        half = xp.where(lost, root, xp.where(lost, xp.ones_like(root), root) ** -0.5)
        return self.matmul((Q * xp.expand_dims(half, axis=-2)).mT, X)


def lost_below(xp: Any, rank: int, dtype: Any) -> float:
    """The eigenvalue of a Gram, relative to the mean one, up to which a direction is lost.

    What counts is the rounding of the factors, of `dtype`, whatever the dtype of the Gram is: a
    method that normalises would move along it as along the others. At least the root of float64's
    eps, where half of the digits of coordinates in the direction are gone: a step that moves the
    product there by the learning rate moves a factor by 10⁴ times as much, and with it the rest.
    """
    return max(ROUNDING * rank * float(xp.finfo(dtype).eps), 2.0**-26)


def traces(xp: Any, S: Array) -> Array:
    """Those of (K, r, r), as (K, 1, 1)."""
    return xp.reshape(xp.linalg.trace(S), (-1, 1, 1))


def eye_like(xp: Any, S: Array) -> Array:
    """The identity (1, r, r) with the dtype and device of a stack S (K, r, r).

    With as many axes, as JAX may have been told to refuse operands of fewer.
    """
    return xp.eye(S.shape[-1], dtype=S.dtype, device=device_of(S))[None, ...]

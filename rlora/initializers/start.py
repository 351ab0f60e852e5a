"""A start: a pair, and the part of the base weight that it takes over."""

from typing import NamedTuple

from rlora.core.checks import check_nonnegative
from rlora.core.dispatch import get_backend
from rlora.core.errors import ShapeError
from rlora.core.factors import Array, Factors


class Start(NamedTuple):
    """Factors to start from, and what must leave the base weight for the function to stay.

    With an offset the base weight must become ``W0 - s offset.B offset.A``: see `base`. Without
    one it stays as it is. Nothing is applied here.

    Examples
    --------
    >>> import numpy as np
    >>> import rlora
    >>> W0 = np.diag([4.0, 1.0])
    >>> start = rlora.initializers.pissa(W0, 1)
    >>> bool(np.allclose(start.base(W0, 1.0) + start.params.B @ start.params.A, W0))
    True
    """

    params: Factors
    """A (..., r, n) and B (..., m, r)."""

    offset: Factors | None = None
    """The pair whose product leaves the base weight, or None."""

    def base(self, weight: Array, scaling: float) -> Array:
        """The new base weight for ``W0 + s B A``.

        Parameters
        ----------
        weight : array of shape (..., m, n)
            W0.
        scaling : float
            The s, at least 0.

        Returns
        -------
        array of shape (..., m, n)
            In the dtype of `weight`. Round factors that will be kept in bfloat16 first, so that the
            weight makes up for it.

        Raises
        ------
        ShapeError
            When the weight has another shape than the product of the offset.
        ValueError, TypeError
            When `scaling` is negative, not finite or no number.
        """
        check_nonnegative("scaling", scaling)
        if self.offset is None:
            return weight
        A, B = self.offset
        if tuple(weight.shape) != (shape := (*B.shape[:-1], A.shape[-1])):
            msg = f"expected a weight {shape}, got {tuple(weight.shape)}; is it stored as (n, m)?"
            raise ShapeError(msg)
        backend = get_backend(weight, A, B)
        wide = backend.compute_dtype(backend.xp.result_type(weight.dtype, A.dtype))
        with backend.exact(weight):
            BA = backend.matmul(backend.cast(B, wide), backend.cast(A, wide))  # (..., m, n)
        return backend.cast(backend.cast(weight, wide) - scaling * BA, weight.dtype)


def balanced(U: Array, S: Array, Vt: Array) -> Factors:
    """``B = U S^½`` and ``A = S^½ Vᵀ``: the two Grams are equal."""
    root = S**0.5  # (..., r)
    return Factors(root[..., :, None] * Vt, U * root[..., None, :])

"""The method that a wrapper stands around."""

from rlora.core.decay import add_decayed_weights
from rlora.core.moments import scale_by_adam
from rlora.core.transform import Transform, chain, check_transform


def inner_or_adamw(
    inner: Transform | None, b1: float, b2: float, eps: float, weight_decay: float
) -> Transform:
    """The method that a wrapper is given, or AdamW; TypeError if it is no `Transform`."""
    adamw = chain(scale_by_adam(b1, b2, eps), add_decayed_weights(weight_decay))
    if inner is None:
        return adamw  # whose numbers are checked in any case
    check_transform(inner)
    return inner


def check_jacobi(method: str, inner: Transform) -> None:
    """ValueError for an inner method that moves one factor after the other."""
    if inner.order != "jacobi":
        msg = f"{method} expected a method of order='jacobi', got {inner.order!r}; give it that"
        raise ValueError(msg)

"""Shapes, devices and dtypes of pairs and of what moves them."""

from collections.abc import Sequence

from rlora.core.errors import NamespaceError, ShapeError
from rlora.core.factors import Array, Tree, check_device, paths_of


def check_pairs(params: Tree) -> None:
    """Raise a ShapeError that names the pair unless every A is (..., r, n) and B is (..., m, r)."""
    for path, pair in paths_of(params):
        where = f" of pair {path!r}" if path else ""
        for letter, x in zip("AB", pair, strict=True):
            if getattr(x, "ndim", 0) < 2:
                msg = (
                    f"factor {letter}{where} must be a matrix or a stack of them, got "
                    f"{getattr(x, 'shape', type(x).__name__)}; A is (..., r, n), B (..., m, r)"
                )
                raise ShapeError(msg)
        a, b = tuple(pair.A.shape), tuple(pair.B.shape)
        if a[:-2] != b[:-2] or a[-2] != b[-1]:
            msg = (
                f"the factors{where} do not fit: A is {a} and B is {b}, but A must be "
                f"(..., r, n) and B (..., m, r) with the same r; transpose the one that is turned"
            )
            raise ShapeError(msg)
        if 0 in (*a, *b):
            msg = (
                f"a factor{where} is empty: A is {a} and B is {b}; rank and both sides must be "
                f"at least 1, so leave a pair without a rank out"
            )
            raise ShapeError(msg)
        check_device(f"the factors{where} are", pair.A, pair.B)


def check_precision(wide: Tree) -> None:
    """Raise a NamespaceError that names the pair unless both factors compute in one dtype."""
    for path, pair in paths_of(wide):
        if pair.A.dtype != pair.B.dtype:
            msg = (
                f"the factors{f' of pair {path!r}' if path else ''} compute in {pair.A.dtype} and "
                f"{pair.B.dtype}; bring both to one dtype"
            )
            raise NamespaceError(msg)


def check_direction(direction: Sequence[Array], leaves: Sequence[Array]) -> None:
    """Raise a ShapeError unless a direction has the shapes of the parameters, where it is any."""
    for k, (d, p) in enumerate(zip(direction, leaves, strict=True)):
        if d is not None and tuple(d.shape) != tuple(p.shape):
            msg = (
                f"the update of a method must give a direction of the shape of each parameter, got "
                f"{tuple(d.shape)} for {'AB'[k % 2]} of shape {tuple(p.shape)}"
            )
            raise ShapeError(msg)

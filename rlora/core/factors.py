"""The pair (A, B), and collections of pairs: one ``Factors``, or a list or dict of them, nested."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, TypeAlias

from rlora.core.errors import NamespaceError, PairingError, ShapeError

Array: TypeAlias = Any
"""Any array of a library that follows the Array API standard."""

Tree: TypeAlias = Any
"""One ``Factors``, or a list, tuple or dict of trees; the same structure comes back."""


class Factors(NamedTuple):
    """The two factors of ``W = W0 + s B A``, or anything that comes one per factor.

    Parameters, gradients, directions and moments are all ``Factors``. In gradients and directions
    ``None`` stands for a factor that is frozen or has no gradient: it is left alone.

    Parameters
    ----------
    A : array of shape (..., r, n)
        The factor that the input meets first. Leading axes are a stack of equal layers.
    B : array of shape (..., m, r)
        The factor that makes the output.

    Examples
    --------
    >>> import numpy as np
    >>> from rlora import Factors
    >>> pair = Factors(A=np.ones((4, 16)), B=np.zeros((32, 4)))
    >>> (pair.B @ pair.A).shape
    (32, 16)
    """

    A: Array
    B: Array


def pairs_of(tree: Tree) -> list[Factors]:
    """Every pair of the collection, in the order of its lists and dicts."""
    return [pair for _, pair in _walk(tree, "")]


def _walk(tree: Tree, path: str) -> Iterator[tuple[str, Factors]]:
    if isinstance(tree, Factors):
        yield path, tree
    elif isinstance(tree, Mapping):
        for key, child in tree.items():
            yield from _walk(child, f"{path}.{key}" if path else str(key))
    elif isinstance(tree, (list, tuple)):
        for i, child in enumerate(tree):
            yield from _walk(child, f"{path}.{i}" if path else str(i))
    else:
        msg = (
            f"expected Factors, or a list or dict of them, got {type(tree).__name__}"
            f"{f' at {path}' if path else ''}; wrap the two arrays as rlora.Factors(A, B)"
        )
        raise PairingError(msg)


def map_pairs(f: Callable[..., Any], tree: Tree, *rest: Tree) -> Tree:
    """``f`` on every pair of `tree` with its counterparts in `rest`; same structure back.

    Dicts are matched by key, so that the order of insertion does not matter.
    """
    if isinstance(tree, Factors):
        if not all(isinstance(other, Factors) for other in rest):
            raise _mismatch(tree, *rest)
        return f(tree, *rest)
    if isinstance(tree, Mapping):
        if not all(isinstance(o, Mapping) and o.keys() == tree.keys() for o in rest):
            raise _mismatch(tree, *rest)
        return {key: map_pairs(f, child, *(o[key] for o in rest)) for key, child in tree.items()}
    if isinstance(tree, (list, tuple)):
        if not all(isinstance(o, (list, tuple)) and len(o) == len(tree) for o in rest):
            raise _mismatch(tree, *rest)
        return [map_pairs(f, *children) for children in zip(tree, *rest, strict=True)]
    return list(_walk(tree, ""))  # raises, naming what came


def map_leaves(f: Callable[..., Any], tree: Tree, *rest: Tree) -> Tree:
    """``f`` on every array and its counterparts; where `tree` has None the result has None."""

    def both(pair: Factors, *others: Factors) -> Factors:
        found = []
        for x, *xs in zip(pair, *others, strict=True):  # a generator would be a call for each
            found.append(None if x is None else f(x, *xs))
        return Factors(*found)

    return map_pairs(both, tree, *rest)


def unzip(count: int, tree: Tree) -> tuple[Tree, ...]:
    """A collection whose leaves are `count`-tuples, as `count` collections."""
    return tuple(map_leaves(lambda leaf, i=i: leaf[i], tree) for i in range(count))


def counterparts(tree: Tree, other: Tree) -> list[Any]:
    """The members at each pair, Factors or others, of a collection with the structure of `tree`."""
    if isinstance(tree, Factors):
        return [other]
    if isinstance(tree, Mapping):
        children = [(child, other[key]) for key, child in tree.items()]
    else:
        children = list(zip(tree, other, strict=True))
    return [x for child, its in children for x in counterparts(child, its)]


def rebuild(tree: Tree, pairs: Sequence[Any]) -> Tree:
    """A collection with the structure of `tree` and these in the places of its pairs."""
    supply = iter(pairs)
    return map_pairs(lambda _: next(supply), tree)


def where_moving(grads: Factors, new: Any, old: Any) -> Any:
    """The new value where there was a gradient: factor by factor, or for the pair as a whole."""
    if not isinstance(new, Factors):
        return old if all(g is None for g in grads) else new
    return Factors(*(o if g is None else x for g, x, o in zip(grads, new, old, strict=True)))


def leaves_of(*trees: Tree) -> list[Array]:
    """Every array of the collections, without the Nones."""
    return [x for tree in trees for pair in pairs_of(tree) for x in pair if x is not None]


def device_of(x: Array) -> Any:
    """The device to make an array on; under a JAX trace there is none to name, nor needed."""
    return None if hasattr(x, "aval") else getattr(x, "device", None)


def detached(x: Array) -> Array:
    """The array without the graph of operations that torch has for it: a step is no part of one."""
    return x.detach() if getattr(x, "requires_grad", False) else x


def check_pairs(params: Tree) -> None:
    """Raise a ShapeError that names the pair unless every A is (..., r, n) and B is (..., m, r)."""
    for path, pair in _walk(params, ""):
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
        _check_device(f"the factors{where} are", pair.A, pair.B)


def check_matches(grads: Tree, params: Tree) -> None:
    """Raise unless the gradients have the structure and the shapes of the parameters."""

    def same(param: Array, grad: Array) -> None:
        if grad is None:
            return
        shape = getattr(grad, "shape", None)
        if shape is None:
            msg = f"a gradient must be an array as its parameter is, got {type(grad).__name__}"
            raise ShapeError(msg)
        if tuple(shape) != tuple(param.shape):
            msg = (
                f"a gradient has shape {tuple(shape)} where its parameter has "
                f"{tuple(param.shape)}; pass the gradients in the order of the parameters"
            )
            raise ShapeError(msg)
        _check_device("a parameter and its gradient are", param, grad)

    map_leaves(same, params, grads)


def _check_device(what: str, x: Array, y: Array) -> None:
    one, other = device_of(x), device_of(y)
    # Devices of two kinds are those of two libraries, which `get_backend` refuses.
    if type(one) is type(other) and one != other:
        msg = f"{what} on the devices {one} and {other}; bring both to one"
        raise NamespaceError(msg)


def _mismatch(*trees: Tree) -> PairingError:
    def say(tree: Tree) -> str:
        if isinstance(tree, Mapping):
            return f"dict with keys {sorted(map(str, tree))[:6]}"
        size = "" if isinstance(tree, Factors) or not hasattr(tree, "__len__") else f"[{len(tree)}]"
        return f"{type(tree).__name__}{size}"

    kinds = " and ".join(map(say, trees))
    msg = (
        "parameters, gradients and state must be collections of one structure, got "
        f"{kinds}; build all of them from the same list or dict of Factors"
    )
    return PairingError(msg)

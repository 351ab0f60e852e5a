"""The pair (A, B), and collections of pairs: one ``Factors``, or a list or dict of them, nested."""

import itertools
import operator
from collections import OrderedDict, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
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
    return counterparts(tree, tree)[0]


def counterparts(tree: Tree, *others: Tree) -> list[list[Any]]:
    """The members at each pair, Factors or others, of collections with the structure of `tree`.

    A list for each of the others. Dicts are matched by key, so that the order of insertion does
    not matter.
    """
    if isinstance(tree, Factors):
        return [[other] for other in others]
    keys: Iterable[Any]
    children: Iterable[Any]
    if isinstance(tree, Mapping):
        keys, children = tree, tree.values()
        for other in others:
            if not isinstance(other, Mapping) or other.keys() != tree.keys():
                raise _mismatch(tree, other)
    elif isinstance(tree, (list, tuple)):
        keys, children = range(len(tree)), tree
        for other in others:
            if not isinstance(other, (list, tuple)) or len(other) != len(tree):
                raise _mismatch(tree, other)
    else:
        raise _no_pair(tree)
    if {*map(type, children)} == {Factors}:  # the way without a call for each of them
        return [list(map(other.__getitem__, keys)) for other in others]
    found: list[list[Any]] = [[] for _ in others]
    for key in keys:
        members = [other[key] for other in others]
        if isinstance(tree[key], Factors):
            for column, member in zip(found, members, strict=True):
                column.append(member)
        else:
            for column, more in zip(found, counterparts(tree[key], *members), strict=True):
                column += more
    return found


def rebuild(tree: Tree, pairs: Iterable[Any]) -> Tree:
    """A collection with the structure of `tree` and these in the places of its pairs."""
    return rebuild_each(tree, pairs)[0]


def rebuild_each(tree: Tree, *columns: Iterable[Any]) -> list[Tree]:
    """The inverse of `counterparts`: a collection of each column."""
    supplies = list(map(iter, columns))
    if isinstance(tree, Factors):
        return list(map(next, supplies))
    new: list[list[Any]]
    if {*map(type, tree.values() if isinstance(tree, Mapping) else tree)} == {Factors}:
        new = [list(itertools.islice(supply, len(tree))) for supply in supplies]
    else:
        new = [[] for _ in supplies]
        for key in tree if isinstance(tree, Mapping) else range(len(tree)):
            here = isinstance(tree[key], Factors)
            members = map(next, supplies) if here else rebuild_each(tree[key], *supplies)
            for column, member in zip(new, members, strict=True):
                column.append(member)
    if isinstance(tree, list):
        return new
    if type(tree) is dict:
        return [dict(zip(tree, x, strict=True)) for x in new]
    return [_of_kind(tree, x) for x in new]


def _of_kind(tree: Tree, children: list[Any]) -> Tree:
    """A collection of the class of another with these children."""
    kind: Any = type(tree)
    if not isinstance(tree, Mapping):
        return kind(*children) if hasattr(tree, "_fields") else tuple(children)
    made = dict(zip(tree, children, strict=True))
    if isinstance(tree, defaultdict):
        return defaultdict(tree.default_factory, made)
    # Other subclasses of dict may be made otherwise: in their place comes a plain one.
    return kind(made) if kind is OrderedDict or not isinstance(tree, dict) else made


def flatten(tree: Tree, *others: Tree) -> list[list[Array]]:
    """A, B, A, B, ... of each of the others, which have the structure of `tree`; Nones too."""
    columns = counterparts(tree, *others)
    for column in columns:
        for pair in column:
            if not isinstance(pair, Factors):
                raise _mismatch(tree, pair)
    return list(map(list, map(itertools.chain.from_iterable, columns)))


def replaced(tree: Tree, old: Sequence[Array], new: Sequence[Array]) -> Tree:
    """A collection whose leaves are `old`, with `new` ones in their places: itself if equal."""
    return tree if all(map(operator.is_, old, new)) else unflatten(tree, new)


def unflatten(tree: Tree, leaves: Sequence[Array]) -> Tree:
    """The inverse of `flatten`."""
    return rebuild_each(tree, in_pairs(leaves))[0]


def in_pairs(leaves: Sequence[Array]) -> list[Factors]:
    """A, B, A, B, ... as pairs."""
    return list(map(Factors, leaves[::2], leaves[1::2]))


def map_pairs(f: Callable[..., Any], tree: Tree, *rest: Tree) -> Tree:
    """``f`` on every pair of `tree` with its counterparts in `rest`; same structure back."""
    others = map(in_pairs, flatten(tree, *rest))
    return rebuild(tree, map(f, pairs_of(tree), *others))


def map_leaves(f: Callable[..., Any], tree: Tree, *rest: Tree) -> Tree:
    """``f`` on every array and its counterparts; where `tree` has None the result has None."""
    found = []
    for x, *xs in zip(*flatten(tree, tree, *rest), strict=True):
        found.append(None if x is None else f(x, *xs))
    return unflatten(tree, found)


def map_moving(
    f: Callable[..., Sequence[list[Array]]], *trees: Tree, like: Tree = None
) -> tuple[Tree, ...]:
    """``f`` once, on lists of arrays: those of every tree at the places where the last has one.

    Parameters
    ----------
    f : callable
        Gives the new arrays of each tree, or of the first few of them, as lists.
    *trees : Tree
        The last one has the gradients or directions. Where it has None the others stay.
    like : Tree, optional
        The structure of the results, that of the first tree by default.
    """
    like = trees[0] if like is None else like
    columns = flatten(like, *trees)
    moving = [x is not None for x in columns[-1]]
    if not any(moving):
        return trees
    results = f(*[list(itertools.compress(column, moving)) for column in columns])
    places = list(itertools.compress(range(len(moving)), moving))
    new = []
    for column, result in zip(columns, results, strict=False):
        for i, x in zip(places, result, strict=True):
            column[i] = x
        new.append(in_pairs(column))
    return *rebuild_each(like, *new), *trees[len(new) :]


def where_moving(grads: Factors, new: Any, old: Any) -> Any:
    """The new value where there was a gradient: factor by factor, or for the pair as a whole."""
    if not isinstance(new, Factors):
        return old if grads.A is None and grads.B is None else new
    return Factors(old.A if grads.A is None else new.A, old.B if grads.B is None else new.B)


def leaves_of(*trees: Tree) -> list[Array]:
    """Every array of the collections, without the Nones."""
    return [x for tree in trees for pair in pairs_of(tree) for x in pair if x is not None]


def device_of(x: Array) -> Any:
    """The device to make an array on; under a JAX trace there is none to name, nor needed."""
    return None if hasattr(x, "aval") else getattr(x, "device", None)


def indices_by_rank(
    params: Sequence[Factors], workspace: dict[Any, Any] | None = None
) -> list[list[int]]:
    """Positions of the pairs of one rank, dtype and device."""
    groups: dict[Any, list[int]] | None = (workspace or {}).get("by rank")
    if groups is None:
        groups = {}
        for i, (A, _) in enumerate(params):
            where = str(device_of(A))  # those of CuPy have no hash
            groups.setdefault((A.shape[-2], A.dtype, where), []).append(i)
        if workspace is not None:
            workspace["by rank"] = groups
    return list(groups.values())


def detached(arrays: Sequence[Array]) -> list[Array]:
    """Arrays without the graph of operations that torch has for them: a step is no part of one."""
    return [x.detach() if getattr(x, "requires_grad", False) else x for x in arrays]


def paths_of(tree: Tree, path: str = "") -> Iterator[tuple[str, Factors]]:
    """Every pair with its path, which an error has to name."""
    if isinstance(tree, Factors):
        yield path, tree
    elif isinstance(tree, (Mapping, list, tuple)):
        children = tree.items() if isinstance(tree, Mapping) else enumerate(tree)
        for key, child in children:
            yield from paths_of(child, f"{path}.{key}" if path else str(key))
    else:
        raise _no_pair(tree, path)


def check_matches(grads: Sequence[Array], params: Sequence[Array]) -> None:
    """Raise unless gradients, where there are some, have the shapes of the parameters."""
    for grad, param in zip(grads, params, strict=True):
        if grad is None or param is None:
            continue
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
        if getattr(param, "device", None) != getattr(grad, "device", None):
            check_device("a parameter and its gradient are", param, grad)


def check_device(what: str, x: Array, y: Array) -> None:
    """Raise a NamespaceError unless two arrays are on one device."""
    one, other = device_of(x), device_of(y)
    # Devices of two kinds are those of two libraries, which `get_backend` refuses.
    if type(one) is type(other) and one != other:
        msg = f"{what} on the devices {one} and {other}; bring both to one"
        raise NamespaceError(msg)


def _no_pair(tree: Tree, path: str = "") -> PairingError:
    msg = (
        f"expected Factors, or a list or dict of them, got {type(tree).__name__}"
        f"{f' at {path}' if path else ''}; wrap the two arrays as rlora.Factors(A, B)"
    )
    return PairingError(msg)


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

"""The leaves of a tree: their names, which of them are pairs, and what the others are."""

from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from numbers import Number
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import optax

from rlora.core.errors import NamespaceError, PairingError, ShapeError
from rlora.core.factors import Array, Factors
from rlora.core.layout import View
from rlora.pairing import Pair, Source, find_pairs, nothing_paired
from rlora.pairing.report import first_of

Hold: TypeAlias = Collection[str] | Callable[[str], bool]
"""Names of the leaves that stay, or what tells of a name whether its leaf does."""


def is_absent(x: Any) -> bool:
    """Return whether this stands where a leaf was left out."""
    return x is None or isinstance(x, optax.MaskedNode)


def named_leaves(tree: Any) -> dict[str, Any]:
    """The leaves by their names, keys joined by dots; those left out too.

    A ``value`` with nothing beside it is that of a flax Variable, and not a part of the name.
    """
    leaves, _ = jax.tree_util.tree_flatten_with_path(tree, is_leaf=is_absent)
    paths = [tuple(map(_word, path)) for path, _ in leaves]
    below = Counter(words[:k] for words in paths for k in range(len(words)))
    named: dict[str, Any] = {}
    for words, (_, leaf) in zip(paths, leaves, strict=True):
        of_variable = words[1:] and words[-1] == "value" and below[words[:-1]] == 1
        if (name := ".".join(words[:-1] if of_variable else words)) in named:
            msg = f"two leaves are named {name!r}, keys joined by dots: rename one of them"
            raise PairingError(msg)
        named[name] = leaf
    return named


def with_leaves(tree: Any, values: Mapping[str, Array]) -> Any:
    """A tree with other leaves, by name; what is left out of it stays out."""
    leaves = [x if is_absent(x) else values[name] for name, x in named_leaves(tree).items()]
    return jax.tree.unflatten(jax.tree.structure(tree, is_leaf=is_absent), leaves)


class Leaves(NamedTuple):
    """The leaves of a tree by what moves them."""

    all: dict[str, Array]
    pairs: Sequence[Pair]
    alone: list[str]
    """Names of those that another transformation has."""
    frozen: set[str]

    def factors(self, leaves: Mapping[str, Array]) -> list[Factors]:
        """The factors of each pair in `leaves`, as a method takes them."""

        def read(view: View, name: str) -> Array:
            x = leaves.get(name)
            return None if x is None else view.read(jnp.asarray(x))

        return [
            Factors(read(view_a, pair.a), read(view_b, pair.b))
            for pair in self.pairs
            for view_a, view_b in pair.views
        ]

    def unpaired(self, leaves: Mapping[str, Array]) -> dict[str, Array]:
        """Those of `leaves` that another transformation has."""
        return {name: leaves[name] for name in self.alone}

    def written(self, factors: Sequence[Factors]) -> dict[str, Array]:
        """The inverse of `factors`, in the dtypes of the leaves."""
        supply, out = iter(factors), {}
        for pair in self.pairs:
            A, B = zip(*(next(supply) for _ in pair.views), strict=True)
            views_a, views_b = zip(*pair.views, strict=True)
            for name, views, parts in ((pair.a, views_a, A), (pair.b, views_b, B)):
                if all(part is not None for part in parts):
                    whole = [view.write(x) for view, x in zip(views, parts, strict=True)]
                    out[name] = jnp.concatenate(whole).astype(self.all[name].dtype)
        return out


def sort_leaves(tree: Any, pairs: Source | None, hold: Hold, all_paired: bool) -> Leaves:
    """The leaves of a tree by what moves them; an error if some have nothing that does."""
    if isinstance(hold, str):
        msg = f"hold must be a collection of names or a callable, got a string; say [{hold!r}]"
        raise TypeError(msg)
    leaves = {n: _as_array(n, x) for n, x in named_leaves(tree).items() if not is_absent(x)}
    still = set(filter(hold, leaves) if callable(hold) else hold)
    if unknown := still - leaves.keys():
        msg = f"hold={min(unknown)!r} is not among the parameters: {first_of(leaves)}"
        raise PairingError(msg)
    report = find_pairs(leaves, pairs=pairs)
    for name, why in report.refused.items():
        msg = (
            f"{name} has the name of a factor, but {why}; take it out with optax.masked, and to "
            f"freeze one of a pair leave both in and name it in hold=; "
            f"in optax.partition both factors of a pair need one label"
        )
        raise PairingError(msg)
    if not any(leaves):
        found = "one array:" if leaves else "none: a mask or labels may have taken out all;"
        msg = (
            f"expected a tree of parameters with names, got {found} "
            f"optax.flatten takes the shapes of the factors away, and optax.tree.map_params needs "
            f"a state of trees like the parameters, but this one is a list over the pairs; map "
            f"over it by jax.tree.map, and init(params) lays it where the factors lie"
        )
        raise PairingError(msg)
    if not report.pairs:
        raise nothing_paired(leaves, report)
    for pair in report:
        _check_alike(pair, leaves[pair.a], leaves[pair.b])
    paired = {name for pair in report for name in (pair.a, pair.b)}
    alone = [name for name in leaves if name not in paired | still]
    if alone and all_paired:
        msg = (
            f"{len(alone)} leaves are in no pair: {first_of(alone)}; pass "
            f"rest=optax.adamw(...) for them, or take them out with optax.masked"
        )
        raise PairingError(msg)
    # By name, as states are lists over the pairs: a file may turn the key 10 into "10", which JAX
    # puts before "2".
    by_name = sorted(report.pairs, key=lambda pair: (pair.a, pair.b))
    return Leaves(leaves, by_name, alone, still)


def gradients(updates: Any, leaves: Leaves) -> dict[str, Array]:
    """The gradients by name, without those of what is frozen."""
    named = named_leaves(updates)
    grads = {name: x for name, x in named.items() if not is_absent(x)}
    absent = tuple(f"{name}." for name, x in named.items() if is_absent(x))  # or whole subtrees
    if lacking := [n for n in leaves.all if n not in named and not f"{n}.".startswith(absent)]:
        msg = (
            f"the gradients lack {first_of(lacking)}: pass one tree, with None or optax.MaskedNode "
            f"for what has no gradient"
        )
        raise PairingError(msg)
    if strange := grads.keys() - leaves.all.keys():
        msg = f"{min(strange)!r} has a gradient and is not among the parameters: pass one tree"
        raise PairingError(msg)
    for name, g in grads.items():
        p = leaves.all[name]
        if jnp.shape(g) != p.shape:
            msg = f"the gradient of {name!r} has shape {jnp.shape(g)}, its parameter {p.shape}"
            raise ShapeError(msg)
        if jnp.iscomplexobj(g) and not jnp.iscomplexobj(p):
            msg = f"the gradient of {name!r} is {g.dtype}, its parameter {p.dtype}"
            raise NamespaceError(msg)
    if idle := [name for name in leaves.alone if name not in grads]:
        msg = f"{idle[0]!r}, in no pair, has no gradient: name it in hold="
        raise PairingError(msg)
    return {name: g for name, g in grads.items() if name not in leaves.frozen}


def check_state(state: Any, expected: Any) -> None:
    """Refuse the state of another tree or method before anything is made of it."""
    shapes, wanted = ([*map(jnp.shape, jax.tree.leaves(x))] for x in (state, expected))
    structures: list[Any] = [jax.tree.structure(x) for x in (state, expected)]
    if structures[0] != structures[1] or shapes != wanted:
        msg = (
            "the state is not of this transformation and these parameters: its arrays have the "
            f"shapes {first_of(map(str, shapes))}, but {first_of(map(str, wanted))} are expected; "
            f"make it with init(params)"
        )
        raise ShapeError(msg)


def cast_like(tree: Any, other: Any) -> Any:
    """A tree in the dtypes of another; random keys, which outside of jit have no cast, stay."""

    def cast(x: Array, like: Array) -> Array:
        return x if jnp.issubdtype(like.dtype, jax.dtypes.prng_key) else x.astype(like.dtype)

    return jax.tree.map(cast, tree, other)


def _as_array(name: str, x: Any) -> Array:
    """A leaf as an array; JAX's trees may have plain numbers in them."""
    if hasattr(x, "shape"):
        return x
    if isinstance(x, Number):
        return jnp.asarray(x)
    msg = f"{name!r} is a {type(x).__name__}, no array: take it out with optax.masked"
    raise TypeError(msg)


def _check_alike(pair: Pair, a: Array, b: Array) -> None:
    if a.dtype != b.dtype:
        msg = f"{pair.a!r} is {a.dtype} and {pair.b!r} {b.dtype}: bring both to one dtype"
        raise NamespaceError(msg)
    if pair.diagonal is not None:
        msg = f"the diagonal {pair.diagonal} stands between {pair.a} and {pair.b}: no plain product"
        raise PairingError(msg)


def _word(key: Any) -> str:
    return str(getattr(key, "key", getattr(key, "name", getattr(key, "idx", key))))

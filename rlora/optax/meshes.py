"""Arrays on a mesh with explicit axes: inside a step these are automatic, outside they stay."""

from collections.abc import Callable
from numbers import Number
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from rlora.core.layout import Shape
from rlora.optax.param_tree import Leaves

make_spec: Any = PartitionSpec  # untyped

Where = Callable[[Any], Any]
"""Function of a mesh that gives the tree of shardings of a result."""


def with_automatic_axes(f: Callable[..., Any], where: Where, *args: Any) -> Any:
    """``f(*args)``, in which JAX finds the shardings.

    With explicit axes it would ask for one by hand at each sum over a sharded axis, as in a Gram.
    """
    arrays = [x for x in jax.tree.leaves(args) if isinstance(x, jax.Array)]
    meshes = [jax.typeof(x).sharding.mesh for x in arrays]
    mesh = next((mesh for mesh in meshes if AxisType.Explicit in mesh.axis_types), None)
    if mesh is None:
        return f(*args)
    types = zip(mesh.axis_names, mesh.axis_types, strict=True)
    axes = tuple(name for name, kind in types if kind == AxisType.Explicit)
    leaves, structure = jax.tree.flatten(args)
    traced = [i for i, x in enumerate(leaves) if isinstance(x, (jax.Array, np.ndarray, Number))]

    def over(*arrays: Any) -> Any:  # what else there is, as the function of a line search, stays
        values = dict(enumerate(leaves)) | dict(zip(traced, arrays, strict=True))
        return f(*jax.tree.unflatten(structure, values.values()))

    # Under jit, so that outside of it too everything runs on the devices of the arguments.
    inside = jax.sharding.auto_axes(over, axes=axes, out_sharding=where(mesh))
    return jax.jit(inside, keep_unused=True)(*(leaves[i] for i in traced))


def as_they_are(tree: Any) -> Where:
    """The shardings that the arrays of a tree have."""
    return lambda mesh: jax.tree.map(lambda x: NamedSharding(mesh, _spec(x)), tree)


def beside_factors(state: Any, leaves: Leaves) -> Where:
    """For a new state: what has the shape of a factor lies as it does, the rest everywhere."""
    known: dict[Shape, Any] = {x.shape: _spec(x) for x in leaves.all.values()}
    for pair in leaves.pairs:
        for view, name in zip(pair.views[0], (pair.a, pair.b), strict=True):
            if view.split == view.stored:  # axes in another order, but the same
                spec = _spec(leaves.all[name])
                known[view.shape] = make_spec(*(spec[i] for i in view.order))
    whole = make_spec()
    return lambda mesh: jax.tree.map(
        lambda x: NamedSharding(mesh, known.get(x.shape, whole)), state
    )


def shapes_of(tree: Any) -> Any:
    """A tree of arrays without the arrays, and on no mesh."""
    shape: Any = jax.ShapeDtypeStruct  # untyped
    return jax.tree.map(lambda x: shape(jnp.shape(x), jnp.result_type(x)), tree)


def _spec(x: Any) -> Any:
    """The partition of an array; that of one on no mesh is empty."""
    return jax.typeof(x).sharding.spec

"""A method is a pair of pure functions, and a chain of methods is a method."""

from functools import wraps
from itertools import islice
from numbers import Real
from operator import is_
from typing import Any, Literal, NamedTuple, Protocol, TypeAlias, TypeVar, cast, get_args

from rlora.core.checks import check_scaling
from rlora.core.dispatch import get_backend
from rlora.core.factor_checks import check_direction, check_pairs, check_precision
from rlora.core.factors import (
    Array,
    Tree,
    check_matches,
    flatten,
    map_leaves,
    map_moving,
    map_pairs,
    replaced,
    unflatten,
)
from rlora.core.structure import check_state, same_shapes

State: TypeAlias = Any
"""Named tuples, tuples, lists and dicts of arrays: nothing else."""

Order = Literal["jacobi", "gauss_seidel"]


class InitFn(Protocol):
    """State of a method before the first step; no array of it in the memory of another one."""

    def __call__(self, params: Tree, scaling: float = 1.0) -> State: ...


class UpdateFn(Protocol):
    """Gradients to a direction and the next state; pure, and jit-able.

    Inside of a step with ``donate=True`` an `update` of the library may write over the state that
    it is given: one that calls it reads the old state before, and uses the new one afterwards.
    """

    def __call__(self, grads: Tree, state: State, params: Tree) -> tuple[Tree, State]: ...


class ApplyFn(Protocol):
    """Parameters after a step of size `lr` along a direction."""

    def __call__(self, params: Tree, direction: Tree, lr: Array | float) -> Tree: ...


Apply = TypeVar("Apply", bound=ApplyFn)


class TransportFn(Protocol):
    """The state after the parameters have changed from `old` to `new`.

    In `old` a factor that had no gradient must be None: its share of the state has stayed.
    """

    def __call__(self, state: State, old: Tree, new: Tree) -> State: ...


def stay(state: State, old: Tree, new: Tree) -> State:
    """The transport of a state that does not depend on where the parameters are."""
    return state


def no_state(params: Tree, scaling: float = 1.0) -> tuple[()]:
    """The state of a transformation that has none."""
    return ()


def pass_on(grads: Tree, state: State, params: Tree) -> tuple[Tree, State]:
    """The `update` of a transformation that only brings an `apply` of its own, or nothing."""
    return grads, state


def one_side(tree: Tree, side: Literal["A", "B"]) -> Tree:
    """A collection with None in the place of each other factor."""
    return map_pairs(lambda pair: pair._replace(**{"B" if side == "A" else "A": None}), tree)


def still_at_zero(apply: Apply) -> Apply:
    """The same update, but for a learning rate of 0, which changes no bit of the parameters.

    ``p - 0 d`` alone does not promise that: it is NaN for a d that is not finite, and an update
    that splits the product anew changes both factors at any learning rate. `chain` does this to
    the `apply` of its transformations.

    Parameters
    ----------
    apply : callable
        ``apply(params, direction, lr) -> params``.
    """

    @wraps(apply)
    def move(params: Tree, direction: Tree, lr: Array | float, **how: bool) -> Tree:
        if isinstance(lr, Real):
            return apply(params, direction, lr, **how) if lr else params

        zero = lr == 0  # nothing asks an array for its value

        def unless_zero(old: Array, new: Array) -> Array:
            return get_backend(old).xp.where(zero, old, new)

        return map_leaves(unless_zero, params, apply(params, direction, lr))

    return cast("Apply", move)


def rounded_once(apply: ApplyFn) -> ApplyFn:
    """The same update in at least float32, its result rounded to the parameters' dtype."""

    @wraps(apply)
    def move(params: Tree, direction: Tree, lr: Array | float) -> Tree:
        (wide,) = _widen(params)
        moved = apply(wide, direction, lr)
        return map_leaves(lambda x, p: get_backend(x).cast(x, p.dtype), moved, params)

    return still_at_zero(move)


@still_at_zero
def apply_updates(
    params: Tree, direction: Tree, lr: Array | float, *, donate: bool = False
) -> Tree:
    """``params - lr * direction``, rounded to the parameters' dtype last.

    Parameters
    ----------
    params : Factors, or list or dict of them
        A (..., r, n) and B (..., m, r).
    direction : same structure
        The direction of `Transform.update`. Where it is None the parameter is returned as it is.
    lr : float or array
        Learning rate.
    donate : bool
        Write over the parameters where that saves memory; not where `lr` is an array.

    Returns
    -------
    Factors, or list or dict of them
        New arrays; the given ones are not written to without `donate`. With an `lr` of 0 the given
        ones.
    """

    def move(old: list[Array], D: list[Array]) -> tuple[list[Array]]:
        backend = get_backend(*old, *D)
        moved = backend.add_scaled(backend.cast_like(old, D), D, -lr, donate=donate)
        return (backend.cast_like(moved, old),)

    moved, _ = map_moving(move, params, direction)
    return moved


class Transform(NamedTuple):
    """A method, or one transformation in a chain.

    Parameters
    ----------
    init : callable
        ``init(params, scaling=1.0) -> state``. `scaling` is the s of ``W0 + s B A``, positive.
    update : callable
        ``update(grads, state, params) -> (direction, state)``. A factor whose gradient is None
        gets the direction None, and its share of the state stays as it was, except for what a
        method keeps of both factors together or of how the partner has turned.
    apply : callable, optional
        ``apply(params, direction, lr) -> params``: `apply_updates`, a straight line, unless the
        method has its own, as the decay of the official scaled AdamW. With an `lr` of 0 no
        parameter may change; `chain` sees to that.
    order : {"jacobi", "gauss_seidel"}, optional
        Whether `step` updates both factors at once, or A first and then B, which sees the new A.
    transport : callable, optional
        ``transport(state, old, new) -> state``, called by `step` after the update: for states
        whose coordinates turn with the factors, as the moments of LoRA-RITE do. Code that calls
        `update` and `apply` by hand calls it too, with None in `old` where a gradient was None.
    sharded : bool, optional
        True for a method that sees factors by Grams, by products with r x r matrices and entrywise
        alone: it steps pieces of sharded factors, each process those that it has. Others get whole
        factors.
    together : bool, optional
        True for a method in which the step of a pair depends on other pairs, as a norm over all of
        them does. The torch classes step the others a few at a time; such a method has all pairs of
        one group and device at once, the sharded ones apart.
    """

    init: InitFn
    update: UpdateFn
    apply: ApplyFn = apply_updates
    order: Order = "jacobi"
    transport: TransportFn = stay
    sharded: bool = False
    together: bool = False


def check_transform(method: Any) -> None:
    """TypeError unless this is a method, or one transformation; ValueError for its order."""
    if not isinstance(method, Transform):
        name = getattr(method, "__name__", type(method).__name__)
        hint = f"; call it: {name}(...)" if callable(method) else ""
        msg = f"expected a Transform, as rlora.scaled_adamw() gives one, got {name}{hint}"
        raise TypeError(msg)
    if method.order not in get_args(Order):
        msg = f"order must be 'jacobi' or 'gauss_seidel', got {method.order!r}"
        raise ValueError(msg)


def chain(*transforms: Transform) -> Transform:
    """Transforms one after the other, each taking the direction of the one before.

    Inputs are validated here: parameters are checked when the state is made, and cast up to at
    least float32 once, before the first transformation, as gradients are to the dtype of theirs.

    Parameters
    ----------
    *transforms : Transform
        At most one of them may bring an `apply` of its own.

    Returns
    -------
    Transform
        Its state is the tuple of the transformations' states.

    Examples
    --------
    >>> import rlora
    >>> from rlora.core.moments import clip_by_global_norm, momentum, scale_by_adam
    >>> clipped_adam = rlora.chain(clip_by_global_norm(1.0), scale_by_adam())
    """
    for transform in transforms:
        check_transform(transform)
    bent = [transform.apply for transform in transforms if transform.apply is not apply_updates]
    if len(bent) > 1:
        msg = f"at most one transformation of a chain may bring its own apply, got {len(bent)}"
        raise ValueError(msg)
    orders: set[Order] = {transform.order for transform in transforms}
    if "gauss_seidel" in orders and any(transform.together for transform in transforms):
        msg = (
            "a method with order='gauss_seidel' moves A first and then B: a norm over both, as "
            "clip_by_global_norm takes it, is none of a whole step; use order='jacobi'"
        )
        raise ValueError(msg)

    def init(params: Tree, scaling: float = 1.0) -> State:
        check_pairs(params)
        check_scaling(scaling)
        (wide,) = _widen(params)
        check_precision(wide)
        return tuple(transform.init(wide, scaling) for transform in transforms)

    def update(grads: Tree, state: State, params: Tree) -> tuple[Tree, State]:
        leaves, G = flatten(params, params, grads)
        check_matches(G, leaves)
        backend = get_backend(*leaves, *G)
        both = backend.widen([*leaves, *G])
        P, G = both[: len(leaves)], both[len(leaves) :]
        wide = replaced(params, leaves, P)
        direction = unflatten(params, backend.cast_like(G, P))
        states = []
        try:
            for transform, old in zip(transforms, state, strict=True):
                direction, new = transform.update(direction, old, wide)
                states.append(new)
        except Exception as error:
            check_state(state, lambda: init(params), error)
            raise
        (D,) = flatten(params, direction)
        fits = all(d is None or d.shape == p.shape for d, p in zip(D, leaves, strict=True))
        if not (fits and same_shapes(state, tuple(states))):  # broadcasting may have hidden it
            check_state(state, lambda: init(params))
            check_direction(D, leaves)
        return direction, tuple(states)

    def transport(state: State, old: Tree, new: Tree) -> State:
        old, new = _widen(old, new)
        pieces = zip(transforms, state, strict=True)
        return tuple(transform.transport(own, old, new) for transform, own in pieces)

    return Transform(
        init,
        update,
        still_at_zero(bent[0]) if bent else apply_updates,
        "gauss_seidel" if "gauss_seidel" in orders else "jacobi",
        transport if any(transform.transport is not stay for transform in transforms) else stay,
        all(transform.sharded for transform in transforms),
        any(transform.together for transform in transforms),
    )


def _widen(*trees: Tree) -> list[Tree]:
    """Collections of one structure with their leaves in `Backend.compute_dtype`."""
    like = trees[0]  # dicts may have their keys in several orders
    columns = flatten(like, *trees)
    leaves = [x for column in columns for x in column]
    wide = iter(get_backend(*leaves).widen(leaves))
    pieces = [list(islice(wide, len(column))) for column in columns]
    found = zip(trees, columns, pieces, strict=True)
    return [tree if all(map(is_, old, new)) else unflatten(like, new) for tree, old, new in found]

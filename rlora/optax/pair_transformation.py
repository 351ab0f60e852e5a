"""A method as an optax transformation of any pytree, whose pairs are found by the names in it."""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import optax

from rlora.core.checks import checked_rate, is_traced
from rlora.core.factors import Array, Factors, map_leaves
from rlora.core.metric import DampingMode
from rlora.core.step import step
from rlora.core.transform import State, Transform, check_transform
from rlora.methods.scaled import scale_by_gram as core_scale_by_gram
from rlora.optax.meshes import as_they_are, beside_factors, shapes_of, with_automatic_axes
from rlora.optax.param_tree import (
    Hold,
    Leaves,
    cast_like,
    check_state,
    gradients,
    sort_leaves,
    with_leaves,
)
from rlora.pairing import Source

Move: TypeAlias = Callable[[list[Factors], list[Factors], State, Array], tuple[Any, State]]


class Built(NamedTuple):
    """A method with its options: how the state of all pairs begins, and how they move."""

    init: Callable[[list[Factors]], State]
    move: Move


class PairState(NamedTuple):
    """State of a transformation."""

    count: Array
    """Steps taken."""

    method: State
    """State of the method, a list over the pairs in the order of their names."""

    rest: Any
    """State of `rest`, the transformation of all other parameters."""


def transformation(
    method: Transform,
    learning_rate: optax.ScalarOrSchedule,
    *,
    pairs: Source | None = None,
    hold: Hold = (),
    scaling: float = 1.0,
    rest: optax.GradientTransformation | None = None,
) -> optax.GradientTransformationExtraArgs:
    """A method as an optax transformation, learning rate included.

    Parameters
    ----------
    method : Transform
        Such as ``rlora.lora_rite()``.
    learning_rate : float, array or schedule
        A schedule is called with the number of steps taken.
    pairs : sequence of (str, str) or (str, str, Layout), Convention or callable, optional
        The names of A and B, keys joined by dots, with the layout if it is not A (r, n) and
        B (m, r); or one of the other ways of `rlora.find_pairs` to say them. By default the
        known names are found by themselves.
    hold : collection of str, or callable, optional
        Names of leaves that stay, or a function that says of a name whether its leaf does. A
        frozen factor is bit for bit what it was, and its Gram still preconditions the other one.
        Leaves whose gradient is None or `optax.MaskedNode` stay without being named, and have
        such an update, which `optax.apply_updates` refuses: leave them out of both trees first.
    scaling : float
        The s of ``W0 + s B A``.
    rest : GradientTransformation, optional
        For the leaves in no pair. Without one such leaves are an error.

    Returns
    -------
    GradientTransformationExtraArgs
        Its updates, added to the parameters, are the step of the method: nothing that scales or
        adds may come after it in a chain. Leaves that `optax.masked` has taken out are not seen.

    Raises
    ------
    PairingError
        When no pair is found, a leaf has the name of a factor and is in no pair, another leaf is
        in no pair and `rest` is None, or gradients and parameters are different trees.
    ShapeError
        When factors given by name do not fit together, or a state or gradient has other shapes.
    NamespaceError
        When the factors of a pair have two dtypes, or a parameter or gradient is not real.
    ValueError
        When `update` gets no parameters, or the state for them; when the rate is out of range.
    TypeError
        When `method` is no `Transform`, as a function that makes one is none, `hold` is a string,
        or the learning rate or a leaf no number.

    Examples
    --------
    >>> import jax.numpy as jnp
    >>> import optax, rlora, rlora.optax
    >>> params = {"q": {"lora_a": jnp.ones((16, 4)), "lora_b": jnp.zeros((4, 32))}}
    >>> optimizer = rlora.optax.transformation(rlora.lora_rite(), 1e-3)
    >>> state = optimizer.init(params)
    >>> updates, state = optimizer.update(params, state, params)
    >>> params = optax.apply_updates(params, updates)
    """
    check_transform(method)
    return of_options(lambda: method, {}, learning_rate, scaling, pairs, hold, rest)


def of_options(
    make: Callable[..., Transform],
    options: Mapping[str, Any],
    learning_rate: Any,
    scaling: Any,
    pairs: Source | None,
    hold: Hold,
    rest: optax.GradientTransformation | None,
) -> optax.GradientTransformationExtraArgs:
    """The `transformation` of ``make(**options)``, whose options may be arrays."""
    if not callable(learning_rate):
        checked_rate(learning_rate)

    def build(learning_rate: Any, scaling: Any, **options: Any) -> Built:
        method = make(**options)

        def move(
            params: list[Factors], grads: list[Factors], state: State, count: Array
        ) -> tuple[Any, State]:
            lr = learning_rate(count) if callable(learning_rate) else learning_rate
            moved, state = step(method, params, grads, state, lr)
            return map_leaves(lambda new, old: new - old, moved, params), state

        return Built(lambda params: method.init(params, scaling), move)

    sort = partial(sort_leaves, pairs=pairs, hold=hold, all_paired=rest is None)
    numbers = {"learning_rate": learning_rate, "scaling": scaling, **options}
    return _over_pairs(build, numbers, sort, rest)


def scale_by_gram(
    *,
    pairs: Source | None = None,
    hold: Hold = (),
    damping: float = 1e-4,
    damping_mode: DampingMode = "covariant",
    compute_dtype: str | None = None,
) -> optax.GradientTransformationExtraArgs:
    """The preconditioned gradients ``H_A⁻¹ G_A`` and ``G_B H_B⁻¹``, to be chained with others.

    Leaves in no pair pass through.

    Parameters
    ----------
    pairs, hold
        See `transformation`.
    damping, damping_mode, compute_dtype
        See `rlora.scaled_adamw`.

    Returns
    -------
    GradientTransformationExtraArgs
        Its state is a count of steps.

    Examples
    --------
    >>> import optax, rlora.optax
    >>> scaled = optax.chain(rlora.optax.scale_by_gram(), optax.sgd(0.1, momentum=0.9))
    """

    def build(**options: Any) -> Built:
        method = core_scale_by_gram(
            damping_mode=damping_mode, compute_dtype=compute_dtype, **options
        )

        def move(
            params: list[Factors], grads: list[Factors], state: State, count: Array
        ) -> tuple[Any, State]:
            return method.update(grads, state, params)

        return Built(method.init, move)

    sort = partial(sort_leaves, pairs=pairs, hold=hold, all_paired=False)
    return _over_pairs(build, {"damping": damping}, sort, None)


def _over_pairs(
    build: Callable[..., Built],
    options: Mapping[str, Any],
    sort: Callable[[Any], Leaves],
    rest: optax.GradientTransformation | None,
) -> optax.GradientTransformationExtraArgs:
    build(**options)  # what is wrong is refused now
    others = optax.with_extra_args_support(rest or optax.identity())
    # Arrays among the options go in as the parameters do: a function on a mesh with explicit axes
    # can use none that it finds outside.
    numbers = {name: x for name, x in options.items() if is_traced(x)}
    build = partial(build, **{name: x for name, x in options.items() if name not in numbers})

    def start(params: Any, numbers: dict[str, Array]) -> PairState:
        leaves = sort(params)
        state = PairState(
            jnp.zeros((), jnp.int32),
            build(**numbers).init(leaves.factors(leaves.all)),
            others.init(leaves.unpaired(leaves.all)),
        )
        owned: PairState = jax.tree.map(jnp.copy, state)  # each its own buffer, to be donated
        return owned

    def advance(
        updates: Any, state: PairState, params: Any, numbers: Any, extra: dict[str, Any]
    ) -> tuple[Any, PairState]:
        leaves = sort(params)
        grads = gradients(updates, leaves)
        check_state(state, jax.eval_shape(start, params, numbers))
        state = jax.tree.map(jnp.asarray, state)  # those of a file are NumPy's
        P, G = leaves.factors(leaves.all), leaves.factors(grads)
        steps, inner = build(**numbers).move(P, G, state.method, state.count)
        plain, rest_state = others.update(
            leaves.unpaired(grads), state.rest, leaves.unpaired(leaves.all), **extra
        )
        still = {name: jnp.zeros_like(leaves.all[name]) for name in leaves.frozen}
        after = PairState(optax.safe_increment(state.count), inner, rest_state)
        # Hyperparameters that are arrays may be of a wider dtype than the state.
        after = cast_like(after, state)
        return with_leaves(updates, plain | leaves.written(steps) | still), after

    def init(params: Any) -> PairState:
        def where(mesh: Any) -> Any:
            shapes = shapes_of((params, numbers))
            return beside_factors(jax.eval_shape(start, *shapes), sort(params))(mesh)

        state: PairState = with_automatic_axes(start, where, params, numbers)
        return state

    def update(
        updates: Any, state: PairState, params: Any = None, **extra: Any
    ) -> tuple[Any, PairState]:
        if params is None or isinstance(params, PairState):
            msg = f"call update(grads, state, params): got {type(params).__name__} as parameters"
            raise ValueError(msg)
        given = (updates, state, params, numbers, extra)
        out: tuple[Any, PairState] = with_automatic_axes(advance, as_they_are(given[:2]), *given)
        return out

    return optax.GradientTransformationExtraArgs(init, update)

"""The methods as optax transformations of any pytree of parameters.

The pairs are found by the names in the tree, or given. `transformation` makes one out of a
method; `scaled_adamw`, `lora_rite` and the others are shorthand.
"""

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, TypeAlias, cast

import jax
import jax.numpy as jnp
import optax

from rlora import methods
from rlora.core.errors import PairingError
from rlora.core.factors import Array, Factors
from rlora.core.transform import State, Transform, step
from rlora.layouts import Layout, Pairs, find_layouts
from rlora.methods.scaled import scale_by_gram as gram_link

__all__ = ["scale_by_gram", "transformation"]
__all__ += methods.__all__

Move: TypeAlias = Callable[[list[Factors], list[Factors], State, Array], tuple[Any, State]]


class PairState(NamedTuple):
    """What a transformation keeps between two steps."""

    count: Array
    """Steps taken."""

    method: State
    """Of the method, a list over the pairs."""

    rest: Any
    """Of the transformation of all other parameters."""


def transformation(
    method: Transform,
    learning_rate: optax.ScalarOrSchedule,
    *,
    pairs: Pairs = None,
    turned: bool | None = None,
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
    pairs : sequence of (str, str), or callable, optional
        The names of A and B, keys joined by dots; or a function of a dict from name to leaf that
        gives them. By default ``lora_a`` and ``lora_b``, ``lora_A`` and ``lora_B``,
        ``lora_kernel_a`` and so on are found by themselves.
    turned : bool, optional
        Whether the leaves are a (..., n, r) and b (..., r, m), as flax, Keras and mlx keep them,
        or A (..., r, n) and B (..., m, r). By default the shapes tell; where both would fit, the
        names do: a capital letter for the latter.
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
        When no pair is found, one of a pair is missing, or a leaf is in no pair and `rest` is
        None.
    ShapeError
        When the factors of a pair do not fit together.
    ValueError
        When `update` is called without parameters.

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

    def move(
        params: list[Factors], grads: list[Factors], state: State, count: Array
    ) -> tuple[Any, State]:
        lr = learning_rate(count) if callable(learning_rate) else learning_rate
        moved, state = step(method, params, grads, state, lr)
        steps = [
            Factors(*(new - old for new, old in zip(*both, strict=True)))
            for both in zip(moved, params, strict=True)
        ]
        return steps, state

    return _over_pairs(method, move, pairs, turned, scaling, rest)


def scale_by_gram(
    *, pairs: Pairs = None, turned: bool | None = None, **options: Any
) -> optax.GradientTransformationExtraArgs:
    """The preconditioned gradients ``H_A⁻¹ G_A`` and ``G_B H_B⁻¹``, to be chained with others.

    Leaves in no pair pass through.

    Parameters
    ----------
    pairs, turned
        See `transformation`.
    **options
        Of `rlora.methods.scaled.scale_by_gram`: damping, damping_mode, compute_dtype.

    Examples
    --------
    >>> import optax, rlora.optax
    >>> scaled = optax.chain(rlora.optax.scale_by_gram(damping=1e-4), optax.sgd(0.1, momentum=0.9))
    """
    link = gram_link(**options)

    def move(
        params: list[Factors], grads: list[Factors], state: State, count: Array
    ) -> tuple[Any, State]:
        return link.update(grads, state, params)

    return _over_pairs(link, move, pairs, turned, 1.0, optax.identity())


def _over_pairs(
    method: Transform,
    move: Move,
    pairs: Pairs,
    turned: bool | None,
    scaling: float,
    rest: optax.GradientTransformation | None,
) -> optax.GradientTransformationExtraArgs:
    others = optax.with_extra_args_support(rest or optax.identity())

    def sort(params: Any) -> tuple[dict[str, Array], list[Layout], list[str]]:
        leaves = _named_leaves(params)
        layouts = find_layouts(leaves, pairs, turned)
        paired = {i for layout in layouts for i in (layout.a, layout.b)}
        alone = [name for i, name in enumerate(leaves) if i not in paired]
        if alone and rest is None:
            msg = (
                f"{len(alone)} leaves are in no pair: {', '.join(alone[:5])}; pass "
                f"rest=optax.adamw(...) for them, or take them out with optax.masked"
            )
            raise PairingError(msg)
        return leaves, layouts, alone

    def init(params: Any) -> PairState:
        leaves, layouts, alone = sort(params)
        state = PairState(
            jnp.zeros((), jnp.int32),
            method.init(_factors(leaves, layouts), scaling),
            others.init({name: leaves[name] for name in alone}),
        )
        owned: PairState = jax.tree.map(jnp.copy, state)  # each its own buffer, to be donated
        return owned

    def update(
        updates: Any, state: PairState, params: Any = None, **extra: Any
    ) -> tuple[Any, PairState]:
        if params is None:
            msg = "the step depends on the parameters: call update(grads, state, params)"
            raise ValueError(msg)
        leaves, layouts, alone = sort(params)
        values, structure = jax.tree.flatten(updates)
        if len(values) != len(leaves):
            msg = f"got {len(values)} gradients for {len(leaves)} parameters; pass matching trees"
            raise PairingError(msg)
        grads = dict(zip(leaves, values, strict=True))
        steps, inner = move(
            _factors(leaves, layouts), _factors(grads, layouts), state.method, state.count
        )
        plain, rest_state = others.update(
            {name: grads[name] for name in alone},
            state.rest,
            {name: leaves[name] for name in alone},
            **extra,
        )
        moved = plain | _leaves_of(steps, layouts, leaves)
        out = jax.tree.unflatten(structure, [moved[name] for name in leaves])
        return out, PairState(optax.safe_increment(state.count), inner, rest_state)

    return optax.GradientTransformationExtraArgs(init, update)


def _named_leaves(tree: Any) -> dict[str, Array]:
    leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
    return {_name(path): leaf for path, leaf in leaves}


def _name(path: Any) -> str:
    words = [
        str(getattr(key, "key", getattr(key, "name", getattr(key, "idx", key)))) for key in path
    ]
    return ".".join(words[:-1] if words[-1:] == ["value"] else words)  # of a flax Variable


def _factors(leaves: Mapping[str, Array], layouts: Sequence[Layout]) -> list[Factors]:
    values = list(leaves.values())

    def pair(layout: Layout) -> Factors:
        A, B = values[layout.a], values[layout.b]
        if not layout.turned:
            return Factors(A, B)
        if A.ndim != B.ndim:  # several axes in or out, as in an einsum
            A, B = A.reshape(-1, A.shape[-1]), B.reshape(B.shape[0], -1)
        return Factors(jnp.matrix_transpose(A), jnp.matrix_transpose(B))

    return [pair(layout) for layout in layouts]


def _leaves_of(
    pairs: Sequence[Factors], layouts: Sequence[Layout], leaves: Mapping[str, Array]
) -> dict[str, Array]:
    """The inverse of `_factors`, in the shapes and dtypes of the leaves."""
    names, out = list(leaves), {}
    for layout, pair in zip(layouts, pairs, strict=True):
        for i, x in zip((layout.a, layout.b), pair, strict=True):
            like = leaves[names[i]]
            x = jnp.matrix_transpose(x) if layout.turned else x
            out[names[i]] = x.reshape(like.shape).astype(like.dtype)
    return out


def _shorthand(method: Callable[..., Transform]) -> Callable[..., Any]:
    whole = inspect.signature(transformation)
    ours = whole.replace(parameters=[p for p in whole.parameters.values() if p.name != "method"])

    def make(learning_rate: optax.ScalarOrSchedule, **options: Any) -> Any:
        shared = {name: options.pop(name) for name in ours.parameters if name in options}
        return transformation(method(**options), learning_rate, **shared)

    # As `inject_hyperparams` sees it: numbers among a method's options would be traced.
    cast("Any", make).__signature__ = ours
    make.__name__ = make.__qualname__ = method.__name__
    make.__doc__ = (
        f"`rlora.{method.__name__}`, with its options, as `transformation` makes it of a method."
    )
    return make


adapre_lora = _shorthand(methods.adapre_lora)
alt_lora = _shorthand(methods.alt_lora)
alt_lora_plus = _shorthand(methods.alt_lora_plus)
lora_fa = _shorthand(methods.lora_fa)
lora_muon = _shorthand(methods.lora_muon)
lora_plus = _shorthand(methods.lora_plus)
lora_pro_adamw = _shorthand(methods.lora_pro_adamw)
lora_pro_sgd = _shorthand(methods.lora_pro_sgd)
lora_rite = _shorthand(methods.lora_rite)
lora_sb = _shorthand(methods.lora_sb)
rac_lora = _shorthand(methods.rac_lora)
ref_lora = _shorthand(methods.ref_lora)
riemannion = _shorthand(methods.riemannion)
scaled_adamw = _shorthand(methods.scaled_adamw)
scaled_sgd = _shorthand(methods.scaled_sgd)

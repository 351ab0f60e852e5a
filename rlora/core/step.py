"""One optimizer step with any method: a function of parameters, gradients and state."""

from numbers import Real

from rlora.core.checks import check_rates, checked_rate
from rlora.core.dispatch import get_backend
from rlora.core.errors import NamespaceError, PairingError
from rlora.core.factors import Array, Tree, detached, flatten, leaves_of, replaced, unflatten
from rlora.core.structure import another_state, side_by_side
from rlora.core.transform import State, Transform, apply_updates, check_transform, one_side, stay


def step(
    transform: Transform,
    params: Tree,
    grads: Tree,
    state: State,
    lr: Array | float,
    *,
    donate: bool = False,
) -> tuple[Tree, State]:
    """One optimizer step: the direction, then the update of the parameters.

    Parameters
    ----------
    transform : Transform
        A method, such as `rlora.scaled_adamw()`.
    params, grads : Factors, or list or dict of them
        A (..., r, n) and B (..., m, r) with their gradients; a gradient may be None.
    state : State
        From ``transform.init(params)`` or the step before.
    lr : float or array
        Learning rate, finite and at least 0; of an array the value is not asked for. An array has
        one real number, or (..., 1, 1) of them, one for each layer of a stack.
    donate : bool
        Parameters, gradients and state may be written over, and what comes back may lie in their
        memory: quicker where memory is what a step spends its time on, in NumPy most of all. Use
        what comes back, and nothing of what was given, not even after an error. No parameter may
        stand in two places: it would be written to twice.

    Returns
    -------
    params, state
        Arrays in the structure of the old, new ones without `donate`; the given ones where nothing
        has moved, without a gradient or with an `lr` of 0. Those of torch require no gradient,
        whatever came: a step is no part of a graph. For the next one set ``requires_grad_()``.

    Raises
    ------
    ShapeError
        When pairs, gradients or state do not fit together.
    PairingError
        When a parameter to be donated is in two places, or is what a gradient lies in that is read
        after it is written over.
    ValueError, TypeError
        When the learning rate is out of its range, or no number; when `transform` is no method.
    NamespaceError
        When arrays are of two libraries, on two devices, or no real floating-point ones.

    Examples
    --------
    >>> import numpy as np
    >>> import rlora
    >>> rng = np.random.default_rng(0)
    >>> target = rng.normal(size=(30, 2)) @ rng.normal(size=(2, 20))
    >>> pair = rlora.Factors(rng.normal(size=(4, 20)) / 4, np.zeros((30, 4)))
    >>> method = rlora.scaled_sgd()
    >>> state = method.init(pair)
    >>> for _ in range(20):
    ...     error = pair.B @ pair.A - target
    ...     grads = rlora.Factors(pair.B.T @ error, error @ pair.A.T)
    ...     pair, state = rlora.step(method, pair, grads, state, lr=0.5)
    >>> bool(np.abs(pair.B @ pair.A - target).max() < 1e-2)
    True
    """
    check_transform(transform)
    (leaves,) = flatten(params, params)
    params, (lr,) = unflatten(params, detached(leaves)), detached([lr])
    if not donate:
        return move(transform, params, grads, state, lr)
    backend = get_backend(*leaves)
    places = list(map(backend.address, leaves))
    if len(set(places)) < len(places):
        msg = (
            "with donate=True each parameter is written to once, got one that is in two places; "
            "give each place a copy of its own, or leave donate out"
        )
        raise PairingError(msg)
    if transform.order == "gauss_seidel":
        of_b = flatten(params, grads)[0][1::2]
        if not {backend.address(g) for g in of_b if g is not None}.isdisjoint(places[::2]):
            msg = (
                "with donate=True and order='gauss_seidel' A is written over before the gradient "
                "of B is read, got a gradient of B in the memory of an A; give the gradient a copy "
                "of its own, or leave donate out"
            )
            raise PairingError(msg)
    with backend.reusing({}):
        return move(transform, params, grads, state, lr, donate=True)


def move(
    transform: Transform,
    params: Tree,
    grads: Tree,
    state: State,
    lr: Array | float,
    *,
    donate: bool = False,
) -> tuple[Tree, State]:
    """A `step` of parameters that are in no graph of torch and, with `donate`, not checked.

    `donate` is of the parameters alone: the state is written over inside of `Backend.reusing`.
    """
    lr = checked_rate(lr)
    if not isinstance(lr, Real):
        lr = _beside(lr, leaves_of(params))
        check_rates(lr, leaves_of(params))
    if transform.order == "jacobi":
        return _move(transform, params, grads, state, lr, donate)
    params, state = _move(transform, params, one_side(grads, "A"), state, lr, donate)
    params, state = _move(transform, params, one_side(grads, "B"), state, lr, donate)
    return params, state


def _beside(lr: Array, leaves: list[Array]) -> Array:
    """A learning rate in the library of the factors: one of NumPy goes with all of them."""
    own, backend = get_backend(lr), get_backend(*leaves)
    if own.name == backend.name:  # DTensors have a backend of their own, and take plain numbers
        return lr
    if own.name != "numpy":
        msg = (
            f"lr is an array of {own.name}, the factors are arrays of {backend.name}: give "
            f"float(lr), or an array of {backend.name}"
        )
        raise NamespaceError(msg)
    return backend.xp.asarray(lr)


def _move(
    transform: Transform,
    params: Tree,
    grads: Tree,
    state: State,
    lr: Array | float,
    donate: bool,
) -> tuple[Tree, State]:
    direction, new = transform.update(grads, state, params)
    if side_by_side(state, new) is None:
        raise another_state(new, state)
    if donate and transform.apply is apply_updates and transform.transport is stay:
        return apply_updates(params, direction, lr, donate=True), new
    moved = transform.apply(params, direction, lr)
    if transform.transport is stay:
        return moved, new
    P, G = flatten(params, params, grads)
    updated = [None if g is None else p for p, g in zip(P, G, strict=True)]
    state, new = new, transform.transport(new, replaced(params, P, updated), moved)
    if side_by_side(state, new) is None:
        raise another_state(new, state)
    return moved, new

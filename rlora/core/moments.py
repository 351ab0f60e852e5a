"""Elementwise transformations: momentum, Adam, clipping. Each factor has its own counter."""

import math
from collections.abc import Sequence
from functools import partial
from typing import Any, Literal, NamedTuple

from rlora.core.backend import AdamNumbers, Backend
from rlora.core.checks import check_choice, check_nonnegative, check_unit, is_traced, is_zero
from rlora.core.dispatch import get_backend
from rlora.core.factors import (
    Array,
    Factors,
    Tree,
    device_of,
    leaves_of,
    map_leaves,
    map_moving,
    map_pairs,
)
from rlora.core.sizes import euclidean_norm, shrink_to, times
from rlora.core.transform import State, Transform, no_state

TINY = 1e-30
LN2 = math.log(2)
"""Times log2: torch compiles a step anew for each value that `math.log` is asked of."""

EpsForm = Literal["torch", "hf"]


class MomentumState(NamedTuple):
    """`mu`: the running sum, like the parameters; `count`: steps taken, one number a layer."""

    mu: Tree
    count: Tree


class AdamState(NamedTuple):
    """`mu`, `nu`: first and second moment, like the parameters; `count`: steps, one a factor."""

    mu: Tree
    nu: Tree
    count: Tree


class ScalingState(NamedTuple):
    """State of a transformation without moments."""

    scaling: Tree
    """The s of each pair."""


def keep_scaling(params: Tree, scaling: float = 1.0) -> ScalingState:
    """The `init` of a transformation whose direction needs nothing but s."""
    return ScalingState(per_pair(params, scaling))


def momentum(decay: float = 0.9, *, nesterov: bool = False, dampening: float = 0.0) -> Transform:
    """Heavy-ball momentum as torch's SGD has it.

    ``M <- decay M + (1 - dampening) G``, the first step ``M = G``; the direction is M, or with
    Nesterov's look-ahead ``G + decay M``.

    Parameters
    ----------
    decay : float
        In [0, 1).
    nesterov : bool
        Look ahead; needs a positive `decay` and no `dampening`.
    dampening : float
        In [0, 1].

    Returns
    -------
    Transform
        State: one array a factor and its step count.
    """
    check_unit("momentum", decay)
    if not is_traced(dampening) and not 0.0 <= dampening <= 1.0:
        msg = f"dampening must be in [0, 1], got {dampening!r}"
        raise ValueError(msg)
    if nesterov and (is_zero(decay) or not is_zero(dampening)):
        msg = f"nesterov needs momentum > 0 and dampening = 0, got {decay!r} and {dampening!r}"
        raise ValueError(msg)

    def init(params: Tree, scaling: float = 1.0) -> MomentumState:
        return MomentumState(zeros(params), counts(params))

    def update(grads: Tree, state: State, params: Tree) -> tuple[Tree, MomentumState]:
        def move(M: list[Array], counts: list[Array], G: list[Array]) -> tuple[list[Array], ...]:
            xp = get_backend(*G).xp
            for i, (t, g) in enumerate(zip(counts, G, strict=True)):
                added = g
                if not is_zero(dampening):
                    one = xp.ones_like(t)
                    added = each(xp.where(t == 0, one, (1 - dampening) * one)) * g
                M[i] = decay * M[i] + added
            ahead = [g + decay * mu for g, mu in zip(G, M, strict=True)] if nesterov else M
            return M, [t + 1 for t in counts], ahead

        mu, count, direction = map_moving(move, state.mu, state.count, grads, like=params)
        return direction, MomentumState(mu, count)

    return Transform(init, update, sharded=True)


def scale_by_adam(
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-8,
    *,
    eps_form: EpsForm = "torch",
    bias_correction: bool = True,
) -> Transform:
    """Adam's moments.

    ``M <- b1 M + (1 - b1) G``, ``V <- b2 V + (1 - b2) G∘G``, with ``c_i = 1 - b_i^t`` the
    direction is ``(M / c_1) / (sqrt(V / c_2) + eps)`` in torch's form, and
    ``(sqrt(c_2) / c_1) M / (sqrt(V) + eps)`` in the one of older transformers code.

    Parameters
    ----------
    b1, b2 : float
        Decay rates in [0, 1).
    eps : float
        At least 0. With 0 the direction of an entry whose gradients have all been 0 is NaN, as in
        torch's AdamW: of all of A in the first step from B = 0.
    eps_form : {"torch", "hf"}
        Whether eps is added to the corrected or to the raw second moment's root.
    bias_correction : bool
        With False ``c_1 = c_2 = 1``.

    Returns
    -------
    Transform
        State: two arrays a factor and its step count.

    References
    ----------
    D. P. Kingma, J. Ba. Adam: A Method for Stochastic Optimization. arXiv:1412.6980, 2014.
    """
    check_unit("b1", b1)
    check_unit("b2", b2)
    check_nonnegative("eps", eps)
    check_choice("eps_form", eps_form, EpsForm)

    def init(params: Tree, scaling: float = 1.0) -> AdamState:
        return AdamState(zeros(params), zeros(params), counts(params))

    def update(grads: Tree, state: State, params: Tree) -> tuple[Tree, AdamState]:
        def move(
            M: list[Array], V: list[Array], counts: list[Array], G: list[Array]
        ) -> tuple[list[Array], ...]:
            return adam_step(M, V, counts, G, b1, b2, eps, eps_form, bias_correction)

        *moments, direction = map_moving(move, state.mu, state.nu, state.count, grads, like=params)
        return direction, AdamState(*moments)

    return Transform(init, update, sharded=True)


def adam_step(
    M: list[Array],
    V: list[Array],
    counts: list[Array],
    G: list[Array],
    b1: float,
    b2: float,
    eps: float,
    eps_form: EpsForm = "torch",
    bias_correction: bool = True,
) -> tuple[list[Array], list[Array], list[Array], list[Array]]:
    """Moments, counts and directions of a list of arrays after a step of `scale_by_adam`."""
    backend = get_backend(*G)
    counts = [t + 1 for t in counts]
    c1 = c2 = [1.0] * len(G)
    if bias_correction:
        layers = [t[..., None, None] for t in counts]
        c1, c2 = _corrections(backend.xp, b1, layers), _corrections(backend.xp, b2, layers)
    root2 = [c**0.5 for c in c2]
    small = [eps if eps_form == "torch" else eps / root for root in root2]
    M, V, D = backend.adam(M, V, G, AdamNumbers(b1, b2, c1, root2, small))
    return M, V, counts, D


def clip_by_global_norm(max_norm: float) -> Transform:
    """Scale the whole direction so that its Euclidean norm over all factors is at most `max_norm`.

    The norm of raw factor gradients depends on how the product is split between the factors; clip
    a direction that is invariant if that matters.

    Parameters
    ----------
    max_norm : float
        At least 0.

    Returns
    -------
    Transform
        Without state.
    """
    check_nonnegative("max_norm", max_norm)

    def update(grads: Tree, state: State, params: Tree) -> tuple[Tree, State]:
        if not (leaves := leaves_of(grads)):
            return grads, state
        xp = get_backend(*leaves).xp
        factor = shrink_to(xp, max_norm, euclidean_norm(xp, leaves))
        return map_leaves(partial(times, factor), grads), state

    return Transform(no_state, update, together=True)


def corrected_decay(xp: Any, b: float, count: Array) -> Array:
    """``b (1 - b^t) / (1 - b^(t+1))``: an average with this decay needs no bias correction.

    `count` is t, the number of steps before this one; the first step has decay 0.
    """
    if is_zero(b):
        return xp.zeros_like(count)
    return _decay(xp, count, _logarithm(xp, b), (1 - b) / b)


def corrected_decays(backend: Backend, rates: Sequence[float], count: Array) -> list[Array]:
    """`corrected_decay` for several b, in the operations of one where constants are kept."""
    xp = backend.xp
    if any(map(is_traced, rates)):
        return [corrected_decay(xp, b, count) for b in rates]
    numbers = [math.log2(max(b, TINY)) * LN2 for b in rates]
    numbers += [(1 - b) / b if b > TINY else math.inf for b in rates]
    constants = backend.constants(numbers, count.dtype, count)
    constants = xp.reshape(constants, (2, -1, *[1] * count.ndim))
    decays = _decay(xp, count[None, ...], constants[0, ...], constants[1, ...])
    return [decays[i, ...] for i in range(len(rates))]


def _decay(xp: Any, count: Array, log: Any, odds: Any) -> Array:
    old = xp.expm1(count * log)  # b^t - 1, without cancellation
    return old / (old - odds)  # numerator and denominator over -b; odds are (1 - b) / b


def zeros(params: Tree) -> Tree:
    """Like the parameters."""
    return map_leaves(lambda p: get_backend(p).xp.zeros_like(p), params)


def small_zeros(params: Tree, axes: int) -> Tree:
    """Zeros with `axes` axes of length r after the leading ones, for each factor."""

    def pair_of_zeros(pair: Factors) -> Factors:
        A, r = pair.A, pair.A.shape[-2]
        shape = (*A.shape[:-2], *([r] * axes))
        make = partial(get_backend(A).xp.zeros, shape, dtype=A.dtype, device=device_of(A))
        return Factors(make(), make())  # each its own memory, as a step may write to it

    return map_pairs(pair_of_zeros, params)


def counts(params: Tree) -> Tree:
    """One step count for each layer of a factor, zero: (...)."""

    def count(p: Array) -> Array:
        return get_backend(p).xp.zeros(p.shape[:-2], dtype=p.dtype, device=device_of(p))

    return map_leaves(count, params)


def per_pair(params: Tree, value: float) -> Tree:
    """One number for each layer of a pair: (...)."""

    def number(pair: Factors) -> Array:
        A = pair.A
        return get_backend(A).xp.full(A.shape[:-2], value, dtype=A.dtype, device=device_of(A))

    return map_pairs(number, params)


def each(x: Array) -> Array:
    """Numbers (...), one for each layer, against its matrices (..., ., .)."""
    return x[..., None, None]


def over(pair: Factors, x: Array) -> Factors:
    """A pair divided by one number for each layer; None stays."""
    return Factors(*(None if d is None else d / each(x) for d in pair))


def _corrections(xp: Any, b: float, counts: list[Array]) -> list[Any]:
    """``1 - b^t`` of each; expm1, because in float32 the plain form loses 4 digits at b = 0.999."""
    if is_zero(b):
        return [1.0] * len(counts)
    log_b = _logarithm(xp, b)
    return [-xp.expm1(t * log_b) for t in counts]


def _logarithm(xp: Any, b: float) -> Any:
    # An array that is 0 by chance counts as almost 0: 0 times its logarithm would be NaN.
    return xp.log(xp.clip(b, min=TINY)) if is_traced(b) else math.log2(b) * LN2

"""Growth of the factors where the product needs a lower rank than they have."""

from collections.abc import Sequence
from functools import cache, partial
from typing import Any, NamedTuple

import numpy as np

from rlora.core.backend import Backend
from rlora.core.decay import add_decayed_weights
from rlora.core.dispatch import get_backend
from rlora.core.factors import Factors
from rlora.core.moments import scale_by_adam
from rlora.core.step import step
from rlora.core.transform import Transform, chain


class GrowthCase(NamedTuple):
    """A problem of `growths`: see `growth`."""

    rank: int
    noise: float
    lr: float


class Growth(NamedTuple):
    """Result of `growth`."""

    first: float
    """The expected loss before the first step."""
    last: float
    """The same, as the mean of the last twentieth of the steps."""
    largest: float
    """The largest entry that a factor had at the end."""
    rounding: float
    """By how much bfloat16 would change the product at the end, ``|ΔBA|² / |BA|²``."""


def growth(
    method: Transform,
    m: int,
    n: int,
    r: int,
    *,
    rank: int = 1,
    noise: float = 0.5,
    lr: float = 4e-3,
    steps: int = 1000,
    dtype: str = "float32",
    backend: Backend | None = None,
    seed: int = 0,
) -> Growth:
    """Least squares from B = 0 with a target of low rank, from samples with noise.

    ``½ E|B A x - y|²`` for normal x and ``y = T x + noise ε``, 32 new samples a step. A rank above
    those of the target and of the weight leaves directions that the product does not see.

    Parameters
    ----------
    method : Transform
        Any method.
    m, n, r : int
        Outputs, inputs and rank.
    rank : int
        Of the target, at most the least of m and n.
    noise : float
        Standard deviation of the noise; 0 for none.
    lr : float
        Learning rate.
    steps : int
        How many.
    dtype : str
        Of the factors and gradients; losses are computed in at least float32.
    backend : Backend, optional
        Whose arrays the method steps; NumPy's by default.
    seed : int
        Of all that is random.

    Returns
    -------
    Growth
        NaN and inf are reported as they are.
    """
    rng, one = np.random.default_rng(seed), GrowthCase(rank, noise, lr)
    starts = [_start(rng, m, n, r, rank)]
    return _learn(method, starts, [one], rng, steps=steps, dtype=dtype, backend=backend)[one]


def growths(
    method: Transform,
    m: int,
    n: int,
    r: int,
    cases: Sequence[GrowthCase],
    steps: int = 1000,
    *,
    dtype: str = "float32",
    backend: Backend | None = None,
    seed: int = 0,
) -> dict[GrowthCase, Growth]:
    """`growth` of several targets, noises and learning rates, in one stack of layers.

    They share the inputs of their samples and the ε of their noise. The draws are not those of
    `growth`, and those of a case do not depend on what else is in the stack.

    Parameters
    ----------
    method, m, n, r, steps, dtype, backend, seed
        As in `growth`.
    cases : sequence of GrowthCase
        Rank of the target, noise and learning rate of each layer.

    Returns
    -------
    dict of GrowthCase to Growth
        NaN and inf are reported as they are.
    """
    starts = [_start(np.random.default_rng((seed, x.rank)), m, n, r, x.rank) for x in cases]
    rng = np.random.default_rng((seed, 0))
    return _learn(method, starts, cases, rng, steps=steps, dtype=dtype, backend=backend)


def _start(rng: np.random.Generator, m: int, n: int, r: int, rank: int) -> tuple[Any, Any, Any]:
    """A target, and where A and B start."""
    target = rng.normal(size=(m, rank)) @ rng.normal(size=(rank, n)) * (8 / (rank * n)) ** 0.5
    return target, rng.normal(size=(r, n)) / n**0.5, np.zeros((m, r))


def _learn(
    method: Transform,
    starts: Sequence[tuple[Any, Any, Any]],
    cases: Sequence[GrowthCase],
    rng: np.random.Generator,
    *,
    steps: int,
    dtype: str,
    backend: Backend | None,
) -> dict[GrowthCase, Growth]:
    """Every case from its start, all on the same samples."""
    target, A, B = (np.stack(x) for x in zip(*starts, strict=True))
    m, n = target.shape[-2:]
    backend = backend or get_backend(target)
    array = partial(backend.asarray, dtype="float64" if dtype == "float64" else "float32")
    noise, lr = (np.array(x)[:, None, None] for x in list(zip(*cases, strict=True))[1:])
    goal, noise, lr = array(target), array(noise), array(lr)  # (cases, m, n), (cases, 1, 1)
    params = Factors(backend.asarray(A, dtype), backend.asarray(B, dtype))
    state = method.init(params)

    def move(params: Factors, state: Any, X: Any, E: Any) -> tuple[Factors, Any, Any]:
        A, B = (backend.cast(x, X.dtype) for x in params)
        features = A @ X  # (cases, r, samples)
        error = B @ features - goal @ X - noise * E
        G = Factors(B.mT @ error @ X.mT, error @ features.mT)
        grads = Factors(*(backend.cast(g / X.shape[1], params.A.dtype) for g in G))
        distance = B @ A - goal
        params, state = step(method, params, grads, state, lr)
        return params, state, 0.5 * backend.xp.sum(distance * distance, axis=(-2, -1))

    move = backend.compile(move)
    losses = []
    with np.errstate(all="ignore"):
        for _ in range(steps):
            X, E = rng.normal(size=(n, 32)), rng.normal(size=(m, 32))
            params, state, loss = move(params, state, array(X), array(E))
            losses.append(loss)
    A, B = (backend.to_numpy(backend.cast(x, goal.dtype)).astype("float64") for x in params)
    largest = np.maximum(*(np.abs(x).max(axis=(-2, -1)) for x in (A, B)))
    last = np.mean([backend.to_numpy(x) for x in losses[-max(1, steps // 20) :]], axis=0)
    floor = [0.5 * m * case.noise**2 for case in cases]  # what no weight can predict
    with np.errstate(all="ignore"):
        rounding = _squares(_nearest(B) @ _nearest(A) - B @ A) / _squares(B @ A)
    rows = zip(backend.to_numpy(losses[0]) + floor, last + floor, largest, rounding, strict=True)
    return {case: Growth(*map(float, row)) for case, row in zip(cases, rows, strict=True)}


def _nearest(x: Any) -> Any:
    """Rounded to the eight binary digits of bfloat16."""
    digits, exponent = np.frexp(x)
    return np.ldexp(np.round(digits * 256) / 256, exponent)


def _squares(x: Any) -> Any:
    return np.sum(x * x, axis=(-2, -1))


def adamw(b1: float = 0.7, b2: float = 0.8) -> Transform:
    """AdamW on the factors, each for itself, to compare with."""
    return chain(scale_by_adam(b1, b2), add_decayed_weights(0.01))


USUAL = 4e-3
"""Learning rate of `beside_adamw`, but for a method that names its own."""


def beside_adamw(method: Transform, backend: Backend, lr: float | None = None) -> float:
    """The largest entry after 100 noisy steps at a rank above m, over that under AdamW."""
    return _largest_entry(method, backend, lr or USUAL) / _largest_under_adamw(backend)


def _largest_entry(method: Transform, backend: Backend, lr: float) -> float:
    return growth(method, 3, 20, 8, steps=100, lr=lr, backend=backend).largest


@cache
def _largest_under_adamw(backend: Backend) -> float:
    """The same number for every method."""
    return _largest_entry(adamw(), backend, USUAL)

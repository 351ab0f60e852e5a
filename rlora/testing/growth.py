"""Growth of the factors where the product needs a lower rank than they have."""

from functools import partial
from typing import Any, NamedTuple

import numpy as np

from rlora.core.backend import Backend
from rlora.core.decay import add_decayed_weights
from rlora.core.dispatch import get_backend
from rlora.core.factors import Factors
from rlora.core.moments import scale_by_adam
from rlora.core.transform import Transform, chain, step


class Growth(NamedTuple):
    """Result of `growth`."""

    first: float
    """The expected loss before the first step."""
    last: float
    """The same, as the mean of the last twentieth of the steps."""
    largest: float
    """The largest entry that a factor had at the end."""


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
    rng = np.random.default_rng(seed)
    target = rng.normal(size=(m, rank)) @ rng.normal(size=(rank, n)) * (8 / (rank * n)) ** 0.5
    backend = backend or get_backend(target)
    wide = "float64" if dtype == "float64" else "float32"
    array = partial(backend.asarray, dtype=wide)
    goal = array(target)
    A, B = rng.normal(size=(r, n)) / n**0.5, np.zeros((m, r))
    params = Factors(backend.asarray(A, dtype), backend.asarray(B, dtype))
    state = method.init(params)

    def move(params: Factors, state: Any, X: Any, Y: Any) -> tuple[Factors, Any, Any]:
        A, B = (backend.cast(x, X.dtype) for x in params)
        features = A @ X  # (r, samples)
        error = B @ features - Y
        G = Factors(B.mT @ error @ X.mT, error @ features.mT)
        grads = Factors(*(backend.cast(g / X.shape[1], params.A.dtype) for g in G))
        distance = B @ A - goal
        params, state = step(method, params, grads, state, lr)
        return params, state, 0.5 * backend.xp.sum(distance * distance)

    move = backend.compile(move)
    losses = []
    with np.errstate(all="ignore"):
        for _ in range(steps):
            X = rng.normal(size=(n, 32))
            Y = target @ X + noise * rng.normal(size=(m, 32))
            params, state, loss = move(params, state, array(X), array(Y))
            losses.append(loss)
        largest = max(float(backend.xp.max(backend.xp.abs(x))) for x in params)
    floor = 0.5 * m * noise**2  # what no weight can predict
    last = [float(loss) for loss in losses[-max(1, steps // 20) :]]
    return Growth(float(losses[0]) + floor, float(np.mean(last)) + floor, largest)


def adamw(b1: float = 0.7, b2: float = 0.8) -> Transform:
    """AdamW on the factors, each for itself, to compare with."""
    return chain(scale_by_adam(b1, b2), add_decayed_weights(0.01))

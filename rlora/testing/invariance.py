"""Dependence of the product's path on the factorization at the start."""

from typing import Any, Final, Literal

import numpy as np

from rlora.core.backend import Backend
from rlora.core.dispatch import get_backend
from rlora.core.factors import Factors
from rlora.core.step import step
from rlora.core.transform import Transform
from rlora.testing.problems import make_problem

Gauge = Literal["scalar", "signed permutation", "rotation", "diagonal", "general"]
GAUGES: Final[tuple[Gauge, ...]] = (
    "scalar",
    "signed permutation",
    "rotation",
    "diagonal",
    "general",
)
"""Kinds of changes of basis, from the mildest to all of them."""


def change_of_basis(gauge: Gauge, r: int = 3, *, seed: int = 0) -> Any:
    """An R (r, r) of this kind; (R A, B R⁻¹) is another split of the same product.

    Parameters
    ----------
    gauge : str
        3 times the identity; a signed permutation; an orthogonal matrix; a diagonal one with a
        condition number of 50; any, with the same condition number.
    r : int
        Rank.
    seed : int
        Of NumPy's generator.

    Returns
    -------
    array of shape (r, r)
    """
    rng = np.random.default_rng(seed)
    Q, P = (np.linalg.qr(rng.normal(size=(r, r)))[0] for _ in range(2))
    spread = np.diag(np.geomspace(5.0, 0.1, r))
    return {
        "scalar": 3.0 * np.eye(r),
        "signed permutation": np.eye(r)[rng.permutation(r)] * rng.choice([-1.0, 1.0], size=r),
        "rotation": Q,
        "diagonal": spread,
        "general": Q @ spread @ P,
    }[gauge]


def invariance(
    method: Transform,
    gauge: Gauge,
    *,
    lr: float = 0.05,
    steps: int = 50,
    seed: int = 0,
    backend: Backend | None = None,
) -> float:
    """The worst relative difference of the product between two splits of the same start.

    Parameters
    ----------
    method : Transform
        Any method.
    gauge : str
        One of `GAUGES`.
    lr : float
        Learning rate.
    steps : int
        How far the two runs are followed.
    seed : int
        Of the problem, a factorisation of shape (20, 16) and rank 3 in float64, and of the change
        of basis.
    backend : Backend, optional
        Whose arrays the method steps; NumPy's by default.

    Returns
    -------
    float
        Rounding if the method does not depend on the split; inf if one of the runs diverges.
    """
    problem = make_problem(20, 16, 3, seed=seed)
    R = change_of_basis(gauge, seed=seed)
    pair = problem.params
    split = Factors(R @ pair.A, pair.B @ np.linalg.inv(R))
    backend = backend or get_backend(pair.A)
    problem = problem.on(backend)
    pairs = [problem.params, Factors(*(backend.asarray(x, "float64") for x in split))]
    states = [method.init(p, problem.scaling) for p in pairs]
    norm = backend.xp.linalg.vector_norm
    worst = 0.0
    with np.errstate(all="ignore"):
        for _ in range(steps):
            for k, (p, state) in enumerate(zip(pairs, states, strict=True)):
                pairs[k], states[k] = step(method, p, problem.grads(p), state, lr)
            X, Y = (p.B @ p.A for p in pairs)
            distance = float(norm(Y - X) / norm(X))
            worst = max(worst, distance) if np.isfinite(distance) else float("inf")
    return worst

"""Dependence of the product's path on the factorization at the start."""

from collections.abc import Sequence
from typing import Any, Final, Literal

import numpy as np

from rlora.core.backend import Backend
from rlora.core.checks import check_choice
from rlora.core.dispatch import get_backend
from rlora.core.factors import Factors
from rlora.core.step import step
from rlora.core.transform import Transform, check_transform
from rlora.testing.problems import check_float64, make_problem

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

    Raises
    ------
    ValueError
        For another `gauge`.
    """
    check_choice("gauge", gauge, Gauge)
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

    Raises
    ------
    TypeError, ValueError, BackendError
        When `method` or `gauge` is none, or the backend has no float64 here.
    """
    (worst,) = invariances(method, [gauge], lr=lr, steps=steps, seed=seed, backend=backend)
    return worst


def invariances(
    method: Transform,
    gauges: Sequence[Gauge] = GAUGES,
    *,
    lr: float = 0.05,
    steps: int = 50,
    seed: int = 0,
    backend: Backend | None = None,
) -> list[float]:
    """Differences as of `invariance`, one for each gauge, beside one run from the start."""
    problem = make_problem(20, 16, 3, seed=seed)
    given = problem.params
    backend = backend or get_backend(given.A)
    check_transform(method)
    check_float64(backend)
    problem = problem.on(backend)
    pairs = [problem.params]
    for gauge in gauges:
        R = change_of_basis(gauge, seed=seed)
        split = Factors(R @ given.A, given.B @ np.linalg.inv(R))
        pairs.append(Factors(*(backend.asarray(x, "float64") for x in split)))
    states = [method.init(p, problem.scaling) for p in pairs]
    norm = backend.xp.linalg.vector_norm
    worst = [0.0] * len(gauges)
    with np.errstate(all="ignore"):
        for _ in range(steps):
            for k, (p, state) in enumerate(zip(pairs, states, strict=True)):
                pairs[k], states[k] = step(method, p, problem.grads(p), state, lr)
            X, *others = (p.B @ p.A for p in pairs)
            for k, Y in enumerate(others):
                distance = float(norm(Y - X) / norm(X))
                worst[k] = max(worst[k], distance) if np.isfinite(distance) else float("inf")
    return worst

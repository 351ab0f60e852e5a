"""A seeded problem, a comparison, and a run of a method on it."""

from typing import Any, NamedTuple

import numpy as np

from rlora.core.backend import Backend
from rlora.core.dispatch import get_backend
from rlora.core.errors import BackendError
from rlora.core.factors import Array, Factors
from rlora.core.step import step
from rlora.core.transform import Transform


class Problem(NamedTuple):
    """``1/2 |s B A - T|²`` from a start A, B; NumPy arrays, or a backend's after `on`."""

    params: Factors
    target: Array
    scaling: float

    def on(self, backend: Backend, dtype: str = "float64", device: str | None = None) -> "Problem":
        """The same problem in another library."""
        A, B, T = (backend.asarray(x, dtype, device) for x in (*self.params, self.target))
        return Problem(Factors(A, B), T, self.scaling)

    def error(self, params: Factors) -> Array:
        """``s B A - T``, the gradient of the loss by the weight."""
        return self.scaling * (params.B @ params.A) - self.target

    def loss(self, params: Factors) -> Array:
        """The loss, one number."""
        return 0.5 * get_backend(params.A).xp.sum(self.error(params) ** 2)

    def grads(self, params: Factors) -> Factors:
        """``G_A = s Bᵀ G`` and ``G_B = s G Aᵀ``."""
        G = self.error(params)
        return Factors(self.scaling * (params.B.mT @ G), self.scaling * (G @ params.A.mT))


def make_problem(
    m: int = 12,
    n: int = 10,
    r: int = 3,
    *,
    seed: int = 0,
    zero_B: bool = False,
    condition: float = 1.0,
    scaling: float = 1.0,
) -> Problem:
    """A seeded matrix factorisation.

    Parameters
    ----------
    m, n, r : int
        Outputs, inputs and rank.
    seed : int
        Of NumPy's generator.
    zero_B : bool
        The usual LoRA start, instead of a full-rank B.
    condition : float
        Condition number of both factors at the start.
    scaling : float
        The s of ``s B A``.

    Returns
    -------
    Problem
        NumPy arrays in float64.
    """
    rng = np.random.default_rng(seed)
    spread = np.diag(np.geomspace(1.0, 1.0 / condition, r))
    A = spread @ rng.normal(size=(r, n)) / n**0.5
    B = np.zeros((m, r)) if zero_B else rng.normal(size=(m, r)) @ spread / m**0.5
    target = rng.normal(size=(m, r)) @ rng.normal(size=(r, n)) / r**0.5
    return Problem(Factors(A, B), target, scaling)


def check_float64(backend: Any) -> None:
    """TypeError unless this is a backend, BackendError unless it has float64 here."""
    if not isinstance(backend, Backend):
        msg = f"expected a backend, as rlora.backends.get('numpy') gives one, got {backend!r}"
        raise TypeError(msg)
    if not backend.has_float64():
        msg = (
            f"this is checked in float64, which the backend {backend.name!r} does not have here; "
            f"for JAX call jax.config.update('jax_enable_x64', True) first"
        )
        raise BackendError(msg)


def assert_close(
    actual: Any, desired: Any, *, rtol: float = 0.0, atol: float = 0.0, what: str = "arrays"
) -> None:
    """AssertionError unless shapes agree and ``|actual - desired| <= atol + rtol max|desired|``.

    The relative part is against the largest entry, as rounding of products is.

    Parameters
    ----------
    actual, desired : array
        Of any library, on the CPU.
    rtol, atol : float
        The tolerances; both 0 asks for equality.
    what : str
        For the message.

    Raises
    ------
    AssertionError
        Otherwise; also for NaN.
    """
    x = np.asarray(actual, dtype=np.float64)
    y = np.asarray(desired, dtype=np.float64)
    if x.shape != y.shape:
        msg = f"{what}: shape {x.shape} instead of {y.shape}"
        raise AssertionError(msg)
    bound = atol + rtol * float(np.max(np.abs(y), initial=0.0))
    worst = float(np.max(np.abs(x - y), initial=0.0))
    if not worst <= bound:  # also when NaN
        msg = f"{what}: differ by {worst:.3g}, allowed {bound:.3g}"
        raise AssertionError(msg)


def run(
    method: Transform, problem: Problem, *, steps: int = 20, lr: float = 0.05
) -> tuple[Factors, Any]:
    """Parameters and state after some steps on a problem.

    Parameters
    ----------
    method : Transform
        Fresh or used: it keeps nothing.
    problem : Problem
        From `make_problem`.
    steps : int
        How many.
    lr : float
        Learning rate.

    Returns
    -------
    params, state
        As `rlora.step` gives them.
    """
    params: Factors = problem.params
    state = method.init(params, problem.scaling)
    for _ in range(steps):
        params, state = step(method, params, problem.grads(params), state, lr)
    return params, state

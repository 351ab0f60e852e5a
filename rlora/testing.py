"""For tests of methods and backends, here and elsewhere: a problem, a comparison, the contract.

>>> import rlora.testing
>>> from rlora.backends import get
>>> rlora.testing.check_method(lambda: rlora.scaled_sgd(), get("numpy"))
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from rlora.core.backend import Backend, dtype_name, mT
from rlora.core.dispatch import get_backend
from rlora.core.factors import Array, Factors, Tree, leaves_of, map_leaves
from rlora.core.state import flatten_state, unflatten_state
from rlora.core.transform import Transform, step

MethodFactory = Callable[[], Transform]


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
        return Factors(self.scaling * (mT(params.B) @ G), self.scaling * (G @ mT(params.A)))


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


def assert_close(
    actual: Any, desired: Any, *, rtol: float = 0.0, atol: float = 0.0, what: str = "arrays"
) -> None:
    """AssertionError unless shapes agree and ``|actual - desired| <= atol + rtol max|desired|``.

    The relative part is against the largest entry, as rounding of products is. Arrays of any
    library on the CPU will do.
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
    method: Transform,
    problem: Problem,
    *,
    steps: int = 20,
    lr: float = 0.05,
    dtype: str = "float64",
) -> tuple[Factors, Any]:
    """Parameters and state after some steps on a problem."""
    params: Factors = problem.params
    state = method.init(params, problem.scaling)
    for _ in range(steps):
        params, state = step(method, params, problem.grads(params), state, lr)
    return params, state


def check_method(make: MethodFactory, backend: Backend) -> None:
    """Every check of the contract, on one backend.

    Parameters
    ----------
    make : callable
        Gives the method, fresh.
    backend : Backend
        From `rlora.backends.get`.
    """
    for check in CONTRACT:
        check(make, backend)


def check_inputs_untouched(make: MethodFactory, backend: Backend) -> None:
    """Parameters, gradients and state are what they were before."""
    problem = make_problem().on(backend)
    method = make()
    state = method.init(problem.params)
    grads = problem.grads(problem.params)
    given = [*problem.params, *grads, *flatten_state(state).values()]
    before = [np.array(backend.to_numpy(x)) for x in given]
    step(method, problem.params, grads, state, 0.1)
    for x, old in zip(given, before, strict=True):
        assert_close(backend.to_numpy(x), old, what="an input after the step")


def check_keeps_shape_and_dtype(make: MethodFactory, backend: Backend) -> None:
    """Parameters and state have after a step the shapes, dtypes and library they had before."""
    for dtype in ("float32", "float64"):
        problem = make_problem().on(backend, dtype)
        method = make()
        state = method.init(problem.params)
        params, new = step(method, problem.params, problem.grads(problem.params), state, 0.1)
        old_arrays = {"A": problem.params.A, "B": problem.params.B, **flatten_state(state)}
        new_arrays = {"A": params.A, "B": params.B, **flatten_state(new)}
        _require(old_arrays.keys() == new_arrays.keys(), "the state changed its structure")
        for name, old in old_arrays.items():
            x = new_arrays[name]
            same = tuple(x.shape) == tuple(old.shape) and dtype_name(x.dtype) == dtype_name(
                old.dtype
            )
            _require(same, f"{name} became {tuple(x.shape)} {x.dtype}, was {old.dtype}")


def check_lora_start(make: MethodFactory, backend: Backend) -> None:
    """From B = 0, A stands still in the first step, all stays finite, and the loss falls."""
    problem = make_problem(zero_B=True).on(backend)
    method = make()
    first, _ = run(method, problem, steps=1)
    still = backend.to_numpy(problem.params.A)
    # Decay may shrink A; its direction may not change.
    ratio = backend.to_numpy(first.A) / still
    assert_close(ratio, np.full_like(ratio, ratio[0, 0]), rtol=1e-12, what="A after one step")
    last, _ = run(method, problem, steps=30)
    _require(
        bool(np.isfinite(backend.to_numpy(last.A)).all()), "A is not finite after 30 steps from B=0"
    )
    before, after = (float(problem.loss(p)) for p in (problem.params, last))
    _require(after < 0.9 * before, f"the loss went from {before:.4g} to {after:.4g} in 30 steps")


def check_batched_equals_looped(make: MethodFactory, backend: Backend) -> None:
    """A stack of layers, a list and a dict give what each layer gives by itself."""
    problems = [make_problem(seed=seed) for seed in range(3)]
    stack = Factors(*(np.stack([getattr(p.params, letter) for p in problems]) for letter in "AB"))
    target = np.stack([p.target for p in problems])
    stacked, _ = run(make(), Problem(stack, target, 1.0).on(backend), steps=5)
    alone = [run(make(), p.on(backend), steps=5)[0] for p in problems]
    for k, pair in enumerate(alone):
        for x, y in zip(stacked, pair, strict=True):
            assert_close(
                backend.to_numpy(x)[k], backend.to_numpy(y), rtol=1e-10, what="a stacked layer"
            )
    for keys in (range(3), "xyz"):
        tree: Tree = {key: p.on(backend) for key, p in zip(keys, problems, strict=True)}
        method = make()
        params: Tree = {key: p.params for key, p in tree.items()}
        state = method.init(params)
        for _ in range(5):
            grads = {key: tree[key].grads(params[key]) for key in params}
            params, state = step(method, params, grads, state, 0.05)
        for pair, key in zip(alone, keys, strict=True):
            for x, y in zip(params[key], pair, strict=True):
                assert_close(
                    backend.to_numpy(x), backend.to_numpy(y), rtol=1e-10, what="a layer of a dict"
                )


def check_frozen_factor(make: MethodFactory, backend: Backend) -> None:
    """A factor whose gradient is None comes back as it was, and the other one moves."""
    problem = make_problem().on(backend)
    for frozen in ("A", "B"):
        method = make()
        grads = problem.grads(problem.params)._replace(**{frozen: None})
        params, _ = step(method, problem.params, grads, method.init(problem.params), 0.1)
        _require(
            getattr(params, frozen) is getattr(problem.params, frozen), "a frozen factor moved"
        )
        other = "B" if frozen == "A" else "A"
        moved = backend.to_numpy(getattr(params, other) - getattr(problem.params, other))
        _require(bool(np.abs(moved).max() > 0), f"{other} did not move while {frozen} is frozen")


def check_state_roundtrip(make: MethodFactory, backend: Backend) -> None:
    """A state put into a flat dict of NumPy arrays and back goes on bit for bit."""
    problem = make_problem().on(backend)
    method = make()
    params, state = run(method, problem, steps=3)
    flat = {name: backend.to_numpy(x) for name, x in flatten_state(state).items()}
    again = unflatten_state(flat, method.init(params))
    for saved in (state, again):
        moved, _ = step(method, params, problem.grads(params), saved, 0.1)
        if saved is state:
            expected = moved
    for x, y in zip(moved, expected, strict=True):
        assert_close(backend.to_numpy(x), backend.to_numpy(y), what="a step after loading")


def check_bad_pair_stays_alone(make: MethodFactory, backend: Backend) -> None:
    """NaN in one pair of a list leaves the others as if alone."""
    problems = [make_problem(seed=seed).on(backend) for seed in range(3)]
    params: Tree = [p.params for p in problems]
    grads: Tree = [p.grads(p.params) for p in problems]

    def poison(tree: Tree) -> Tree:
        return [tree[0], map_leaves(lambda x: x * float("nan"), tree[1]), tree[2]]

    for where in ("gradient", "parameter"):
        bad_params = poison(params) if where == "parameter" else params
        bad = poison(grads) if where == "gradient" else grads
        method = make()
        new, _ = step(method, bad_params, bad, method.init(bad_params), 0.1)
        good, _ = step(method, params, grads, method.init(params), 0.1)
        for k in (0, 2):
            for x, y in zip(new[k], good[k], strict=True):
                assert_close(
                    backend.to_numpy(x), backend.to_numpy(y), rtol=1e-14, what="a healthy pair"
                )


def check_compiles(make: MethodFactory, backend: Backend) -> None:
    """The compiled step gives what the plain one gives."""
    problem = make_problem().on(backend)
    method = make()

    def move(params: Factors, grads: Factors, state: Any) -> tuple[Factors, Any]:
        new: Factors
        new, state = step(method, params, grads, state, 0.1)
        return new, state

    compiled = backend.compile(move)
    params, state = problem.params, method.init(problem.params)
    fast, fast_state = problem.params, method.init(problem.params)
    for _ in range(3):
        params, state = move(params, problem.grads(params), state)
        fast, fast_state = compiled(fast, problem.grads(fast), fast_state)
    for x, y in zip(leaves_of(fast), leaves_of(params), strict=True):
        assert_close(backend.to_numpy(x), backend.to_numpy(y), rtol=1e-10, what="a compiled step")


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise AssertionError(message)


CONTRACT: tuple[Callable[[MethodFactory, Backend], None], ...] = (
    check_inputs_untouched,
    check_keeps_shape_and_dtype,
    check_lora_start,
    check_batched_equals_looped,
    check_frozen_factor,
    check_state_roundtrip,
    check_bad_pair_stays_alone,
    check_compiles,
)
"""What every method promises on every backend."""

"""Checks that compare a step with the same step, made in another way."""

from collections.abc import Callable, Iterable
from typing import Any

import numpy as np

from rlora import methods
from rlora.core.backend import Backend
from rlora.core.factors import Factors, Tree, map_leaves, pairs_of
from rlora.core.state import flatten_state
from rlora.core.step import step
from rlora.core.transform import Transform
from rlora.testing.problems import Problem, assert_close, check_float64, make_problem, run

MethodFactory = Callable[[], Transform]
"""Gives a method, fresh; its `lr`, if it has one, is the learning rate to use the method with."""

SHIFTED = 1e-4
"""Relative distance from NumPy's steps that a backend may have: one that does not wait for
eigenvalues damps by the root of eps in their place, which has been seen to move factors by 3e-5."""


def check_backend(backend: Backend) -> None:
    """Every method of the library gives on a backend what it gives on NumPy's.

    `check_method` compares a backend with itself alone.

    Parameters
    ----------
    backend : Backend
        From `rlora.backends.get`; with float64, which JAX has with ``jax_enable_x64`` alone.

    Raises
    ------
    AssertionError
        When factors differ by more than 1e-4 of their largest entry after three steps.
    BackendError
        When the backend has no float64.

    Examples
    --------
    >>> import rlora.testing
    >>> from rlora.backends import get
    >>> rlora.testing.check_backend(get("torch"))
    """
    check_float64(backend)
    problem = make_problem()
    for name in methods.__all__:
        make = getattr(methods, name)
        expected, _ = run(make(), problem, steps=3)
        found, _ = run(make(), problem.on(backend), steps=3)
        for letter, x, y in zip("AB", found, expected, strict=True):
            what = f"{letter} after three steps of {name}, beside NumPy's"
            assert_close(backend.to_numpy(x), y, rtol=SHIFTED, what=what)


def check_batched_equals_looped(make: MethodFactory, backend: Backend) -> None:
    """A stack of layers, a list and a dict give what each layer gives by itself.

    But for a method whose pairs depend on one another, see `rlora.Transform.together`.
    """
    if make().together:
        return
    problems = [make_problem(seed=seed) for seed in range(3)]
    stack = Factors(*(np.stack([getattr(p.params, letter) for p in problems]) for letter in "AB"))
    target = np.stack([p.target for p in problems])
    stacked, _ = run(make(), Problem(stack, target, 1.0).on(backend), steps=5)
    alone = [run(make(), p.on(backend), steps=5)[0] for p in problems]
    for k, pair in enumerate(alone):
        layer = [x[k, ...] for x in stacked]
        _assert_all_close(backend, layer, pair, rtol=1e-10, what="a stacked layer")
    here = [p.on(backend) for p in problems]
    for collect in (list, lambda pairs: dict(zip("xyz", pairs, strict=True))):
        method, params = make(), collect(p.params for p in here)
        state = method.init(params)
        for _ in range(5):
            grads = collect(map(Problem.grads, here, pairs_of(params)))
            params, state = step(method, params, grads, state, 0.05)
        for pair, moved in zip(alone, pairs_of(params), strict=True):
            _assert_all_close(backend, moved, pair, rtol=1e-10, what="a layer of several")


def check_bad_pair_stays_alone(make: MethodFactory, backend: Backend) -> None:
    """NaN in one pair of a list leaves the others as if alone, unless `together` ties them."""
    if make().together:
        return
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
            _assert_all_close(backend, new[k], good[k], rtol=1e-14, what="a healthy pair")


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
    _assert_all_close(backend, fast, params, rtol=1e-10, what="a compiled step")


def check_donated(make: MethodFactory, backend: Backend) -> None:
    """A step that may write over what it is given gives what another one gives.

    So each array of a state has memory of its own, which is that of no parameter either.
    """
    moved = []
    for donate in (False, True):
        problem, method = make_problem().on(backend), make()
        params, state = problem.params, method.init(problem.params)
        for _ in range(4):
            grads = problem.grads(params)
            params, state = step(method, params, grads, state, 0.1, donate=donate)
        moved.append({**params._asdict(), **flatten_state(state)})
    for name, x in moved[0].items():
        found, expected = backend.to_numpy(moved[1][name]), backend.to_numpy(x)
        assert_close(found, expected, rtol=1e-10, what=f"{name} after steps with donate=True")


def _assert_all_close(
    backend: Backend, actual: Iterable[Any], desired: Iterable[Any], *, rtol: float, what: str
) -> None:
    for x, y in zip(actual, desired, strict=True):
        assert_close(backend.to_numpy(x), backend.to_numpy(y), rtol=rtol, what=what)

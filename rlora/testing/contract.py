"""Contract that every method keeps on every backend."""

from collections.abc import Callable
from typing import Any

import numpy as np

from rlora.core.backend import Backend, dtype_name
from rlora.core.dispatch import get_backend
from rlora.core.factors import Factors, map_leaves
from rlora.core.state import flatten_state, unflatten_state
from rlora.core.step import step
from rlora.core.transform import check_transform
from rlora.testing.comparisons import (
    MethodFactory,
    check_bad_pair_stays_alone,
    check_batched_equals_looped,
    check_compiles,
    check_donated,
)
from rlora.testing.growth import beside_adamw
from rlora.testing.problems import Problem, assert_close, check_float64, make_problem, run

GROWTH = 40.0
"""Largest entry of a factor that is allowed, over that under AdamW."""


def check_method(make: MethodFactory, backend: Backend) -> None:
    """Every check of the contract, on one backend.

    Parameters
    ----------
    make : callable
        Gives the method, fresh.
    backend : Backend
        From `rlora.backends.get`; with float64, which JAX has with ``jax_enable_x64`` alone.

    Raises
    ------
    AssertionError
        When the contract is not kept.
    BackendError
        When the backend has no float64.
    TypeError
        When `make` gives no method, or `backend` is none.
    """
    given: Any = make
    if not callable(given):
        msg = (
            f"expected a function that gives the method, as rlora.scaled_adamw or lambda: "
            f"rlora.scaled_adamw(damping=1e-3), got {type(make).__name__}"
        )
        raise TypeError(msg)
    check_transform(make())
    check_float64(backend)
    for check in CONTRACT:
        try:
            check(make, backend)
        except Exception as error:
            error.add_note(f"in {check.__name__}: {str(check.__doc__).splitlines()[0]}")
            raise


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
            was, now = (
                f"{get_backend(y).name} {tuple(y.shape)} {dtype_name(y.dtype)}" for y in (old, x)
            )
            _require(now == was, f"{name} became {now}, was {was}")


def check_lora_start(make: MethodFactory, backend: Backend) -> None:
    """From B = 0, the first step leaves A's row space alone, all stays finite, the loss falls.

    A method that never moves B is not made for this start: only the first two are asked of it.
    """
    problem = make_problem(zero_B=True).on(backend)
    first, _ = run(make(), problem, steps=1)
    old, new = backend.to_numpy(problem.params.A), backend.to_numpy(first.A)
    outside = new - new @ np.linalg.pinv(old) @ old
    assert_close(outside, 0 * outside, atol=1e-12, what="A outside of its rows after one step")
    lr = getattr(make, "lr", 0.05)
    last, _ = run(make(), problem, steps=30, lr=lr)
    for letter, x in zip("AB", last, strict=True):
        finite = bool(np.isfinite(backend.to_numpy(x)).all())
        _require(finite, f"{letter} is not finite after 30 steps from B = 0")
    if _moves(make, make_problem().on(backend), backend)["B"]:
        before, after = (float(problem.loss(p)) for p in (problem.params, last))
        message = (
            f"the loss went from {before:.4g} to {after:.4g} in 30 steps of lr={lr:g}; a factory "
            f"says another learning rate in its attribute `lr`"
        )
        _require(after < 0.9 * before, message)


def _moves(
    make: MethodFactory, problem: Problem, backend: Backend, **frozen: None
) -> dict[str, bool]:
    """Factors that two steps move, as a dict of bool; those in `frozen` have no gradient."""
    method, params = make(), problem.params
    state = method.init(params, problem.scaling)
    for _ in range(2):  # a method may move one factor at a time
        grads = problem.grads(params)._replace(**frozen)
        params, state = step(method, params, grads, state, 0.1)
    pairs = zip("AB", params, problem.params, strict=True)
    return {c: bool(np.abs(backend.to_numpy(x - y)).max() > 0) for c, x, y in pairs}


def check_frozen_factor(make: MethodFactory, backend: Backend) -> None:
    """A factor without a gradient comes back as it was; the other one moves, if it ever does.

    Some methods move one factor only.
    """
    problem = make_problem().on(backend)
    free = _moves(make, problem, backend)
    for frozen, other in ("AB", "BA"):
        moves = _moves(make, problem, backend, **{frozen: None})
        _require(not moves[frozen], f"{frozen} moved without a gradient")
        _require(moves[other] == free[other], f"{other} did not move while {frozen} is frozen")


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


def check_state_is_the_truth(make: MethodFactory, backend: Backend) -> None:
    """A method keeps nothing from one step to the next but what is in its state.

    With the state of `init` it steps as if fresh, whatever it has done before, and with the state
    of another object of the method it goes on bit for bit.
    """
    problem, other = (make_problem(seed=seed).on(backend) for seed in (0, 1))
    method, used, unused = make(), make(), make()
    run(used, other, steps=3)
    start = method.init(problem.params)
    later = run(make(), problem, steps=3)
    for params, state in ((problem.params, start), later):
        grads = problem.grads(params)
        expected = _flat(step(method, params, grads, state, 0.1))
        for one in (used, method, unused):
            found = _flat(step(one, params, grads, state, 0.1))
            for name, x in expected.items():
                what = f"{name} after a step with a given state, by a method used before"
                assert_close(backend.to_numpy(found[name]), backend.to_numpy(x), what=what)


def _flat(moved: tuple[Factors, Any]) -> dict[str, Any]:
    params, state = moved
    return {**params._asdict(), **flatten_state(state)}


def check_zero_rate_moves_nothing(make: MethodFactory, backend: Backend) -> None:
    """A learning rate of 0, a number or an array, compiled or not, changes no bit of a parameter.

    Not even where the gradient is zero, as when torch has an optimizer make its state.
    """
    method = make()

    def move(params: Factors, grads: Factors, state: Any, lr: Any) -> Any:
        return step(method, params, grads, state, lr)

    compiled = backend.compile(move)
    narrow, wide = ("bfloat16" if hasattr(backend.xp, "bfloat16") else "float32"), "float64"
    for zero_B in (False, True):
        for dtype, of_lr, make_step in (
            (wide, None, move),
            (wide, wide, compiled),
            (narrow, "float32", compiled),
        ):
            problem = make_problem(zero_B=zero_B).on(backend, dtype)
            old, lr = problem.params, 0.0 if of_lr is None else backend.asarray(0.0, of_lr)
            for G in (problem.grads(old), map_leaves(backend.xp.zeros_like, old)):
                state = method.init(old)
                for _ in range(2):
                    new, state = make_step(old, G, state, lr)
                    _require_same_bits(backend, new, old)


def _require_same_bits(backend: Backend, found: Factors, expected: Factors) -> None:
    for letter, x, y in zip("AB", found, expected, strict=True):
        bits = [backend.to_numpy(backend.cast(z, backend.compute_dtype(z.dtype))) for z in (x, y)]
        if bits[0].tobytes() != bits[1].tobytes():
            worst = float(np.max(np.abs(bits[0] - bits[1])))
            _require(False, f"{letter} of {x.dtype} moved by {worst:.3g} at a learning rate of 0")


def check_no_growth(make: MethodFactory, backend: Backend) -> None:
    """With a rank above m and above that of the target no factor grows beyond all measure.

    After 100 steps with noise its largest entry is at most `GROWTH` times that under AdamW.
    """
    worst = beside_adamw(make(), backend, getattr(make, "lr", None))
    _require(worst <= GROWTH, f"the largest entry became {worst:.3g} times that under AdamW")


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
    check_state_is_the_truth,
    check_zero_rate_moves_nothing,
    check_no_growth,
    check_bad_pair_stays_alone,
    check_compiles,
    check_donated,
)
"""Contract that every method keeps on every backend."""

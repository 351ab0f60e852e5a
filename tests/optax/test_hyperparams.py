"""optax.inject_hyperparams: every number among the options may be another at each step."""

import numpy as np
import pytest

import rlora
from rlora import methods

jax = pytest.importorskip("jax")
optax = pytest.importorskip("optax")
import jax.numpy as jnp  # noqa: E402
from trees import assert_trees_close, make_tree  # noqa: E402

import rlora.optax  # noqa: E402

EVERY = pytest.mark.parametrize("name", methods.__all__)


def run(optimizer, steps=3):
    """Parameters after some steps, and how often the step was traced."""
    traced = []

    @jax.jit
    def step(params, state, grads):
        traced.append(1)
        updates, state = optimizer.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    params = make_tree()
    state = optimizer.init(params)
    for t in range(steps):
        params, state = step(params, state, make_tree(seed=10 * (t + 1)))
    return params, state, len(traced)


@EVERY
@pytest.mark.works("optax", "inject_hyperparams of every numeric option")
def test_injected_options_do_what_the_numbers_do(name):
    make = getattr(rlora.optax, name)
    plain, _, _ = run(make(1e-2))
    injected, state, traced = run(optax.inject_hyperparams(make)(1e-2))
    assert traced == 1
    assert {"learning_rate", "scaling"} < set(state.hyperparams)
    # 0.999 in float32 is 0.99899998: the correction 1 - b2^t then differs by 2e-5 of a step
    assert_trees_close(injected, plain, 1e-5)


def test_options_follow_schedules():
    """Each step equals one with the numbers that the schedules give."""
    damping = optax.linear_schedule(1e-1, 1e-3, 3)
    decay = optax.linear_schedule(0.0, 0.5, 3)
    make = optax.inject_hyperparams(rlora.optax.scaled_sgd)
    scheduled = make(1e-2, damping=damping, weight_decay=decay)
    params, grads = make_tree(), make_tree(seed=10)
    state = scheduled.init(params)
    update = jax.jit(scheduled.update)
    for t in range(3):
        updates, state = update(grads, state, params)
        numbers = {"damping": float(damping(t)), "weight_decay": float(decay(t))}
        fixed = rlora.optax.scaled_sgd(1e-2, **numbers)
        expected, _ = fixed.update(grads, fixed.init(params), params)
        assert_trees_close(updates, expected, 1e-6)  # of steps of up to 0.1, in float32
        params = optax.apply_updates(params, updates)


@pytest.mark.parametrize("option, value", [
    ("learning_rate", 1e-3), ("b1", 0.5), ("b2", 0.9), ("eps", 1e-2), ("weight_decay", 0.3),
    ("damping", 1e-1),
])  # fmt: skip
def test_options_are_set_by_hand_between_steps(option, value):
    start = {"learning_rate": 1e-2} | ({"b1": 0.0} if option == "b1" else {})
    made = optax.inject_hyperparams(rlora.optax.scaled_adamw)(**start)
    params, grads = make_tree(), make_tree(seed=10)
    _, state = made.update(grads, made.init(params), params)
    state.hyperparams[option] = jnp.asarray(value)
    got, _ = made.update(make_tree(seed=20), state, params)
    fixed = rlora.optax.scaled_adamw(**start | {option: value})
    expected, _ = fixed.update(make_tree(seed=20), state.inner_state, params)
    assert_trees_close(got, expected, 1e-6)
    same, _ = made.update(
        make_tree(seed=20), made.update(grads, made.init(params), params)[1], params
    )
    assert not np.allclose(got["q"]["lora_a"], same["q"]["lora_a"], atol=1e-6)


@pytest.mark.parametrize("name", ["scaled_adamw", "lora_rite", "adapre_lora"])
def test_decays_that_are_zero_by_chance(name):
    make = getattr(rlora.optax, name)
    zero = {"b1": 0.0, "b2": 0.0}
    injected, _, _ = run(optax.inject_hyperparams(make)(1e-2, **zero))
    plain, _, _ = run(make(1e-2, **zero))
    assert_trees_close(injected, plain, 1e-5)


def test_the_state_keeps_its_dtype_with_wider_hyperparameters():
    """JAX_ENABLE_X64 makes float64 of a number that somebody puts there."""
    made = optax.inject_hyperparams(rlora.optax.scaled_adamw)(1e-2)
    params = make_tree()
    state = made.init(params)
    state.hyperparams["b1"] = jnp.asarray(0.5, jnp.float64)
    updates, after = made.update(params, state, params)
    dtypes = lambda tree: [x.dtype for x in jax.tree.leaves(tree)]  # noqa: E731
    assert dtypes(after.inner_state) == dtypes(state.inner_state)
    assert dtypes(updates) == dtypes(params)


def test_a_method_of_ones_own_choice():
    chosen = rlora.scaled_adamw(b1=0.7, b2=0.8)
    made = optax.inject_hyperparams(rlora.optax.transformation)(chosen, learning_rate=1e-2)
    got, _, _ = run(made)
    expected, _, _ = run(rlora.optax.scaled_adamw(1e-2, b1=0.7, b2=0.8))
    assert_trees_close(got, expected, 1e-6)


def test_functions_among_the_options_are_static_args():
    def find(leaves):
        return [("peft.lora_A.weight", "peft.lora_B.weight")]

    make = optax.inject_hyperparams(rlora.optax.scaled_sgd, static_args=("pairs", "hold"))
    params = {k: v for k, v in make_tree().items() if k.startswith("peft")}
    made = make(0.1, pairs=find, hold=lambda name: "lora_A" in name)
    updates, _ = made.update(params, made.init(params), params)
    assert not updates["peft.lora_A.weight"].any()
    assert updates["peft.lora_B.weight"].any()


@pytest.mark.parametrize("bad", [jnp.ones(2), jnp.asarray(0.9, jnp.bfloat16), jnp.asarray(1j)])
def test_arrays_that_are_no_number_are_refused(bad):
    with pytest.raises(TypeError, match="b1 must be one real number of at least 32 bits"):
        rlora.scaled_adamw(b1=bad)


def test_bfloat16_parameters_need_wider_hyperparameters():
    params = jax.tree.map(lambda x: x.astype(jnp.bfloat16), make_tree())
    narrow = optax.inject_hyperparams(rlora.optax.scaled_adamw)(1e-2)
    with pytest.raises(TypeError, match=r"hyperparam_dtype=jnp\.float32"):
        narrow.init(params)
    wide = optax.inject_hyperparams(rlora.optax.scaled_adamw, hyperparam_dtype=jnp.float32)(1e-2)
    updates, _ = wide.update(params, wide.init(params), params)
    assert all(np.isfinite(x.astype(jnp.float32)).all() for x in jax.tree.leaves(updates))

"""A factor that is held still: its Gram preconditions the other one, and it does not move."""

import numpy as np
import pytest

import rlora
from rlora import Factors, PairingError, methods

jax = pytest.importorskip("jax")
optax = pytest.importorskip("optax")
import jax.numpy as jnp  # noqa: E402
from trees import as_factors, assert_trees_close, draw, equal, make_tree  # noqa: E402

import rlora.optax  # noqa: E402

EVERY = pytest.mark.parametrize("name", methods.__all__)


def is_a(name):
    return "lora_a" in name or "lora_A" in name


@EVERY
@pytest.mark.parametrize("held", "AB")
def test_equals_the_functional_method_without_that_gradient(name, held):
    """Three steps; the gradient of what is held does not matter, not even NaN."""
    optimizer = getattr(rlora.optax, name)(1e-2, hold=lambda n: is_a(n) == (held == "A"))
    method = getattr(methods, name)()
    params = make_tree()
    state, update = optimizer.init(params), jax.jit(optimizer.update)
    pairs = as_factors(params)
    expected = method.init(pairs)
    for t in range(3):
        grads = make_tree(seed=10 + t)
        wanted = [G._replace(**{held: None}) for G in as_factors(grads)]
        spoilt = jax.tree_util.tree_map_with_path(
            lambda path, g: g * np.nan if is_a(str(path)) == (held == "A") else g, grads
        )
        updates, state = update(spoilt, state, params)
        params = optax.apply_updates(params, updates)
        pairs, expected = rlora.step(method, pairs, wanted, expected, 1e-2)
    assert_trees_close(as_factors(params), pairs, 1e-4)  # new - old + old rounds once a step
    for pair, start in zip(as_factors(params), as_factors(make_tree()), strict=True):
        assert equal(getattr(pair, held), getattr(start, held))


def test_against_the_equation():
    """``B <- B - lr G_B (A Aᵀ)⁻¹`` in float64."""
    A, B, G = (draw(*s, seed=i, dtype=jnp.float64) for i, s in enumerate([(3, 8), (5, 3), (5, 3)]))
    optimizer = rlora.optax.scaled_sgd(0.1, damping=0.0, hold=["lora_A"])
    params, grads = {"lora_A": A, "lora_B": B}, {"lora_A": 0 * A, "lora_B": G}
    updates, _ = optimizer.update(grads, optimizer.init(params), params)
    expected = -0.1 * np.linalg.solve(np.asarray(A @ A.T), np.asarray(G).T).T
    # The floor of the damping is 10 r eps of the mean eigenvalue.
    np.testing.assert_allclose(updates["lora_B"], expected, rtol=1e-12)
    assert not updates["lora_A"].any()


@pytest.mark.parametrize("absent", [None, "MaskedNode"])
def test_a_gradient_that_is_absent_holds_its_leaf(absent):
    params, grads = make_tree(), make_tree(seed=10)
    absent = optax.MaskedNode() if absent else None
    grads["q"]["lora_a"] = absent
    optimizer = rlora.optax.lora_rite(1e-2)
    updates, state = jax.jit(optimizer.update)(grads, optimizer.init(params), params)
    assert updates["q"]["lora_a"] == absent
    named = rlora.optax.lora_rite(1e-2, hold=["q.lora_a"])
    grads["q"]["lora_a"] = jnp.zeros((8, 3))
    expected, _ = named.update(grads, named.init(params), params)
    assert_trees_close(updates["q"]["lora_b"], expected["q"]["lora_b"], 1e-6)
    optimizer.update(grads, state, params)  # and the state goes on


def test_a_leaf_of_no_pair_is_held_too():
    params = {**make_tree(), "bias": jnp.ones(4)}
    optimizer = rlora.optax.lora_rite(1e-2, hold=["bias"])
    updates, _ = optimizer.update(params, optimizer.init(params), params)
    assert not updates["bias"].any()


@pytest.mark.refuses("optax", "a partner that is masked out")
def test_a_masked_partner_is_refused_with_advice():
    mask = jax.tree_util.tree_map_with_path(lambda path, _: not is_a(str(path)), make_tree())
    for rest in (None, optax.sgd(0.1)):
        masked = optax.masked(rlora.optax.lora_rite(1e-2, rest=rest), mask)
        with pytest.raises(PairingError, match=r"its partner.*name it in hold="):
            masked.init(make_tree())


def test_weight_decay_leaves_a_held_factor_alone():
    optimizer = rlora.optax.scaled_adamw(1e-2, weight_decay=0.5, hold=is_a)
    params = make_tree()
    updates, _ = optimizer.update(make_tree(seed=9), optimizer.init(params), params)
    assert all(not pair.A.any() and pair.B.any() for pair in as_factors(updates))


def test_unknown_names():
    with pytest.raises(
        PairingError, match=r"hold='nobody' is not among the parameters: .*q.lora_a"
    ):
        rlora.optax.lora_rite(1e-2, hold=["nobody"]).init(make_tree())


def test_scale_by_gram_holds_too():
    link = rlora.optax.scale_by_gram(hold=is_a)
    params, grads = make_tree(), make_tree(seed=10)
    updates, _ = link.update(grads, link.init(params), params)
    whole = rlora.optax.scale_by_gram()
    both, _ = whole.update(grads, whole.init(params), params)
    for held, free in zip(as_factors(updates), as_factors(both), strict=True):
        assert_trees_close(held, Factors(0 * free.A, free.B), 1e-6)

"""rlora.optax against the functional methods and inside optax's own machinery."""

import inspect

import numpy as np
import pytest

import rlora
from rlora import PairingError, methods

jax = pytest.importorskip("jax")
optax = pytest.importorskip("optax")
import jax.numpy as jnp  # noqa: E402
from trees import as_factors, assert_trees_close, draw, make_tree  # noqa: E402

import rlora.optax  # noqa: E402
from rlora.methods.scaled import scale_by_gram  # noqa: E402
from rlora.pairing import Layout  # noqa: E402

EVERY = pytest.mark.parametrize("name", methods.__all__)


@EVERY
@pytest.mark.works("optax", "every method under jit, vmap, MultiSteps, masked, partition, donation")
def test_equals_the_functional_method_under_jit(name):
    """Five steps with a schedule; compiled once, in step one."""
    schedule = optax.linear_schedule(1e-2, 1e-3, 5)
    optimizer = getattr(rlora.optax, name)(schedule, scaling=2.0)
    params = make_tree()
    state = optimizer.init(params)
    compiled = []

    @jax.jit
    def step(params, grads, state):
        compiled.append(1)
        updates, state = optimizer.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    method = getattr(methods, name)()
    pairs = as_factors(params)
    expected = method.init(pairs, 2.0)
    for t in range(5):
        grads = make_tree(seed=10 + t)
        params, state = step(params, grads, state)
        pairs, expected = rlora.step(method, pairs, as_factors(grads), expected, schedule(t))
    assert len(compiled) == 1
    # new - old + old rounds once a step, and what a method makes of it
    assert_trees_close(as_factors(params), pairs, 2e-4)


def test_other_leaves_are_an_error_unless_something_takes_them():
    params = {**make_tree(), "bias": jnp.ones(4)}
    with pytest.raises(PairingError, match=r"1 leaves are in no pair: bias; pass rest="):
        rlora.optax.lora_rite(1e-2).init(params)
    optimizer = rlora.optax.lora_rite(1e-2, rest=optax.sgd(0.5))
    updates, _ = optimizer.update(params, optimizer.init(params), params)
    np.testing.assert_array_equal(updates["bias"], -0.5 * params["bias"])
    mask = jax.tree.map(lambda _: True, params) | {"bias": False}
    masked = optax.masked(rlora.optax.lora_rite(1e-2), mask)
    held, _ = masked.update(params, masked.init(params), params)
    np.testing.assert_array_equal(held["bias"], params["bias"])
    assert_trees_close(held["q"], updates["q"], 0)


def test_partition():
    params = {**make_tree(), "head": jnp.ones((4, 4))}
    labels = jax.tree.map(lambda _: "lora", params) | {"head": "plain"}
    optimizer = optax.partition(
        {"lora": rlora.optax.scaled_sgd(0.1), "plain": optax.sgd(0.1)}, labels
    )
    updates, _ = jax.jit(optimizer.update)(params, optimizer.init(params), params)
    np.testing.assert_allclose(updates["head"], -0.1 * params["head"])
    alone = rlora.optax.scaled_sgd(0.1)
    tree = make_tree()
    expected, _ = alone.update(tree, alone.init(tree), tree)
    assert_trees_close({k: updates[k] for k in expected}, expected, 1e-6)


@EVERY
def test_four_micro_batches_are_one(name):
    """MultiSteps: nothing moves three times, then as with the mean of the gradients."""
    optimizer = getattr(rlora.optax, name)(1e-2)
    many = optax.MultiSteps(optimizer, 4)
    params = make_tree()
    grads = [make_tree(seed=10 + t) for t in range(4)]
    state = many.init(params)
    moved = params
    for t, g in enumerate(grads):
        updates, state = jax.jit(many.update)(g, state, moved)
        moved = optax.apply_updates(moved, updates)
        if t < 3:
            assert_trees_close(moved, params, 0)
    mean = jax.tree.map(lambda *g: sum(g) / 4, *grads)
    updates, _ = optimizer.update(mean, optimizer.init(params), params)
    # LoFT's second moment is a sum with cancellation: the roundings of the mean count ten times.
    bound = 1e-4 if name == "loft" else 1e-5
    assert_trees_close(moved, optax.apply_updates(params, updates), bound)


@EVERY
def test_vmap_over_stacked_layers(name):
    """A leading axis by vmap, and the same stack handed over as it is."""
    optimizer = getattr(rlora.optax, name)(1e-2)
    params = {"lora_a": draw(4, 8, 3), "lora_b": draw(4, 3, 6, seed=1)}
    grads = {"lora_a": draw(4, 8, 3, seed=2), "lora_b": draw(4, 3, 6, seed=3)}
    state = jax.vmap(optimizer.init)(params)
    mapped, _ = jax.jit(jax.vmap(optimizer.update))(grads, state, params)
    stacked, _ = optimizer.update(grads, optimizer.init(params), params)
    assert_trees_close(mapped, stacked, 1e-5)


@EVERY
def test_donated_arguments(name):
    optimizer = getattr(rlora.optax, name)(1e-2)

    def step(params, state, grads):
        updates, state = optimizer.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    kept, given = make_tree(), make_tree()
    expected, _ = step(kept, optimizer.init(kept), make_tree(seed=10))
    donating = jax.jit(step, donate_argnums=(0, 1))
    got, state = donating(given, optimizer.init(given), make_tree(seed=10))
    donating(got, state, make_tree(seed=11))
    compiled, _ = jax.jit(step)(kept, optimizer.init(kept), make_tree(seed=10))
    # Entries up to 3, in which a compiled step rounds otherwise: 3 ulp, and where the factors are
    # remade by an eigendecomposition, or moments have cancelled, 30.
    assert_trees_close(compiled, expected, 1e-5 if name in ("balanced_lora", "loft") else 1e-6)


def test_scale_by_gram_in_a_chain_is_scaled_sgd():
    chained = optax.chain(rlora.optax.scale_by_gram(damping=1e-3), optax.sgd(0.1))
    whole = rlora.optax.scaled_sgd(0.1, damping=1e-3)
    params, grads = make_tree(), make_tree(seed=10)
    left, _ = chained.update(grads, chained.init(params), params)
    right, _ = whole.update(grads, whole.init(params), params)
    assert_trees_close(left, right, 1e-5)


def test_the_defaults_of_scale_by_gram_are_the_functional_ones():
    ours, core = (
        inspect.signature(f).parameters for f in (rlora.optax.scale_by_gram, scale_by_gram)
    )
    for name in ("damping", "damping_mode", "compute_dtype"):
        assert ours[name].default == core[name].default, name


def test_leaves_in_no_pair_pass_through_scale_by_gram():
    params = {**make_tree(), "bias": jnp.ones(4)}
    grads = {**make_tree(seed=10), "bias": jnp.arange(4.0)}
    link, alone = rlora.optax.scale_by_gram(), rlora.optax.scale_by_gram()
    updates, _ = link.update(grads, link.init(params), params)
    np.testing.assert_array_equal(updates.pop("bias"), grads["bias"])
    expected, _ = alone.update(make_tree(seed=10), alone.init(make_tree()), make_tree())
    assert_trees_close(updates, expected, 0)


def test_einsum_factors_of_qwix():
    """b (r, heads, width) and a (heads, width, r), as matrices."""
    optimizer = rlora.optax.lora_rite(1e-2)
    params = {"w_lora_a": draw(8, 3), "w_lora_b": draw(3, 2, 4, seed=1)}
    flat = {"lora_a": params["w_lora_a"], "lora_b": params["w_lora_b"].reshape(3, 8)}
    many, _ = optimizer.update(params, optimizer.init(params), params)
    one, _ = optimizer.update(flat, optimizer.init(flat), flat)
    assert many["w_lora_b"].shape == (3, 2, 4)
    assert_trees_close(many["w_lora_b"].reshape(3, 8), one["lora_b"], 0)


def test_pairs_by_hand_and_by_a_function():
    params = {"down": draw(3, 8), "up": draw(5, 3, seed=1)}
    by_hand = rlora.optax.scaled_sgd(0.1, pairs=[("down", "up")])
    found = rlora.optax.scaled_sgd(0.1, pairs=lambda leaves: [sorted(leaves)])
    left, _ = by_hand.update(params, by_hand.init(params), params)
    right, _ = found.update(params, found.init(params), params)
    assert_trees_close(left, right, 0)


def test_shapes_that_fit_both_ways_are_settled_by_the_name_or_a_layout():
    square = {"lora_a": draw(3, 3), "lora_b": draw(3, 3, seed=1)}
    given = [("lora_a", "lora_b", Layout("n r", "r m"))]
    flax = rlora.optax.scaled_sgd(0.1)
    told = rlora.optax.scaled_sgd(0.1, pairs=given)
    other = rlora.optax.scaled_sgd(0.1, pairs=[("lora_a", "lora_b")])
    by_name, as_told, turned_back = (
        o.update(square, o.init(square), square)[0] for o in (flax, told, other)
    )
    assert_trees_close(by_name, as_told, 0)
    assert not np.allclose(by_name["lora_a"], turned_back["lora_a"])


def test_blocks_of_one_parameter():
    """Query, key and value in one A and one B, of unequal widths: three pairs."""
    layout = Layout(blocks=(8, 4, 4))
    optimizer = rlora.optax.lora_rite(1e-2, pairs=[("A", "B", layout)])
    params, grads = ({"A": draw(6, 10, seed=s), "B": draw(16, 2, seed=s + 1)} for s in (0, 2))
    updates, _ = optimizer.update(grads, optimizer.init(params), params)
    ends = [(0, 8), (8, 12), (12, 16)]
    for i, (start, stop) in enumerate(ends):
        cut = lambda t: {"lora_A": t["A"][2 * i : 2 * i + 2], "lora_B": t["B"][start:stop]}  # noqa: B023, E731
        alone = rlora.optax.lora_rite(1e-2)
        expected, _ = alone.update(cut(grads), alone.init(cut(params)), cut(params))
        assert_trees_close(cut(updates), expected, 1e-6)  # float32, sums in another order


def test_state_is_a_fixed_point_of_update():
    """Shapes, dtypes and structure, in bfloat16 too: a scan over steps compiles."""
    params = jax.tree.map(lambda x: x.astype(jnp.bfloat16), make_tree())
    for name in ("lora_rite", "scaled_adamw", "riemannion"):
        optimizer = getattr(rlora.optax, name)(1e-2)
        state = optimizer.init(params)
        updates, after = optimizer.update(params, state, params)
        spec = lambda tree: jax.tree.map(lambda x: (x.shape, x.dtype), tree)  # noqa: E731
        assert spec(after) == spec(state)
        assert spec(updates) == spec(params)


@EVERY
@pytest.mark.parametrize("lead", [(), (2,)], ids=["", "stacked"])
def test_operands_have_as_many_axes_as_each_other(name, lead):
    """For those who let JAX refuse others."""
    params = jax.tree.map(lambda x: jnp.broadcast_to(x, (*lead, *x.shape)), make_tree())
    optimizer = getattr(rlora.optax, name)(1e-2)
    with jax.numpy_rank_promotion("raise"):
        state = jax.eval_shape(optimizer.init, params)
        jax.eval_shape(optimizer.update, params, state, params)


@pytest.mark.parametrize("name", ["scaled_adamw", "lora_rite"])
def test_a_stack_of_equal_layers_is_the_program_of_one(name):
    """So it takes as long to compile, as docs/how-to/optax.md says."""
    optimizer = getattr(rlora.optax, name)(1e-2)

    def lines(layers):
        params = {"q": {"lora_a": jnp.ones((layers, 8, 3)), "lora_b": jnp.ones((layers, 3, 6))}}
        lowered = jax.jit(optimizer.update).lower(params, optimizer.init(params), params)
        return lowered.as_text().count("\n")

    assert lines(8) == lines(2)


@pytest.mark.parametrize("name", ["lora_rite", "alt_lora", "alt_lora_plus", "loft"])
def test_nan_between_two_parts_of_a_step_is_seen_in_eager_updates_alone(name):
    optimizer, params = getattr(rlora.optax, name)(1e-2), make_tree()
    state = optimizer.init(params)
    with jax.debug_nans(True):
        jax.block_until_ready(jax.jit(optimizer.update)(params, state, params))
        with pytest.raises(FloatingPointError):
            optimizer.update(params, state, params)


def test_the_state_follows_names_that_a_file_has_put_into_another_order():
    """Files turn the keys 0 to 11 into strings, of which JAX puts "10" before "2"."""
    serialization = pytest.importorskip("flax.serialization")
    optimizer = rlora.optax.scaled_adamw(1e-2)

    def layers(seed):
        draws = {i: (draw(8, 3, seed=seed + i), draw(3, 6, seed=seed + 50 + i)) for i in range(12)}
        return {"layers": {i: {"lora_a": a, "lora_b": b} for i, (a, b) in draws.items()}}

    def step(params, grads, state):
        updates, state = optimizer.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    first, second = layers(100), layers(200)
    params, state = step(layers(0), first, optimizer.init(layers(0)))
    resumed = jax.tree.map(
        jnp.asarray, serialization.msgpack_restore(serialization.to_bytes(params))
    )
    assert list(resumed["layers"])[:3] == ["0", "1", "10"]
    loaded = serialization.from_bytes(optimizer.init(resumed), serialization.to_bytes(state))
    named = {"layers": {str(i): x for i, x in second["layers"].items()}}
    resumed, _ = step(resumed, named, loaded)
    params, _ = step(params, second, state)
    for i, layer in params["layers"].items():
        assert_trees_close(resumed["layers"][str(i)], layer, 0)


@EVERY
def test_a_state_of_numpy_arrays(name):
    """As files and pickles give it, in an update outside of jit."""
    optimizer = getattr(rlora.optax, name)(1e-2)
    params = {"q": make_tree()["q"]}
    state = optimizer.init(params)
    of_jax = optimizer.update(params, state, params)
    of_numpy = optimizer.update(params, jax.tree.map(np.asarray, state), params)
    assert_trees_close(of_numpy, of_jax, 0)
    assert all(isinstance(x, jax.Array) for x in jax.tree.leaves(of_numpy))


def test_the_state_follows_names_of_pairs_that_are_given_in_another_order():
    pairs = [(f"{k}.down", f"{k}.up") for k in "qv"]
    params, grads = (
        {
            k: {"down": draw(3, 8, seed=s), "up": draw(6, 3, seed=s + 1)}
            for k, s in (("q", t), ("v", t + 2))
        }
        for t in (0, 10)
    )
    one, other = (rlora.optax.scaled_adamw(1e-2, pairs=x) for x in (pairs, pairs[::-1]))
    _, state = one.update(grads, one.init(params), params)
    grads = jax.tree.map(lambda g: g[::-1], grads)
    assert_trees_close(other.update(grads, state, params), one.update(grads, state, params), 0)


def test_a_key_value_is_part_of_a_name():
    """Unless nothing stands beside it, as in a flax Variable and in the files of one."""
    factors = {"lora_a": draw(8, 3), "lora_b": {"value": draw(3, 6, seed=1)}}
    params = {
        "attn": {"key": jnp.ones(2), "value": jnp.ones(2), "q": factors},
        "value": jnp.ones(2),
    }
    still = {"attn.key", "attn.value", "value"}
    for hold in (still, still.__contains__):
        optimizer = rlora.optax.scaled_sgd(1e-2, hold=hold)
        updates, _ = optimizer.update(params, optimizer.init(params), params)
        for x in (updates["attn"]["key"], updates["attn"]["value"], updates["value"]):
            np.testing.assert_array_equal(x, 0.0)
        assert np.any(updates["attn"]["q"]["lora_b"]["value"])


def test_a_schedule_is_asked_for_the_number_of_steps():
    params = {"q": {"lora_a": jnp.ones((6, 2)), "lora_b": jnp.ones((2, 5))}}
    optimizer = rlora.optax.transformation(rlora.scaled_sgd(), lambda count: 0.5**count)
    state = optimizer.init(params)
    found = []
    for _ in range(3):
        updates, state = optimizer.update(params, state, params)
        found.append(float(updates["q"]["lora_a"][0, 0]))
    assert [x / found[0] for x in found] == pytest.approx([1, 0.5, 0.25], rel=1e-6)  # float32
    assert state.count == 3


def test_a_method_of_ones_own_that_calls_its_scaling_otherwise():
    """`Transform.init` takes it by position everywhere."""
    method = rlora.lora_pro_adamw()
    renamed = method._replace(init=lambda params, s=1.0: method.init(params, s))
    params = {"q": make_tree()["q"]}
    moved = []
    for one in (method, renamed):
        optimizer = rlora.optax.transformation(one, 1e-2, scaling=2.0)
        moved.append(optimizer.update(params, optimizer.init(params), params))
    assert_trees_close(*moved, 0)


def test_a_rest_with_a_random_key_outside_of_jit():
    params = {"q": make_tree()["q"], "bias": jnp.ones(4)}
    optimizer = rlora.optax.scaled_sgd(1e-2, rest=optax.add_noise(0.1, 0.5, 0))
    state = optimizer.init(params)
    eager, jitted = (
        f(params, state, params) for f in (optimizer.update, jax.jit(optimizer.update))
    )
    assert_trees_close(eager[0], jitted[0], 1e-6)
    assert eager[1].rest.rng_key == jitted[1].rest.rng_key != state.rest.rng_key

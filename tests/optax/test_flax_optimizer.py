"""flax's nnx.Optimizer around the methods, and what else of optax is put around them."""

import numpy as np
import pytest

from rlora import PairingError

jax = pytest.importorskip("jax")
optax = pytest.importorskip("optax")
nnx = pytest.importorskip("flax.nnx")
import jax.numpy as jnp  # noqa: E402
from trees import draw, equal, make_tree  # noqa: E402

import rlora.optax  # noqa: E402

KINDS = pytest.mark.parametrize("kind", ["scaled_adamw", "lora_rite", "riemannion"])


class Net(nnx.Module):
    """Two layers with factors and a head."""

    def __init__(self, rngs):
        self.first = nnx.LoRA(6, 2, 8, base_module=nnx.Linear(6, 8, rngs=rngs), rngs=rngs)
        self.second = nnx.LoRA(8, 3, 8, base_module=nnx.Linear(8, 8, rngs=rngs), rngs=rngs)
        self.head = nnx.Linear(8, 4, rngs=rngs)

    def __call__(self, x):
        return self.head(nnx.relu(self.second(nnx.relu(self.first(x)))))


def network():
    """With factors that are not zero."""
    model = Net(nnx.Rngs(0))
    for seed, layer in enumerate((model.first, model.second)):
        layer.lora_b[...] = 0.3 * draw(*layer.lora_b.shape, seed=seed)
    return model


@nnx.jit
def step(model, optimizer):
    x, y = draw(16, 6, seed=8), draw(16, 4, seed=9)
    loss = lambda model: jnp.mean((model(x) - y) ** 2)  # noqa: E731
    value, grads = nnx.value_and_grad(loss, argnums=nnx.DiffState(0, optimizer.wrt))(model)
    optimizer.update(model, grads)
    return value


def run(model, optimizer, steps):
    return [float(step(model, optimizer)) for _ in range(steps)]


def weights(model):
    return jax.tree.map(jnp.copy, nnx.to_pure_dict(nnx.state(model, nnx.Param)))


def by_hand(transformation, wrt, steps):
    """The losses and the weights of the transformation itself."""
    model = network()
    x, y = draw(16, 6, seed=8), draw(16, 4, seed=9)
    state = transformation.init(nnx.state(model, wrt))

    @nnx.jit
    def one(model, state):
        loss = lambda model: jnp.mean((model(x) - y) ** 2)  # noqa: E731
        value, grads = nnx.value_and_grad(loss, argnums=nnx.DiffState(0, wrt))(model)
        params = nnx.state(model, wrt)
        updates, state = transformation.update(grads, state, params)
        nnx.update(model, optax.apply_updates(params, updates))
        return value, state

    losses = []
    for _ in range(steps):
        value, state = one(model, state)
        losses.append(float(value))
    return losses, weights(model)


@KINDS
@pytest.mark.works("flax nnx", "nnx.Optimizer, optax.partition, orbax")
def test_nnx_optimizer(kind):
    make = getattr(rlora.optax, kind)
    model = network()
    optimizer = nnx.Optimizer(model, make(1e-2), wrt=nnx.LoRAParam)
    losses = run(model, optimizer, 5)
    expected, ends = by_hand(make(1e-2), nnx.LoRAParam, 5)
    assert losses[-1] < losses[0]
    np.testing.assert_allclose(
        losses, expected, rtol=1e-5
    )  # another program may be fused otherwise
    for x, y in zip(jax.tree.leaves(weights(model)), jax.tree.leaves(ends), strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-5)


def labels(params):
    """Labels: factors, the head, and frozen parameters."""

    def label(path, _):
        names = [str(getattr(key, "key", getattr(key, "name", key))) for key in path]
        return (
            "lora" if any("lora" in x for x in names) else names[0] if "head" in names else "still"
        )

    return jax.tree_util.tree_map_with_path(label, params)


@KINDS
def test_partition_under_nnx_optimizer(kind):
    """Factors by the method, the head by Adam, the base not at all."""
    parts = {
        "lora": getattr(rlora.optax, kind)(1e-2),
        "head": optax.adam(1e-2),
        "still": optax.set_to_zero(),
    }
    model = network()
    before = weights(model)
    optimizer = nnx.Optimizer(model, optax.partition(parts, labels), wrt=nnx.Param)
    losses = run(model, optimizer, 5)
    assert losses[-1] < losses[0]
    after = weights(model)
    for layer in ("first", "second"):
        assert equal(before[layer]["base_module"], after[layer]["base_module"])
        assert not equal(before[layer]["lora_b"], after[layer]["lora_b"])
    assert not equal(before["head"], after["head"])
    twin = network()
    alone = nnx.Optimizer(
        twin, optax.partition({**parts, "head": optax.set_to_zero()}, labels), wrt=nnx.Param
    )
    assert run(twin, alone, 1) == losses[:1]
    assert equal(weights(twin)["head"], before["head"])


def test_a_partition_that_parts_the_factors_is_refused():
    apart = lambda params: jax.tree_util.tree_map_with_path(  # noqa: E731
        lambda path, _: "a" if "lora_a" in str(path) else "b", params
    )
    parts = {"a": rlora.optax.lora_rite(1e-2), "b": optax.adam(1e-2)}
    with pytest.raises(PairingError, match=r"lora_a.*optax\.masked, and to freeze one of a pair"):
        nnx.Optimizer(network(), optax.partition(parts, apart), wrt=nnx.LoRAParam)


@KINDS
def test_injected_rates_under_nnx_optimizer(kind):
    """A schedule, and a rate that is set by hand: 0 holds everything still."""
    make = optax.inject_hyperparams(getattr(rlora.optax, kind))
    schedule = optax.linear_schedule(1e-2, 0.0, 4)
    model = network()
    optimizer = nnx.Optimizer(model, make(schedule), wrt=nnx.LoRAParam)
    run(model, optimizer, 4)
    still = weights(model)
    run(model, optimizer, 1)
    assert equal(still, weights(model))
    model = network()
    optimizer = nnx.Optimizer(model, make(1e-2), wrt=nnx.LoRAParam)
    run(model, optimizer, 2)
    rate = optimizer.opt_state.hyperparams["learning_rate"]
    rate[...] = jnp.zeros_like(rate[...])
    still = weights(model)
    run(model, optimizer, 1)
    assert equal(still, weights(model))


@KINDS
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of orbax about itself
@pytest.mark.filterwarnings("ignore:Sharding info not provided:UserWarning")
def test_orbax_saves_and_restores(kind, tmp_path):
    """Model and optimizer; the run goes on bit for bit."""
    checkpoint = pytest.importorskip("orbax.checkpoint")

    def build():
        model = network()
        tx = optax.inject_hyperparams(getattr(rlora.optax, kind))(1e-2)
        return model, nnx.Optimizer(model, tx, wrt=nnx.LoRAParam)

    model, optimizer = build()
    run(model, optimizer, 3)
    with checkpoint.StandardCheckpointer() as files:
        for name, part in (("model", model), ("optimizer", optimizer)):
            files.save(tmp_path / name, nnx.to_pure_dict(nnx.state(part)))
    again, resumed = build()
    with checkpoint.StandardCheckpointer() as files:
        for name, part in (("model", again), ("optimizer", resumed)):
            state = nnx.state(part)
            read = files.restore(tmp_path / name, nnx.to_pure_dict(state))
            nnx.replace_by_pure_dict(state, read)
            nnx.update(part, state)
    assert equal(weights(model), weights(again))
    assert run(model, optimizer, 3) == run(again, resumed, 3)
    assert equal(weights(model), weights(again))


# --- what optax does to trees ---------------------------------------------------------------------


@KINDS
@pytest.mark.refuses("optax", "optax.flatten around pairs, optax.tree.map_params")
def test_flatten_and_map_params_are_refused_with_the_reason(kind):
    optimizer = getattr(rlora.optax, kind)(1e-2)
    params = make_tree()
    with pytest.raises(PairingError, match=r"got one array: optax\.flatten"):
        optax.flatten(optimizer).init(params)
    state = optimizer.init(params)
    with pytest.raises(PairingError, match=r"got none: .*optax\.tree\.map_params.*jax\.tree\.map"):
        optax.tree.map_params(optimizer, lambda x: x, state)
    doubled = jax.tree.map(lambda x: 2 * x, state)
    assert jax.tree.structure(doubled) == jax.tree.structure(state)


def test_flatten_around_the_rest_is_fine():
    """Only the pairs need their shapes."""
    params = {**make_tree(), "bias": jnp.ones(4), "scale": jnp.ones((2, 3))}
    ends = []
    for rest in (optax.adam(1e-2), optax.flatten(optax.adam(1e-2))):
        optimizer = rlora.optax.lora_rite(1e-2, rest=rest)
        updates, _ = optimizer.update(params, optimizer.init(params), params)
        ends.append(updates)
    assert equal(*ends)

"""Arrays sharded over a mesh of four CPU devices, axes automatic or explicit."""

import os
import subprocess
import sys
import textwrap

import pytest

from rlora import methods

pytest.importorskip("optax")

SETUP = """
import jax, jax.numpy as jnp, numpy as np, optax, rlora.optax
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P

assert len(jax.devices()) == 4
rng = np.random.default_rng(0)
SHAPES = {
    "outer.lora_a": (16, 3), "outer.lora_b": (3, 8),
    "layers.lora_a": (4, 16, 3), "layers.lora_b": (4, 3, 8),
    "rank.lora_a": (16, 4), "rank.lora_b": (4, 8),
    "heads.w_lora_a": (8, 3), "heads.w_lora_b": (3, 4, 6),
}
SPECS = {
    "outer.lora_a": P("x"), "outer.lora_b": P(None, "x"),
    "layers.lora_a": P("x"), "layers.lora_b": P("x"),
    "rank.lora_a": P(None, "x"), "rank.lora_b": P("x"),
    "heads.w_lora_a": P("x"), "heads.w_lora_b": P(None, "x"),
}
params, grads = (
    {k: jnp.asarray(rng.normal(size=s), jnp.float32) for k, s in SHAPES.items()} for _ in range(2)
)

def train(optimizer, params, grads, steps=2):
    @jax.jit
    def step(params, state, grads):
        traced.append(1)
        updates, state = optimizer.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    traced = []
    state = optimizer.init(params)
    for _ in range(steps):
        params, state = step(params, state, grads)
    return params, state, len(traced)

def sharded(mesh):
    where = {k: NamedSharding(mesh, spec) for k, spec in SPECS.items()}
    return where, jax.device_put(params, where), jax.device_put(grads, where)
"""


def on_four_devices(code, *arguments):
    done = subprocess.run(
        [sys.executable, "-c", SETUP + textwrap.dedent(code), *arguments],
        capture_output=True,
        text=True,
        timeout=1200,
        check=False,
        env={
            **os.environ,
            "XLA_FLAGS": "--xla_force_host_platform_device_count=4 " + os.environ["XLA_FLAGS"],
            "JAX_ENABLE_X64": "0",
        },
    )
    assert done.stdout == "done\n", done.stderr


@pytest.mark.parametrize("kind", ["Auto", "Explicit"])
@pytest.mark.works("optax", "meshes with automatic and explicit axes")
def test_every_method_moves_sharded_factors_as_whole_ones(kind):
    """Split along an outer axis, over the layers of a stack, over the ranks and over heads."""
    names = methods.__all__ if kind == "Explicit" else ["scaled_adamw", "lora_rite"]
    code = """
    import sys
    kind, *names = sys.argv[1:]
    mesh = jax.make_mesh((4,), ("x",), axis_types=(getattr(AxisType, kind),))
    where, split, split_grads = sharded(mesh)
    for name in names:
        optimizer = getattr(rlora.optax, name)(1e-2)
        whole, _, _ = train(optimizer, params, grads)
        moved, _, traced = train(optimizer, split, split_grads)
        for key in params:
            # float32 sums of four parts in another order; some methods divide by small Grams
            np.testing.assert_allclose(moved[key], whole[key], atol=2e-5, err_msg=f"{name} {key}")
        if kind == "Explicit":
            assert traced == 1, (name, traced)
            for key, x in moved.items():
                assert x.sharding.is_equivalent_to(where[key], x.ndim), (name, key, x.sharding)
    print("done")
    """
    on_four_devices(code, kind, *names)


def test_the_state_lies_as_the_factors_do():
    """Moments are split as their factors, under a mesh context and two kinds of axes too."""
    on_four_devices("""
    mesh = jax.make_mesh((2, 2), ("x", "y"), axis_types=(AxisType.Explicit, AxisType.Auto))
    where, split, split_grads = sharded(mesh)
    optimizer = rlora.optax.scaled_adamw(1e-2)
    with jax.set_mesh(mesh):
        state = jax.jit(optimizer.init)(split)
        moved, after, traced = train(optimizer, split, split_grads)
    assert traced == 1
    for s in (state, after):
        (gram, decay) = s.method
        specs = {tuple(jax.typeof(x).sharding.spec) for pair in gram.mu for x in pair}
        assert (None, "x") in specs and ("x", None) in specs and ("x", None, None) in specs, specs
    whole, _, _ = train(optimizer, params, grads)
    for key in params:
        np.testing.assert_allclose(moved[key], whole[key], atol=1e-5)
    print("done")
    """)


def test_numbers_among_the_leaves_and_functions_among_the_extra_arguments():
    """As off a mesh: a scale that is a Python number, and what a line search passes on."""
    on_four_devices("""
    mesh = jax.make_mesh((4,), ("x",), axis_types=(AxisType.Explicit,))
    _, split, split_grads = sharded(mesh)
    seen = []

    def update(updates, state, params=None, *, value, value_fn):
        seen.append(value_fn)
        return jax.tree.map(lambda g: -value * g, updates), state

    rest = optax.GradientTransformationExtraArgs(lambda params: (), update)
    optimizer = rlora.optax.scaled_adamw(1e-2, rest=rest)
    params, grads = {**split, "scale": 1.0}, {**split_grads, "scale": 2.0}
    state = optimizer.init(params)
    updates, _ = optimizer.update(grads, state, params, value=jnp.float32(0.5), value_fn=max)
    assert seen == [max] and updates["scale"] == -1.0, (seen, updates["scale"])
    print("done")
    """)


def test_hyperparameters_that_are_arrays():
    """Within `jax.set_mesh` they are arrays on the mesh, with axes as explicit as the factors'."""
    on_four_devices("""
    mesh = jax.make_mesh((4,), ("x",), axis_types=(AxisType.Explicit,))
    where, split, split_grads = sharded(mesh)
    inject = optax.inject_hyperparams
    makers = [
        lambda: inject(rlora.optax.scaled_adamw)(optax.linear_schedule(1e-2, 1e-3, 2), b1=0.5),
        lambda: inject(rlora.optax.lora_pro_adamw)(1e-2, scaling=2.0),
        lambda: inject(rlora.optax.transformation)(rlora.lora_rite(), 1e-2),
        lambda: rlora.optax.scaled_adamw(jnp.asarray(1e-2)),
        lambda: optax.chain(inject(rlora.optax.scale_by_gram)(damping=0.1), optax.sgd(1e-2)),
    ]
    for make in makers:
        whole, _, _ = train(make(), params, grads)
        with jax.set_mesh(mesh):
            optimizer = make()
            moved, _, _ = train(optimizer, split, split_grads)
            state = jax.jit(optimizer.init)(split)
            for call in (optimizer.update, jax.jit(optimizer.update)):
                updates, _ = call(split_grads, state, split)
        for key, x in moved.items():
            # as above
            np.testing.assert_allclose(x, whole[key], atol=2e-5, err_msg=key)
            assert x.sharding.is_equivalent_to(where[key], x.ndim), (key, x.sharding)
    print("done")
    """)

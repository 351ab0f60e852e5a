"""flax, qwix and Keras as they are: the step of each layer is that of the product it computes.

The oracle is dense: it takes the gradient of the library's own weight W and knows that the layer
computes with ``W + s a b``. What it says must move the library's output as the new factors do.
"""

import os
from math import prod

import numpy as np
import pytest

jax = pytest.importorskip("jax")
optax = pytest.importorskip("optax")
os.environ["KERAS_BACKEND"] = "jax"  # read once, when Keras is imported
import jax.numpy as jnp  # noqa: E402
from product import LR, step_of_product  # noqa: E402
from trees import draw  # noqa: E402

import rlora.optax  # noqa: E402
from rlora import PairingError, find_pairs  # noqa: E402
from rlora.optax.param_tree import named_leaves, with_leaves  # noqa: E402

OPTIMIZER = rlora.optax.scaled_sgd(LR, damping=0.0)


def assert_steps_as_the_product(forward, weights, factors, weight_of, scaling, stacked=False):
    """`forward(weights, factors)` is the library's; returns the report on the factors."""
    leaves, structure = jax.tree.flatten(factors)  # random, as from B = 0 a step shows little
    drawn = [draw(*x.shape, seed=i, dtype=x.dtype) for i, x in enumerate(leaves)]
    factors = jax.tree.unflatten(structure, drawn)
    y = forward(weights, factors)
    C = draw(*y.shape, seed=9)
    loss = lambda *trees: (C * forward(*trees)).sum()  # noqa: E731
    G, grads = jax.jit(jax.grad(loss, (0, 1)))(weights, factors)

    updates, _ = jax.jit(OPTIMIZER.update)(grads, OPTIMIZER.init(factors), factors)
    moved = optax.apply_updates(factors, updates)

    old, new, W, G = map(named_leaves, (factors, moved, weights, G))
    report = find_pairs(old)
    for pair in report:
        a, b, name = old[pair.a], old[pair.b], weight_of(pair.a)
        stack = a.shape[:1] if stacked else ()
        c, d, change = step_of_product(
            a.reshape(*stack, -1, a.shape[-1]),
            b.reshape(*stack, a.shape[-1], -1),
            G[name].reshape(*stack, prod(a.shape[len(stack) : -1]), -1),  # rows as those of a
            scaling,
        )
        # float32; random Grams have condition numbers of up to 1e3
        close(new[pair.a], c.reshape(a.shape), 1e-4)
        close(new[pair.b], d.reshape(b.shape), 1e-4)
        W[name] += change.reshape(W[name].shape).astype(W[name].dtype)
    assert np.abs(forward(weights, moved) - y).max() > 1e-2
    close(forward(weights, moved), forward(with_leaves(weights, W), factors), 1e-4)
    return report


def close(got, expected, tolerance):
    scale = np.abs(np.asarray(expected)).max()
    np.testing.assert_allclose(got, expected, rtol=0, atol=tolerance * scale)


# --- flax -----------------------------------------------------------------------------------------


def check_nnx(model, call, weight_of, scaling=1.0, stacked=False):
    from flax import nnx

    graph, factors, weights = nnx.split(model, nnx.LoRAParam, ...)
    forward = lambda weights, factors: call(nnx.merge(graph, factors, weights))  # noqa: E731
    return assert_steps_as_the_product(forward, weights, factors, weight_of, scaling, stacked)


@pytest.mark.works("flax nnx", "layers, stacks of them")
def test_flax_nnx():
    """LoRALinear, and LoRA around a layer."""
    nnx = pytest.importorskip("flax.nnx")

    class Net(nnx.Module):
        def __init__(self, rngs):
            self.first = nnx.LoRALinear(8, 7, lora_rank=2, rngs=rngs)
            base = nnx.Linear(7, 6, rngs=rngs)
            self.second = nnx.LoRA(7, 3, 6, base_module=base, rngs=rngs)

        def __call__(self, x):
            return self.second(self.first(x))

    kernels = {"first.lora.lora_a": "first.kernel", "second.lora_a": "second.base_module.kernel"}
    report = check_nnx(Net(nnx.Rngs(0)), lambda model: model(draw(5, 8)), kernels.get)
    assert [pair.rank for pair in report] == [2, 3]


def test_flax_nnx_layers_stacked_by_vmap_and_run_by_scan():
    nnx = pytest.importorskip("flax.nnx")
    split = nnx.split_rngs(splits=4)
    make = split(nnx.vmap(lambda rngs: nnx.LoRALinear(6, 6, lora_rank=2, rngs=rngs)))

    @nnx.scan(in_axes=(0, nnx.Carry), out_axes=nnx.Carry)
    def run(layer, x):
        return layer(x)

    report = check_nnx(
        make(nnx.Rngs(0)), lambda layers: run(layers, draw(5, 6)), lambda a: "kernel", stacked=True
    )
    assert [(pair.shape_a, pair.shape_b) for pair in report] == [((4, 2, 6), (4, 6, 2))]


def test_flax_nnx_other_variables_are_refused_by_name():
    nnx = pytest.importorskip("flax.nnx")
    model = nnx.LoRALinear(8, 7, lora_rank=2, rngs=nnx.Rngs(0))
    with pytest.raises(PairingError, match=r"2 leaves are in no pair: bias, kernel"):
        OPTIMIZER.init(nnx.state(model, nnx.Param))
    alone = nnx.state(model, nnx.LoRAParam)
    del alone["lora"]["lora_b"]
    with pytest.raises(
        PairingError, match=r"lora\.lora_a has the name of a factor, but its partner"
    ):
        OPTIMIZER.init(alone)


# --- qwix -----------------------------------------------------------------------------------------

OLD_FLAX = pytest.mark.filterwarnings(  # qwix 0.1.8 calls flax 0.12 by old names
    "ignore:The 'm.iter_modules:DeprecationWarning",
    "ignore:'.value' access:DeprecationWarning",
    "ignore:'VariableState' was removed:DeprecationWarning",
)


@OLD_FLAX
@pytest.mark.works("qwix", "linear, einsum, batched")
def test_qwix():
    """Its provider on linear layers and on einsums with axes of heads and of experts."""
    nnx = pytest.importorskip("flax.nnx")
    qwix = pytest.importorskip("qwix")

    class Net(nnx.Module):
        def __init__(self, rngs):
            self.q = nnx.Einsum("BTD,DNH->BTNH", (8, 4, 3), rngs=rngs)
            self.o = nnx.Einsum("BTNH,NHD->BTD", (4, 3, 7), rngs=rngs)
            self.up = nnx.Linear(7, 9, rngs=rngs)
            self.heads = nnx.LinearGeneral(9, (2, 5), rngs=rngs)

        def __call__(self, x):
            return self.heads(self.up(self.o(self.q(x))))

    x = draw(2, 5, 8)
    provider = qwix.LoraProvider(module_path=".*", rank=2, alpha=3.0)
    model = qwix.apply_lora_to_model(Net(nnx.Rngs(0)), provider, x, rngs=nnx.Rngs(1))
    report = check_nnx(
        model, lambda model: model(x), lambda a: a.removesuffix("_lora_a"), scaling=3.0 / 2
    )
    assert {pair.name: (pair.shape_a, pair.shape_b) for pair in report} == {
        "heads.kernel": ((2, 9), (10, 2)),
        "o.kernel": ((2, 12), (7, 2)),
        "q.kernel": ((2, 8), (12, 2)),
        "up.kernel": ((2, 7), (9, 2)),
    }


@OLD_FLAX
def test_qwix_batched_contractions():
    """Experts: dot_general has a pair for each, an einsum one pair for all."""
    nnx = pytest.importorskip("flax.nnx")
    qwix = pytest.importorskip("qwix")
    batched = (((2,), (1,)), ((0,), (0,)))

    class Net(nnx.Module):
        def __init__(self, rngs):
            self.w = nnx.Param(rngs.params.normal((4, 8, 6), jnp.float32))

        def __call__(self, x):
            return jax.lax.dot_general(x, self.w[...], batched)

    x = draw(4, 5, 8)
    provider = qwix.LoraProvider(module_path=".*", rank=2, alpha=2.0)
    model = qwix.apply_lora_to_model(Net(nnx.Rngs(0)), provider, x, rngs=nnx.Rngs(1))
    report = check_nnx(model, lambda model: model(x), lambda a: "w", stacked=True)
    assert [(pair.shape_a, pair.shape_b) for pair in report] == [((4, 2, 8), (4, 6, 2))]

    class Sum(nnx.Module):
        def __init__(self, rngs):
            self.e = nnx.Einsum("ETD,EDF->ETF", (4, 8, 6), rngs=rngs)

        def __call__(self, x):
            return self.e(x)

    model = qwix.apply_lora_to_model(Sum(nnx.Rngs(0)), provider, x, rngs=nnx.Rngs(1))
    report = check_nnx(model, lambda model: model(x), lambda a: "e.kernel")
    assert [(pair.shape_a, pair.shape_b) for pair in report] == [((2, 32), (6, 2))]


# --- Keras ----------------------------------------------------------------------------------------

KERAS = {
    "Dense": (lambda k: k.Dense(6), (5, 8)),
    "EinsumDense, heads out": (
        lambda k: k.EinsumDense("abc,cde->abde", output_shape=(None, 4, 3)),
        (2, 5, 8),
    ),
    "EinsumDense, heads in": (
        lambda k: k.EinsumDense("abde,dec->abc", output_shape=(None, 8)),
        (2, 5, 4, 3),
    ),
    "Conv2D": (lambda k: k.Conv2D(4, 3), (2, 8, 8, 5)),
    "Embedding": (lambda k: k.Embedding(9, 6), None),
}


@pytest.mark.parametrize("name", KERAS)
@pytest.mark.works("Keras", "Dense, EinsumDense, Conv2D, Embedding")
def test_keras(name):
    keras = pytest.importorskip("keras")
    if keras.backend.backend() != "jax":
        pytest.skip(f"Keras was imported with {keras.backend.backend()} before")
    make, shape = KERAS[name]
    layer = make(keras.layers)
    x = jnp.arange(10).reshape(2, 5) % 9 if shape is None else draw(*shape)
    layer.build(x.shape)
    layer.enable_lora(2, lora_alpha=3.0)
    paths = lambda variables: [v.path.replace("/", ".") for v in variables]  # noqa: E731
    trained, fixed = paths(layer.trainable_variables), paths(layer.non_trainable_variables)
    values = {v.path.replace("/", "."): v.value for v in layer.variables}

    def forward(weights, factors):
        both = weights | factors
        y, _ = layer.stateless_call([both[p] for p in trained], [both[p] for p in fixed], x)
        return y

    factors = {p: v for p, v in values.items() if "lora" in p}
    weights = {p: v for p, v in values.items() if v.dtype == jnp.float32 and p not in factors}
    weight_of = lambda a: a.replace("lora_", "").removesuffix("_a")  # noqa: E731
    report = assert_steps_as_the_product(forward, weights, factors, weight_of, 3.0 / 2)
    assert len(report) == 1
    assert not report.refused

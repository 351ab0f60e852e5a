"""mlx-lm's LoRA layers, stepped through NumPy as docs/how-to/mlx_loop.py does it."""

import importlib.util
from pathlib import Path

import numpy as np
import pytest

mx = pytest.importorskip("mlx.core")
pytest.importorskip("mlx_lm")
import mlx.nn as nn  # noqa: E402
from mlx.utils import tree_flatten, tree_unflatten  # noqa: E402
from product import LR, step_of_product  # noqa: E402

import rlora  # noqa: E402

HOW_TO = Path(__file__).parents[2] / "docs" / "how-to" / "mlx_loop.py"
spec = importlib.util.spec_from_file_location("mlx_loop", HOW_TO)
how_to = importlib.util.module_from_spec(spec)
spec.loader.exec_module(how_to)

RNG = np.random.default_rng(0)
TOKENS = mx.array([[1, 4, 8], [0, 2, 2]])


def draw(*shape):
    return mx.array(RNG.normal(size=shape).astype(np.float32))


def linear():
    from mlx_lm.tuner.lora import LoRALinear

    x = draw(5, 8)
    return LoRALinear.from_base(nn.Linear(8, 6), r=2, scale=3.0), lambda layer: layer(x)


def switch():
    """Three experts, of which each token sees two."""
    from mlx_lm.models.switch_layers import SwitchLinear
    from mlx_lm.tuner.lora import LoRASwitchLinear

    x, chosen = draw(5, 1, 1, 8), mx.array([[0, 1], [1, 2], [2, 0], [0, 1], [1, 2]])
    base = LoRASwitchLinear.from_base(SwitchLinear(8, 6, 3), r=2, scale=3.0)
    return base, lambda layer: layer(x, chosen)


def embedding():
    from mlx_lm.tuner.lora import LoRAEmbedding

    return LoRAEmbedding.from_base(nn.Embedding(9, 6), r=2, scale=3.0), lambda layer: layer(TOKENS)


def named(tree):
    return {name: np.array(x) for name, x in tree_flatten(tree)}


CASES = {
    # make, the base weight, whether it and the factors are (out, in), shapes of A and B
    "LoRALinear": (linear, "linear.weight", (True, False), ((2, 8), (6, 2))),
    "LoRASwitchLinear": (switch, "linear.weight", (True, True), ((3, 2, 8), (3, 6, 2))),
    "LoRAEmbedding": (embedding, "embedding.weight", (False, False), ((2, 9), (6, 2))),
}


@pytest.mark.parametrize("name", CASES)
@pytest.mark.works("mlx-lm", "linear, switch, embedding, through NumPy")
def test_a_step_is_that_of_the_product(name):
    make, weight, (weight_turns, factors_turn), shapes = CASES[name]
    layer, call = make()
    factors = {k: draw(*v.shape) for k, v in tree_flatten(layer.parameters()) if "lora" in k}
    layer.update(tree_unflatten(list(factors.items())))
    y = call(layer)
    C = draw(*y.shape)
    _, grads = nn.value_and_grad(layer, lambda layer: (C * call(layer)).sum())(layer)
    grads, old = named(grads), named(layer.parameters())
    layer.freeze()
    layer.unfreeze(keys=["lora_a", "lora_b"])

    optimizer = how_to.Optimizer(layer, rlora.scaled_sgd(damping=0.0), LR)
    (pair,) = optimizer.report
    assert (pair.shape_a, pair.shape_b) == shapes
    optimizer.update(layer, tree_unflatten([(k, mx.array(g)) for k, g in grads.items()]))
    new, y_new = named(layer.parameters()), call(layer)

    def turn(x):
        return x.mT if factors_turn else x

    a, b = turn(old["lora_a"]), turn(old["lora_b"])  # (..., in, r), (..., r, out)
    G = grads[weight].mT if weight_turns else grads[weight]
    c, d, change = step_of_product(a, b, G, 3.0)
    for key, x in (("lora_a", c), ("lora_b", d)):
        assert close(new[key], turn(x))
    base = old[weight] + (change.mT if weight_turns else change)
    moved = {weight: mx.array(base.astype(np.float32)), **{k: mx.array(old[k]) for k in factors}}
    layer.update(tree_unflatten(list(moved.items())))
    assert np.abs(np.array(y_new - y)).max() > 1e-2
    assert close(y_new, call(layer))


def close(got, expected):
    """In float32, after Grams of random numbers with condition numbers of up to 1e3."""
    got, expected = np.array(got), np.array(expected)
    return np.abs(got - expected).max() < 1e-4 * np.abs(expected).max()


def test_the_how_to_learns():
    losses = how_to.main(steps=30)
    assert losses[-1] < 0.3 * losses[0]


def test_what_is_no_pair_is_told_by_name():
    from mlx_lm.tuner.dora import DoRALinear

    layer = DoRALinear.from_base(nn.Linear(8, 6), r=2)
    shapes = dict(tree_flatten(layer.parameters()))
    report = rlora.find_pairs({k: v for k, v in shapes.items() if not k.startswith("linear")})
    assert len(report) == 1
    assert report.plain == ("m",)  # the magnitudes
    del shapes["lora_b"]
    assert "its partner, the B" in rlora.find_pairs(shapes).refused["lora_a"]

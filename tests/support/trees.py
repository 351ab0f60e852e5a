"""Trees of LoRA factors for rlora.optax."""

import jax
import jax.numpy as jnp
import numpy as np

from rlora import Factors


def draw(*shape, seed=0, dtype=jnp.float32):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), dtype)


def make_tree(seed=0, r=3):
    """Two layers as flax has them, one as PEFT has it."""
    return {
        "q": {"lora_a": draw(8, r, seed=seed), "lora_b": draw(r, 6, seed=seed + 1)},
        "v": {"lora_a": draw(8, r, seed=seed + 2), "lora_b": draw(r, 6, seed=seed + 3)},
        "peft.lora_A.weight": draw(r, 8, seed=seed + 4),
        "peft.lora_B.weight": draw(5, r, seed=seed + 5),
    }


def as_factors(tree):
    turned = [Factors(tree[k]["lora_a"].T, tree[k]["lora_b"].T) for k in ("q", "v")]
    return [Factors(tree["peft.lora_A.weight"], tree["peft.lora_B.weight"]), *turned]


def assert_trees_close(left, right, tolerance):
    for x, y in zip(jax.tree.leaves(left), jax.tree.leaves(right), strict=True):
        np.testing.assert_allclose(x, y, rtol=0, atol=tolerance)


def equal(left, right):
    """Bit for bit, NaN included."""
    leaves = zip(jax.tree.leaves(left), jax.tree.leaves(right), strict=True)
    return all(np.array_equal(x, y, equal_nan=True) for x, y in leaves)

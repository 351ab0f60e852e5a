"""LoRA of a flax nnx model with rlora.optax: handwritten digits, turned by a quarter.

A network that has learned the digits as they are is frozen; LoRA factors of its layers learn the
turned ones, once with optax's AdamW and once with each method named on the command line.

    python docs/how-to/flax_nnx.py                      # AdamW, scaled AdamW and LoRA-RITE
    python docs/how-to/flax_nnx.py lora_pro_adamw       # AdamW and LoRA-Pro
"""

import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from sklearn.datasets import load_digits

import rlora.optax

WIDTH, RANK, STEPS, LR = 128, 4, 150, 1e-2


class Network(nnx.Module):
    """Three layers, each with LoRA factors beside it."""

    def __init__(self, rngs: nnx.Rngs) -> None:
        sizes = [(64, WIDTH), (WIDTH, WIDTH), (WIDTH, 10)]
        self.layers = nnx.List(
            [
                nnx.LoRA(m, RANK, n, base_module=nnx.Linear(m, n, rngs=rngs), rngs=rngs)
                for m, n in sizes
            ]
        )

    def __call__(self, x: jax.Array) -> jax.Array:
        for layer in self.layers[:-1]:
            x = nnx.relu(layer(x))
        return self.layers[-1](x)


def train(model, kind, optimizer, x, y, steps):
    """Train the variables of one kind; return the loss after each step."""

    @nnx.jit
    def step(model, state):
        def loss(model):
            return optax.softmax_cross_entropy_with_integer_labels(model(x), y).mean()

        value, grads = nnx.value_and_grad(loss, argnums=nnx.DiffState(0, kind))(model)
        params = nnx.state(model, kind)
        updates, state = optimizer.update(grads, state, params)
        nnx.update(model, optax.apply_updates(params, updates))
        return value, state

    state = optimizer.init(nnx.state(model, kind))
    losses = []
    for _ in range(steps):
        value, state = step(model, state)
        losses.append(float(value))
    return losses


def main(names: list[str], steps: int = STEPS) -> dict[str, tuple[list[float], float]]:
    """For each method the losses of training and the accuracy on held-out digits."""
    images, labels = load_digits(return_X_y=True)
    x, y = jnp.asarray(images / 16, jnp.float32), jnp.asarray(labels)
    turned = jnp.asarray(np.rot90(images.reshape(-1, 8, 8), axes=(1, 2)).reshape(-1, 64) / 16)
    results = {}
    for name in ["adamw", *names]:
        model = Network(nnx.Rngs(0))
        base = nnx.All(nnx.Param, nnx.Not(nnx.LoRAParam))
        train(model, base, optax.adamw(1e-2), x[:1200], y[:1200], 60)
        optimizer = optax.adamw(LR) if name == "adamw" else getattr(rlora.optax, name)(LR)
        losses = train(model, nnx.LoRAParam, optimizer, turned[:1200], y[:1200], steps)
        accuracy = float((model(turned[1200:]).argmax(-1) == y[1200:]).mean())
        print(f"{name:16} loss {losses[0]:.3f} -> {losses[-1]:.3f}, accuracy {accuracy:.3f}")
        results[name] = (losses, accuracy)
    return results


if __name__ == "__main__":
    main(sys.argv[1:] or ["scaled_adamw", "lora_rite"])

"""LoRA layers of mlx-lm, stepped by rlora through NumPy.

Arrays of mlx do not follow the Array API, but their memory is the host's: a copy of the factors,
some megabytes, is what a step through NumPy costs more than one in mlx would.

    python docs/how-to/mlx_loop.py
"""

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten, tree_unflatten
from mlx_lm.tuner.lora import LoRALinear

import rlora


class Optimizer:
    """A method of rlora over the LoRA factors that a model trains."""

    def __init__(self, model: nn.Module, method: rlora.Transform, learning_rate: float) -> None:
        self.method, self.learning_rate = method, learning_rate
        params = as_numpy(model.trainable_parameters())
        self.report = rlora.find_pairs(params)
        if self.report.plain or self.report.refused:
            msg = f"freeze or mend what is in no pair: {self.report}"
            raise ValueError(msg)
        self.state = method.init(self.factors(params))

    def factors(self, arrays: dict[str, np.ndarray]) -> list[rlora.Factors]:
        """The arrays as A (..., r, n) and B (..., m, r)."""
        return [factors for p in self.report for factors in p.read(arrays[p.a], arrays[p.b])]

    def update(self, model: nn.Module, grads: dict) -> None:
        """One step, in place as mlx's own optimizers do it."""
        stored = dict(tree_flatten(model.trainable_parameters()))
        moved, self.state = rlora.step(
            self.method,
            self.factors(as_numpy(stored)),
            self.factors(as_numpy(grads)),
            self.state,
            self.learning_rate,
        )
        for pair, new in zip(self.report, moved, strict=True):
            for name, view, x in zip((pair.a, pair.b), pair.views[0], new, strict=True):
                stored[name] = mx.array(view.write(x)).astype(stored[name].dtype)
        model.update(tree_unflatten(list(stored.items())))


def as_numpy(tree: dict) -> dict[str, np.ndarray]:
    """A tree of mlx as named NumPy arrays, at least float32: NumPy has no bfloat16."""
    return {
        name: np.array(x.astype(mx.float32) if x.dtype == mx.bfloat16 else x)
        for name, x in tree_flatten(tree)
    }


def main(steps: int = 60) -> list[float]:
    """Two adapted layers learn to do what two others do."""
    mx.random.seed(0)
    rng = np.random.default_rng(0)
    x = mx.array(rng.normal(size=(64, 16)).astype(np.float32))
    model = nn.Sequential(nn.Linear(16, 24), nn.Tanh(), nn.Linear(24, 4))
    shift = [mx.array(0.3 * rng.normal(size=s).astype(np.float32)) for s in [(16, 24), (24, 4)]]
    first, last = model.layers[0], model.layers[2]
    target = mx.tanh(first(x) + x @ shift[0]) @ (last.weight.T + shift[1]) + last.bias
    model.freeze()
    model.layers = [LoRALinear.from_base(first, r=4), nn.Tanh(), LoRALinear.from_base(last, r=4)]

    def loss(model: nn.Module) -> mx.array:
        return ((model(x) - target) ** 2).mean()

    optimizer = Optimizer(model, rlora.scaled_adamw(weight_decay=0.0), 1e-2)
    losses = []
    for _ in range(steps):
        value, grads = nn.value_and_grad(model, loss)(model)
        optimizer.update(model, grads)
        losses.append(value.item())
    print(f"{len(optimizer.report)} pairs, loss {losses[0]:.4f} -> {losses[-1]:.4f}")
    return losses


if __name__ == "__main__":
    main()

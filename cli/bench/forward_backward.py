"""The rest of a training step: forward and backward through the layers that carry the factors."""

import importlib
import statistics
import time
from collections import Counter
from typing import Any, Final

import numpy as np

from .cases import ArraySpec
from .problem import Problem

TOKENS: Final = 512
"""In one sequence; the batch is one."""

REPEATS: Final = 3


def forward_backward_seconds(problem: Problem, spec: ArraySpec) -> float:
    """Sum over all layers; layers of one shape are timed once, as their weights would not fit.

    A layer is ``x W0ᵀ + (x Aᵀ) Bᵀ`` with W0 frozen. Backward goes to A, B and x, as the layer
    before needs it. Attention, norms and activations between the layers are left out.
    """
    shapes = Counter((B.shape[0], A.shape[1], A.shape[0]) for A, B in problem.pairs)
    return sum(count * _layer_seconds(shape, spec) for shape, count in shapes.items())


def _layer_seconds(shape: tuple[int, int, int], spec: ArraySpec) -> float:
    m, n, r = shape
    rng, torch = np.random.default_rng(0), importlib.import_module("torch")

    def tensor(*size: int) -> Any:
        return spec.array(rng.standard_normal(size, np.float32) / size[-1] ** 0.5)

    W, G = tensor(m, n), tensor(TOKENS, m)
    x, A, B = (tensor(*s).requires_grad_() for s in ((TOKENS, n), (r, n), (m, r)))

    def once() -> float:
        start = time.perf_counter()
        y = torch.nn.functional.linear(x, W) + (x @ A.mT) @ B.mT
        grads = torch.autograd.grad(y, (x, A, B), G)
        spec.backend.synchronize(*grads)
        return time.perf_counter() - start

    once()
    return statistics.median(once() for _ in range(REPEATS))

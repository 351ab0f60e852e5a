"""A small transformer, and adapters of many runs in it at once.

The weights are shared by all runs; adapters have a leading axis, and so have the strings.
"""

import math
from collections.abc import Mapping
from typing import Any, Final, NamedTuple, TypeAlias, cast

import torch
from torch import Tensor
from torch.nn import functional

from rlora import Factors

from .strings import DIGITS, LENGTH, VOCABULARY, mixture

POSITIONS: Final = 2 * LENGTH + 1
BATCH: Final = 12
"""Strings of each known task in a step in which the base learns them."""


class Shape(NamedTuple):
    """Sizes of a base, and how it learns what it knows."""

    width: int = 64
    heads: int = 4
    blocks: int = 2
    steps: int = 1000
    rate: float = 2e-3
    size: float = 0.124
    """Root mean square of the entries of its linear layers when it is trained, their mean."""

    @property
    def hidden(self) -> int:
        """Hidden units of a block."""
        return 4 * self.width


SMALL: Final = Shape()
"""101,000 weights."""

LARGE: Final = Shape(width=256, heads=8, blocks=4, rate=5e-4, size=0.0577)
"""3.2 million weights."""

Weights: TypeAlias = dict[str, Tensor]
Adapters: TypeAlias = dict[str, Factors]
"""Name of a weight -> A (runs, r, n) and B (runs, m, r)."""


def new_weights(shape: Shape, generator: torch.Generator) -> Weights:
    """Random weights of variance 1 / n; "block.name" are the linear layers, (m, n)."""

    def normal(*shape: int, scale: float) -> Tensor:
        return scale * torch.randn(shape, generator=generator)

    width, hidden = shape.width, shape.hidden
    sizes = {
        **dict.fromkeys(("query", "key", "value", "output"), (width, width)),
        "up": (hidden, width),
        "down": (width, hidden),
    }
    weights = {
        f"{block}.{name}": normal(m, n, scale=n**-0.5)
        for block in range(shape.blocks)
        for name, (m, n) in sizes.items()
    }
    return {
        **weights,
        "tokens": normal(VOCABULARY, width, scale=1.0),
        "positions": normal(POSITIONS, width, scale=1.0),
        "digits": normal(DIGITS, width, scale=width**-0.5),
    }


def new_adapters(weights: Weights, rank: int, start: float, generator: torch.Generator) -> Adapters:
    """Adapters of one run in all linear layers, with an axis for runs.

    They start as PEFT's, with A times `start`.
    """
    pairs = {}
    for name, weight in weights.items():
        if "." in name:
            m, n = weight.shape
            uniform = 2 * torch.rand((1, rank, n), generator=generator) - 1
            pairs[name] = Factors(start * n**-0.5 * uniform, torch.zeros(1, m, rank))
    return pairs


def logits(
    shape: Shape,
    weights: Weights,
    tokens: Tensor,
    adapters: Mapping[str, Factors],
    scaling: float,
) -> Tensor:
    """Scores (..., strings, LENGTH, DIGITS) of the digits of answers, with ``W + scaling B A``.

    Tokens are (strings, POSITIONS), or (runs, strings, POSITIONS) with a pair for every linear
    layer.
    """

    def linear(name: str, x: Tensor) -> Tensor:
        y = x @ weights[name].T
        if name not in adapters:
            return y
        A, B = (factor.to(x.dtype) for factor in adapters[name])
        low = scaling * (x.flatten(1, -2) @ A.mT)  # (runs, strings * positions, r)
        moved: Tensor = y + (low @ B.mT).view(len(x), *x.shape[1:-1], -1)
        return moved

    def normal(x: Tensor) -> Tensor:
        return functional.layer_norm(x, (shape.width,))

    def heads(x: Tensor) -> Tensor:
        split = x.view(*x.shape[:-1], shape.heads, -1)
        return split.transpose(-2, -3)  # (..., heads, positions, width)

    ones = torch.ones(POSITIONS, POSITIONS, dtype=torch.bool, device=tokens.device)
    causal = ones.tril()  # positions that a position (row) sees
    x = weights["tokens"][tokens] + weights["positions"]
    for block in range(shape.blocks):
        h = normal(x)
        wanted = LENGTH if block == shape.blocks - 1 else POSITIONS  # only answers are scored
        x, asking, mask = x[..., -wanted:, :], h[..., -wanted:, :], causal[-wanted:]
        q = heads(linear(f"{block}.query", asking))
        k, v = (heads(linear(f"{block}.{name}", h)) for name in ("key", "value"))
        mixed = functional.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        x = x + linear(f"{block}.output", mixed.transpose(-2, -3).flatten(-2))
        x = x + linear(f"{block}.down", functional.relu(linear(f"{block}.up", normal(x))))
    return normal(x) @ weights["digits"].T


def losses(scores: Tensor, answers: Tensor) -> Tensor:
    """Mean cross-entropy of a digit for each run, (runs,)."""
    each = functional.cross_entropy(scores.flatten(0, -2), answers.flatten(), reduction="none")
    return each.view(answers.shape).mean((-2, -1))


def exact(scores: Tensor, answers: Tensor) -> Tensor:
    """Share of the answers that are right in every digit, for each run.

    Every digit is the likeliest after the right ones before it: so greedy decoding says it too.
    """
    return (scores.argmax(-1) == answers).all(-1).float().mean(-1)


def trained(shape: Shape, device: torch.device, seed: int = 0) -> Weights:
    """A base that knows the known tasks; the same for the same seed, but for rounding."""
    generator = torch.Generator().manual_seed(seed)
    weights = {
        name: w.to(device).requires_grad_() for name, w in new_weights(shape, generator).items()
    }
    optimizer = torch.optim.AdamW(
        list(weights.values()), lr=shape.rate, weight_decay=0.01, fused=True
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda done: min((done + 1) / 100, 0.5 + 0.5 * math.cos(math.pi * done / shape.steps)),
    )
    for _ in range(shape.steps):
        tokens, answers = (x.to(device) for x in mixture(BATCH, generator))
        cast("Any", losses(logits(shape, weights, tokens, {}, 0.0), answers)).backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
    return {name: w.detach() for name, w in weights.items()}


def widened(weights: Weights, block: int, times: int) -> Weights:
    """The same function with each hidden unit of a block so many times, its weight shared out."""
    up, down = f"{block}.up", f"{block}.down"
    return {
        **weights,
        up: weights[up].repeat(times, 1),
        down: weights[down].repeat(1, times) / times,
    }

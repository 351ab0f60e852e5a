"""A transformer of a hundred thousand weights, and adapters of many runs in it at once.

The weights are shared by all runs; adapters have a leading axis, and so have the strings.
"""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final, TypeAlias, cast

import torch
from torch import Tensor
from torch.nn import functional

from rlora import Factors

from .strings import DIGITS, LENGTH, VOCABULARY, mixture

WIDTH: Final = 64
HEADS: Final = 4
BLOCKS: Final = 2
HIDDEN: Final = 4 * WIDTH
POSITIONS: Final = 2 * LENGTH + 1
CAUSAL: Final = torch.ones(POSITIONS, POSITIONS, dtype=torch.bool).tril()
"""Positions that a position (row) sees."""

STEPS: Final = 1000
"""Steps in which the base learns what it knows."""

BATCH: Final = 12
"""Strings of each known task in a step."""

RATE: Final = 2e-3

Weights: TypeAlias = dict[str, Tensor]
Adapters: TypeAlias = dict[str, Factors]
"""Name of a weight -> A (runs, r, n) and B (runs, m, r)."""


def new_weights(generator: torch.Generator) -> Weights:
    """Random weights of variance 1 / n; "block.name" are the linear layers, (m, n)."""

    def normal(*shape: int, scale: float) -> Tensor:
        return scale * torch.randn(shape, generator=generator)

    shapes = {
        **dict.fromkeys(("query", "key", "value", "output"), (WIDTH, WIDTH)),
        "up": (HIDDEN, WIDTH),
        "down": (WIDTH, HIDDEN),
    }
    weights = {
        f"{block}.{name}": normal(*shape, scale=shape[1] ** -0.5)
        for block in range(BLOCKS)
        for name, shape in shapes.items()
    }
    return {
        **weights,
        "tokens": normal(VOCABULARY, WIDTH, scale=1.0),
        "positions": normal(POSITIONS, WIDTH, scale=1.0),
        "digits": normal(DIGITS, WIDTH, scale=WIDTH**-0.5),
    }


def new_adapters(weights: Weights, rank: int, generator: torch.Generator) -> Adapters:
    """Adapters of one run in all linear layers, as PEFT starts them, with an axis for runs."""
    pairs = {}
    for name, weight in weights.items():
        if "." in name:
            m, n = weight.shape
            uniform = 2 * torch.rand((1, rank, n), generator=generator) - 1
            pairs[name] = Factors(n**-0.5 * uniform, torch.zeros(1, m, rank))
    return pairs


def logits(
    weights: Weights, tokens: Tensor, adapters: Mapping[str, Factors], scaling: float
) -> Tensor:
    """Scores (..., strings, LENGTH, DIGITS) of the digits of answers.

    Parameters
    ----------
    weights : dict of Tensor
        Of the base.
    tokens : Tensor
        (strings, POSITIONS), or (runs, strings, POSITIONS) if there are adapters.
    adapters : mapping of str to Factors
        One pair for every linear layer, or none at all.
    scaling : float
        The s of ``W + s B A``.
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
        return functional.layer_norm(x, (WIDTH,))

    def heads(x: Tensor) -> Tensor:
        split = x.view(*x.shape[:-1], HEADS, -1)
        return split.transpose(-2, -3)  # (..., heads, positions, width)

    x = weights["tokens"][tokens] + weights["positions"]
    for block in range(BLOCKS):
        h = normal(x)
        wanted = LENGTH if block == BLOCKS - 1 else POSITIONS  # only answers are scored
        x, asking, mask = x[..., -wanted:, :], h[..., -wanted:, :], CAUSAL[-wanted:]
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


def trained(steps: int, seed: int = 0) -> Weights:
    """A base that knows the known tasks; always the same for the same seed."""
    generator = torch.Generator().manual_seed(seed)
    weights = {name: w.requires_grad_() for name, w in new_weights(generator).items()}
    optimizer = torch.optim.AdamW(list(weights.values()), lr=RATE, weight_decay=0.01, fused=True)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda done: min((done + 1) / 100, 0.5 + 0.5 * math.cos(math.pi * done / steps))
    )
    for _ in range(steps):
        tokens, answers = mixture(BATCH, generator)
        cast("Any", losses(logits(weights, tokens, {}, 0.0), answers)).backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
    return {name: w.detach() for name, w in weights.items()}


def kept_weights(kept: Path | None, steps: int) -> Weights:
    """The base from its file, or trained now and put there."""
    if kept is not None and kept.exists():
        weights: Weights = torch.load(kept, weights_only=True)
        return weights
    weights = trained(steps)
    if kept is not None:
        kept.parent.mkdir(parents=True, exist_ok=True)
        whole = kept.with_suffix(".part")
        torch.save(weights, whole)
        whole.replace(kept)
    return weights


def widened(weights: Weights, block: int, times: int) -> Weights:
    """The same function with each hidden unit of a block so many times, its weight shared out."""
    up, down = f"{block}.up", f"{block}.down"
    return {
        **weights,
        up: weights[up].repeat(times, 1),
        down: weights[down].repeat(1, times) / times,
    }

"""Measure what rounding to bfloat16 costs, in training and after it.

python docs/reference/rounding.py

writes rounding.csv, and the page growth.md with the tables that growth.py makes of it.
"""

import csv
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, Final

import growth
import numpy as np
import torch
from torch import nn

import rlora.torch
from rlora import Factors, Transform
from rlora.testing.growth import adamw

RECORD: Final = Path(__file__).with_suffix(".csv")

KEPT: Final = (
    (8, 8, 8),
    (3, 20, 8),
    (20, 3, 8),
    (24, 16, 8),
    (2, 2, 16),
    (1, 256, 8),
    (2, 768, 8),
    (768, 2, 8),
)
"""m, n and r of factors that are kept in bfloat16."""
TRAINED: Final = ((24, 16, 8), (2, 64, 8), (8, 8, 8))
"""m, n and r of factors that are rounded once training is over."""
RANKS: Final = (1, 2)
METHODS: Final = {"AdamW": adamw, "default": rlora.scaled_adamw}

DTYPES: Final = {
    "float32": (torch.float32, True),
    "nearest": (torch.bfloat16, False),
    "stochastic": (torch.bfloat16, True),
}
"""Dtype of factors that are kept in it, and `stochastic_rounding`."""


def bfloat16(x: Any) -> Any:
    """Round to the eight binary digits of bfloat16."""
    digits, exponent = np.frexp(x)
    return np.ldexp(np.round(digits * 256) / 256, exponent).astype(x.dtype)


def train(
    method: Transform,
    shape: tuple[int, int, int],
    rank: int,
    noise: float,
    rates: Any,
    draws: int,
) -> tuple[Factors, Any]:
    """Least squares from B = 0 for several targets in one stack, 32 new samples a step.

    Returns the factors and the targets.
    """
    m, n, r = shape
    targets, starts = [], []
    for draw in range(draws):
        T, A = problem(shape, rank, draw)
        targets.append(T)
        starts.append(A)
    T = np.array(targets, np.float32)
    params = Factors(np.array(starts, np.float32), np.zeros((draws, m, r), np.float32))
    state, rng = method.init(params), np.random.default_rng(99)
    for lr in rates:
        X = rng.normal(size=(n, 32)).astype(np.float32)
        E = np.float32(noise) * rng.normal(size=(m, 32)).astype(np.float32)
        features = params.A @ X
        error = params.B @ features - T @ X - E
        grads = Factors(params.B.mT @ error @ X.T / 32, error @ features.mT / 32)
        params, state = rlora.step(method, params, grads, state, float(lr))
    return params, T


def problem(shape: tuple[int, int, int], rank: int, draw: int) -> tuple[Any, Any]:
    """A target of a rank, and the A of a start."""
    m, n, r = shape
    rng = np.random.default_rng((draw, rank))
    T = rng.normal(size=(m, rank)) @ rng.normal(size=(rank, n)) * (8 / (rank * n)) ** 0.5
    return T, rng.normal(size=(r, n)) / n**0.5


def squares(x: Any) -> Any:
    """Squared Frobenius norms, in float64."""
    return np.sum(x.astype(np.float64) ** 2, axis=(-2, -1))


def kept() -> Iterator[dict[str, Any]]:
    """Losses of six draws with noise at 4e-3, over those of torch's AdamW in float32."""
    for shape in KEPT:
        base = losses(shape, torch.float32, partial(torch.optim.AdamW, betas=(0.7, 0.8)))
        for label, (dtype, stochastic) in DTYPES.items():
            found = losses(shape, dtype, partial(scaled, stochastic_rounding=stochastic))
            for rank, loss in found.items():
                yield row("kept", shape, rank, 0.5, label, loss / base[rank])


def scaled(params: list[nn.Parameter], **options: Any) -> rlora.torch.ScaledAdamW:
    """The default over A, B, A, B, ..."""
    pairs = list(zip(params[::2], params[1::2], strict=True))
    return rlora.torch.ScaledAdamW(params, pairs=pairs, **options)


def losses(
    shape: tuple[int, int, int], dtype: torch.dtype, make: Callable[..., torch.optim.Optimizer]
) -> dict[int, Any]:
    """Losses of six draws of targets of each rank; the problem of `train`."""
    m, n, r = shape
    ranks, params, targets = range(1, min(shape) + 1), [], []
    for rank in ranks:
        for draw in range(6):
            T, A = problem(shape, rank, draw)
            targets.append(T)
            params += [nn.Parameter(torch.tensor(x, dtype=dtype)) for x in (A, np.zeros((m, r)))]
    optimizer, rng = make(params, lr=4e-3), np.random.default_rng(99)
    T, last = torch.tensor(np.array(targets), dtype=torch.float32), []
    for t in range(1000):
        A, B = (torch.stack([p.detach() for p in params[k::2]]).float() for k in (0, 1))
        if t >= 950:
            last.append(squares((B @ A - T).numpy()) / 2 + m * 0.5**2 / 2)
        X, E = (torch.tensor(rng.normal(size=(k, 32)), dtype=torch.float32) for k in (n, m))
        error = B @ (A @ X) - T @ X - 0.5 * E
        grads = (B.mT @ error @ X.T / 32).to(dtype), (error @ (A @ X).mT / 32).to(dtype)
        for k, both in enumerate(zip(*grads, strict=True)):
            params[2 * k].grad, params[2 * k + 1].grad = both
        optimizer.step()
    return dict(zip(ranks, np.mean(last, axis=0).reshape(-1, 6), strict=True))


def trained() -> Iterator[dict[str, Any]]:
    """Changes of eight adapters, trained at a rate from 1e-2 to 0, when they are rounded."""
    rates = 1e-2 * (1 - np.arange(800) / 800)
    for shape in TRAINED:
        for rank in RANKS:
            for noise in (0.0, 0.5):
                found = {}
                adapters = {
                    label: train(make(), shape, rank, noise, rates, 8)
                    for label, make in METHODS.items()
                }
                params, T = adapters["default"]
                adapters["rebalanced"] = (rlora.rebalance(params), T)
                for label, (params, T) in adapters.items():
                    A, B = (x.astype(np.float64) for x in params)
                    rounded = bfloat16(B) @ bfloat16(A)
                    size = squares(B @ A)
                    change = squares(rounded - B @ A) / size
                    terms = np.sum(np.sum(B**2, -2) * np.sum(A**2, -1), -1) / size
                    loss = (squares(rounded - T) - squares(B @ A - T)) / squares(T)
                    found[label] = change
                    yield row("terms", shape, rank, noise, label, terms)
                    yield row("loss", shape, rank, noise, label, loss)
                    yield row("law", shape, rank, noise, label, change / terms * 2**16)
                for label in ("default", "rebalanced"):
                    change = found[label] / found["AdamW"]
                    yield row("change", shape, rank, noise, label, change)


def row(
    what: str, shape: tuple[int, int, int], rank: int, noise: float, label: str, x: Any
) -> dict[str, Any]:
    """A line of the record: median and largest over the draws."""
    return {
        "what": what,
        **dict(zip("mnr", shape, strict=True)),
        "rank": rank,
        "noise": noise,
        "label": label,
        "median": f"{np.median(x):.4g}",
        "largest": f"{np.max(x):.4g}",
    }


if __name__ == "__main__":
    lines = [*kept(), *trained()]
    with RECORD.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, list(lines[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(lines)
    growth.PAGE.write_text(growth.page(), encoding="utf-8")
    print(f"wrote {RECORD.name} and {growth.PAGE.name}")

"""Measure what rounding to bfloat16 costs, in training and after it.

python docs/reference/rounding.py

writes rounding.csv, and the page growth.md with the tables that growth.py makes of it.
"""

import csv
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Final

import growth
import numpy as np

import rlora
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

Store = Callable[[Any], Any]
"""From the factors of a step to those that are kept."""


def bfloat16(x: Any, up: Any = 0.5) -> Any:
    """Round to the eight binary digits of bfloat16, up by the share `up` of the last one."""
    digits, exponent = np.frexp(x)
    return np.ldexp(np.floor(digits * 256 + up) / 256, exponent).astype(x.dtype)


def exact(x: Any) -> Any:
    """Keep factors in float32."""
    return x


def train(
    method: Transform,
    shape: tuple[int, int, int],
    rank: int,
    noise: float,
    rates: Any,
    draws: int,
    store: Store = exact,
) -> tuple[Factors, Any, Any]:
    """Least squares from B = 0 for several targets in one stack, 32 new samples a step.

    Returns the factors, the targets, and the loss as the mean of the last twentieth of the steps.
    """
    m, n, r = shape
    targets, starts = [], []
    for draw in range(draws):
        rng = np.random.default_rng((draw, rank))
        T = rng.normal(size=(m, rank)) @ rng.normal(size=(rank, n)) * (8 / (rank * n)) ** 0.5
        targets.append(T)
        starts.append(rng.normal(size=(r, n)) / n**0.5)
    T = np.array(targets, np.float32)
    params = Factors(store(np.array(starts, np.float32)), np.zeros((draws, m, r), np.float32))
    state, rng, losses = method.init(params), np.random.default_rng(99), []
    for lr in rates:
        X = rng.normal(size=(n, 32)).astype(np.float32)
        E = np.float32(noise) * rng.normal(size=(m, 32)).astype(np.float32)
        features = params.A @ X
        error = params.B @ features - T @ X - E
        grads = Factors(params.B.mT @ error @ X.T / 32, error @ features.mT / 32)
        losses.append(squares(params.B @ params.A - T) / 2 + m * noise**2 / 2)
        if store is not exact:
            grads = Factors(*map(bfloat16, grads))
        params, state = rlora.step(method, params, grads, state, float(lr))
        params = Factors(*map(store, params))
    return params, T, np.mean(losses[-len(losses) // 20 :], axis=0)


def squares(x: Any) -> Any:
    """Squared Frobenius norms, in float64."""
    return np.sum(x.astype(np.float64) ** 2, axis=(-2, -1))


def kept() -> Iterator[dict[str, Any]]:
    """Losses of six draws with noise at 4e-3, over those of AdamW in float32."""
    rates = np.full(1000, 4e-3)
    for shape in KEPT:
        for rank in sorted({k for k in RANKS if k < min(shape)} | {min(shape)}):
            random = np.random.default_rng(7)
            stores: dict[str, Store] = {
                "float32": exact,
                "nearest": bfloat16,
                "stochastic": lambda x, random=random: bfloat16(x, random.random(x.shape)),
            }
            *_, base = train(adamw(), shape, rank, 0.5, rates, 6)
            for label, store in stores.items():
                *_, loss = train(rlora.scaled_adamw(), shape, rank, 0.5, rates, 6, store)
                yield row("kept", shape, rank, 0.5, label, loss / base)


def trained() -> Iterator[dict[str, Any]]:
    """Changes of eight adapters, trained at a rate from 1e-2 to 0, when they are rounded."""
    rates = 1e-2 * (1 - np.arange(800) / 800)
    for shape in TRAINED:
        for rank in RANKS:
            for noise in (0.0, 0.5):
                found = {}
                adapters = {
                    label: train(make(), shape, rank, noise, rates, 8)[:2]
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

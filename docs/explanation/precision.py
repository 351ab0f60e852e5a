"""Measure how exact a step is, and write the tables of precision.md.

python docs/explanation/precision.py
"""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Final

import array_api_compat.numpy as xp
import numpy as np
import torch

import rlora.torch
from rlora.core.algebra import ROUNDING
from rlora.core.backend import Backend
from rlora.core.placement import precondition, preconditioners

PAGE: Final = Path(__file__).with_suffix(".md")
CONDITIONS: Final = (1e0, 1e1, 1e2, 1e3, 1e4)
M, N, R = 512, 64, 16


def rounded_to(bits: int) -> Callable[[Any], Any]:
    """Keep so many bits of the significand of float32, as the inputs of a product in hardware."""

    def rounded(x: Any) -> Any:
        mantissa, exponent = np.frexp(x)
        return np.ldexp(np.round(mantissa * 2**bits) / 2**bits, exponent).astype(x.dtype)

    return rounded


class Coarse(Backend):
    """Forms Grams of rounded factors, and rounds the sums, as units for products do."""

    def __init__(self, inputs: int, sums: int = 24) -> None:
        super().__init__(xp, "numpy")
        self.inputs, self.sums = rounded_to(inputs), rounded_to(sums)

    def cross_rows(self, X: Sequence[Any], Y: Sequence[Any], dtype: Any) -> Any:
        products = [self.inputs(x) @ self.inputs(y).mT for x, y in zip(X, Y, strict=True)]
        return np.stack([self.sums(C) for C in products]).astype(dtype)


WAYS: Final[dict[str, tuple[Backend, str | None]]] = {
    "float64 (`compute_dtype`)": (Backend(xp, "numpy"), "float64"),
    "float32, the default": (Backend(xp, "numpy"), None),
    "TF32 inputs": (Coarse(11), None),
    "bfloat16, as under autocast": (Coarse(8, 8), None),
}
"""Ways to form the Gram of a float32 factor."""


def factor(condition: float) -> Any:
    """A B (M, R) whose singular values go from 1 down to 1 / condition; exact float32 numbers."""
    rng = np.random.default_rng(0)
    U, V = np.linalg.qr(rng.normal(size=(M, R)))[0], np.linalg.qr(rng.normal(size=(R, R)))[0]
    return (U * np.geomspace(1, 1 / condition, R) @ V).astype(np.float32)


def error(backend: Backend, dtype: str | None, condition: float) -> float:
    """Relative error of ``B S_B⁻¹ Bᵀ G``, a step of A in the product, with no damping asked for."""
    B = factor(condition)
    G = np.random.default_rng(1).normal(size=(M, N)).astype(np.float32)
    pair = rlora.Factors(np.eye(R, N, dtype=np.float32), B)
    P = preconditioners(
        backend, [pair], damping=0.0, damping_mode="relative", compute_dtype=dtype
    ).first
    (direction,) = precondition(backend, P or [], [rlora.Factors(B.T @ G, None)])
    Q, _ = np.linalg.qr(B.astype(np.float64))
    wanted = Q @ (Q.T @ G.astype(np.float64))
    got = B.astype(np.float64) @ direction.A
    return float(np.linalg.norm(got - wanted) / np.linalg.norm(wanted))


def gram_table() -> Iterator[str]:
    """A row for each way to form the Gram."""
    yield f"| Gram formed in | cond(B) = {' | '.join(f'{c:.0e}' for c in CONDITIONS)} |"
    yield f"| --- |{' --- |' * len(CONDITIONS)}"
    for name, way in WAYS.items():
        errors = [error(*way, condition) for condition in CONDITIONS]
        yield f"| {name} | {' | '.join(f'{e:.0e}' if e < 1 else 'useless' for e in errors)} |"


RATES: Final = (1e-3, 1e-4, 1e-5)


def moved(lr: float, dtype: torch.dtype, *, stochastic: bool) -> Any:
    """Move of A by 200 steps of `ScaledAdamW`, each as long as `lr` says, along one gradient."""
    torch.manual_seed(0)
    start = torch.randn(R, M) / M**0.5
    A, B = (torch.nn.Parameter(x.to(dtype)) for x in (start, torch.randn(N, R) / 4))
    optimizer = rlora.torch.ScaledAdamW(
        [A, B],
        lr=lr,
        betas=(0.9, 0.999),
        weight_decay=0.0,
        damping=1e-6,
        damping_mode="relative",
        placement="before",
        pairs=[(A, B)],
        stochastic_rounding=stochastic,
    )
    A.grad, before = torch.randn(R, M).to(dtype), A.detach().double()
    for _ in range(200):
        optimizer.step()
    return A.detach().double() - before


def rounding_table() -> Iterator[str]:
    """Share of the way in float32 that is left in bfloat16."""
    yield f"| bfloat16 factors | lr = {' | '.join(f'{lr:.0e}' for lr in RATES)} |"
    yield f"| --- |{' --- |' * len(RATES)}"
    for name, stochastic in (
        ("`stochastic_rounding=False`", False),
        ("`stochastic_rounding=True`, the default", True),
    ):
        shares = []
        for lr in RATES:
            whole = moved(lr, torch.float32, stochastic=False)
            part = moved(lr, torch.bfloat16, stochastic=stochastic)
            shares.append(float((part * whole).sum() / (whole * whole).sum()))
        yield f"| {name} | {' | '.join(f'{share:.0%}' for share in shares)} |"


def moves(size: float, dtype: str) -> bool:
    """True if a factor B of this norm lets its partner move."""
    method = rlora.scaled_sgd(damping=1e-6, damping_mode="relative")
    with np.errstate(over="ignore", invalid="ignore"):
        B = (size * factor(1.0).astype("float64") / R**0.5).astype(dtype)
        pair = rlora.Factors(np.eye(R, N, dtype=dtype), B)
        grads = rlora.Factors(np.ones_like(pair.A), None)
        direction, _ = method.update(grads, method.init(pair), pair)
    return bool(np.isfinite(direction.A).all() and direction.A.any())


def limits_table() -> Iterator[str]:
    """The floor under the damping, and the sizes of factors that have a Gram."""
    yield "| | the least damping, relative, at r = 16 | norms of a factor that preconditions |"
    yield "| --- | --- | --- |"
    for dtype in ("float32", "float64"):
        decades = [k for k in range(-200, 200) if moves(10.0**k, dtype)]
        floor = ROUNDING * R * float(np.finfo(dtype).eps)
        yield f"| {dtype} | {floor:.0e} | 1e{decades[0]} to 1e{decades[-1]} |"


TABLES: Final = {"gram": gram_table, "rounding": rounding_table, "limits": limits_table}


def rewritten(page: str) -> str:
    """The page with each table between its marks made anew."""
    for name, rows in TABLES.items():
        head, mark, rest = page.partition(f"<!-- {name}: made by precision.py -->\n")
        _, end, tail = rest.partition(f"<!-- end of {name} -->")
        if not end:
            msg = f"expected the marks of {name} on the page: made by precision.py, end of {name}"
            raise ValueError(msg)
        page = "".join((head, mark, "\n", *(f"{row}\n" for row in rows()), "\n", end, tail))
    return page


if __name__ == "__main__":
    PAGE.write_text(rewritten(PAGE.read_text(encoding="utf-8")), encoding="utf-8")

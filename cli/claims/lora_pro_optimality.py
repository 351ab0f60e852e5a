"""LoRA-Pro's claim: no other move of the factors comes nearer to the full gradient.

A move D of a pair changes the weight by ``g = s (B D_A + D_B A)``. LoRA-Pro's is to give the
projection of G on all such g, ``P_B G + G P_A - P_B G P_A``, in every gauge; here the projectors
are formed, by a QR factorisation that the method does not have.
"""

from typing import Final, get_args

import numpy as np

import rlora
from rlora import Factors, Transform
from rlora.core.backend import Backend
from rlora.core.factors import Array
from rlora.methods.pro import Gauge

from .claim import Check, Claim, Outcome, Setting, lines
from .problems import factor_gradients

OUTPUTS, INPUTS, SCALING = 48, 40, 2.0
RANKS: Final = (1, 2, 4, 8, 16, 32)
RANK: Final = 8
"""Rank at which the perturbations are made."""
SIZES: Final = (1.0, 1e-1, 1e-2, 1e-3)
"""Sizes of the perturbations, relative to the move."""

EXACT: Final = 1e-10
"""Rounding times the condition of the Gram of 32 rows among 40, about 500: 1e-13 is seen."""

METHODS: Final = {gauge: rlora.lora_pro_sgd(gauge=gauge, damping=0.0) for gauge in get_args(Gauge)}
COMPETITORS: Final = {"GD": rlora.chain(), "scaled GD": rlora.scaled_sgd(damping=0.0)}
"""An empty chain: the gradients themselves."""


class RandomPair:
    """A random pair with a random full gradient."""

    def __init__(self, backend: Backend, rank: int) -> None:
        rng = np.random.default_rng(rank)
        shapes = (rank, INPUTS), (OUTPUTS, rank), (OUTPUTS, INPUTS)
        A, B, self.G = (backend.asarray(rng.standard_normal(x), "float64") for x in shapes)
        self.pair = Factors(A, B)
        self.grads = factor_gradients(self.pair, SCALING * self.G)
        self.backend = backend

    def direction(self, method: Transform) -> Factors:
        """Move of the method's first step."""
        direction: Factors
        direction, _ = method.update(self.grads, method.init(self.pair, SCALING), self.pair)
        return direction

    def equivalent(self, move: Factors) -> Array:
        """Return the change of the weight by a move, or a stack of them."""
        return SCALING * (self.pair.B @ move.A + move.B @ self.pair.A)

    def projection(self) -> Array:
        """G on the tangent space, by dense projectors."""
        P_A, P_B = (Q @ Q.mT for Q, _ in map(self.backend.qr, (self.pair.A.mT, self.pair.B)))
        return P_B @ self.G + self.G @ P_A - P_B @ self.G @ P_A

    def distance(self, g: Array) -> float:
        """Distance of the nearest multiple of g to G, relative."""
        total = self.backend.xp.sum
        best = total(g * self.G) / total(g * g)
        return float((total((best * g - self.G) ** 2) / total(self.G**2)) ** 0.5)

    def excess(self, move: Factors, size: float, draws: int) -> float:
        """Return by how much the best perturbed move is further from G, squared and relative."""
        rng, total = np.random.default_rng(0), self.backend.xp.sum
        noise = Factors(
            *(
                size * total(x**2) ** 0.5 * self.backend.asarray_like(unit(rng, draws, x), x)
                for x in move
            )
        )
        moved = self.equivalent(Factors(move.A + noise.A, move.B + noise.B))
        here = total((self.equivalent(move) - self.G) ** 2)
        there = total((moved - self.G) ** 2, axis=(-2, -1))
        return float((self.backend.xp.min(there) - here) / total(self.G**2))

    def sylvester(self, move: Factors) -> float:
        """The residual of ``S_B X + X S_A = -S_B⁻¹ G_A Aᵀ / s²``, relative, of the X in a move."""
        A, B = self.pair
        S_A, S_B = A @ A.mT, B.mT @ B
        solve, total = self.backend.xp.linalg.solve, self.backend.xp.sum
        plain = solve(S_B, self.grads.A) / SCALING**2
        X = solve(S_A, A @ (move.A - plain).mT).mT
        right = -plain @ A.mT
        return float((total((S_B @ X + X @ S_A - right) ** 2) / total(right**2)) ** 0.5)


def unit(rng: np.random.Generator, draws: int, like: Array) -> Array:
    """Random matrices of norm 1."""
    x = rng.standard_normal((draws, *like.shape))
    return x / np.linalg.norm(x, axis=(-2, -1), keepdims=True)


def run(setting: Setting) -> Outcome:
    """Distances to G by rank, and around LoRA-Pro's move."""
    misses, residuals = [], []
    distances: dict[str, list[float]] = {name: [] for name in (*COMPETITORS, "LoRA-Pro")}
    total = setting.backend.xp.sum
    for rank in setting.track(RANKS, "ranks"):
        problem = RandomPair(setting.backend, rank)
        nearest = problem.projection()
        for gauge, method in METHODS.items():
            move = problem.direction(method)
            off = total((problem.equivalent(move) - nearest) ** 2) / total(nearest**2)
            misses.append(float(off**0.5))
            if gauge == "sylvester":
                residuals.append(problem.sylvester(move))
        for name, method in {**COMPETITORS, "LoRA-Pro": rlora.lora_pro_sgd(damping=0.0)}.items():
            g = problem.equivalent(problem.direction(method))
            distances[name].append(problem.distance(g))
    problem, draws = RandomPair(setting.backend, RANK), 100 if setting.quick else 1000
    moves = {gauge: problem.direction(method) for gauge, method in METHODS.items()}
    excess = {
        f"gauge {gauge}": [problem.excess(move, size, draws) for size in SIZES]
        for gauge, move in moves.items()
    }
    over = [np.divide(distances[name], distances["LoRA-Pro"]).min() for name in COMPETITORS]
    ranks, sizes = ("rank", RANKS), ("size of the perturbation", SIZES)
    y = "distance to the full gradient"
    return Outcome(
        (
            Check("off the projection, any rank and gauge", max(misses), "<=", EXACT),
            Check("residual of Sylvester's equation", max(residuals), "<=", EXACT),
            Check("least excess of a perturbation", min(map(min, excess.values())), ">=", 0.0),
            Check("nearest competitor, its distance over LoRA-Pro's", float(min(over)), ">=", 1.0),
        ),
        (
            lines("each with its best step", ranks, y, distances, log_y=False),
            lines("around LoRA-Pro's move", sizes, "least excess of the distance²", excess),
        ),
    )


CLAIM = Claim(
    name="lora-pro-optimality",
    statement=(
        "LoRA-Pro moves the weight by the projection of the full gradient on what its factors can "
        "do, in every gauge; no perturbation and no other method comes nearer."
    ),
    source=(
        "Z. Wang, J. Liang, R. He, Z. Wang, T. Tan. LoRA-Pro: Are Low-Rank Adapters Properly "
        "Optimized? arXiv:2407.18242, 2024"
    ),
    run=run,
)

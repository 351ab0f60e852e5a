"""Factoring a matrix by scaled gradient descent: its condition number, and damping."""

import math
from collections.abc import Iterator
from typing import Any, Final, NamedTuple

import numpy as np

import rlora
from rlora import Factors
from rlora.cli.chart import Curve, Panel
from rlora.core.factors import Array
from rlora.core.metric import DampingMode

from .claim import Check, Claim, Outcome, Setting, lines
from .papers import PRECONDITIONED
from .problems import GOAL, errors, factor_gradients, iterations, low_rank, truncated


class Factorisation(NamedTuple):
    """``½ |B A - M|²`` with two starts, as arrays of a backend."""

    target: Array
    spectral: Factors
    """The best factors of ``M + N``, where N is a tenth of the smallest singular value of M."""
    lora: Factors
    """B = 0 and A random, as fine-tuning starts."""

    def grads(self, pair: Factors) -> Factors:
        """Gradients of the factors."""
        return factor_gradients(pair, pair.B @ pair.A - self.target)


def factorisation(setting: Setting, condition: float) -> Factorisation:
    """A target of shape (60, 50) and rank 5, its singular values from 1 down to 1 / condition."""
    rng = np.random.default_rng(0)
    m, n, r = 60, 50, 5
    M, N = low_rank(rng, m, n, r, condition), rng.standard_normal((m, n))
    spectral = truncated(M + 0.1 / condition * N / np.linalg.norm(N, 2), r)
    lora = Factors(rng.standard_normal((r, n)) / n**0.5, np.zeros((m, r)))
    return Factorisation(setting.array(M), setting.arrays(spectral), setting.arrays(lora))


LR: Final = 0.5
BOUND: Final = math.ceil(math.log(GOAL) / math.log(1 - LR / 2))
"""Iterations to the goal at the rate ``1 - lr / 2`` that the theorem promises up to lr = 2/3."""
FROM_LORA: Final = 30
"""Iterations from B = 0: half of the bound are more than enough for the other start's twenty."""
NARROW: Final = 1.3
"""Longest run over that at condition number 1: no growth over three decades. GD grows a thousand
times."""
GROWTH: Final = 0.9
"""Least exponent of GD's iterations in the condition number, whose theory says 1."""

GD: Final = rlora.chain()
SCALED: Final = rlora.scaled_sgd(damping=1e-6, damping_mode="relative")
"""Covariant damping of 1e-4 would be felt at condition number 100."""


def alternating(problem: Factorisation) -> Iterator[Factors]:
    """Exact alternation: a full step of A, then one of B with the gradient at the new A."""
    method = rlora.scaled_sgd(damping=0.0)
    pair = problem.spectral
    state = method.init(pair)
    while True:
        yield pair
        for frozen in ({"B": None}, {"A": None}):
            grads = problem.grads(pair)._replace(**frozen)
            pair, state = rlora.step(method, pair, grads, state, lr=1.0)


def run_condition(setting: Setting) -> Outcome:
    """Iterations to a relative error of 1e-8, for condition numbers of three decades."""
    conditions = (1, 10, 100) if setting.quick else (1, 10, 100, 1000)
    most = 3_000 if setting.quick else 20_000
    found: dict[str, list[list[float]]] = {}
    for condition in setting.track(conditions, "condition numbers"):
        problem = factorisation(setting, condition)
        paths = {
            "GD": setting.path(GD, problem.spectral, problem.grads, LR),
            "Scaled GD": setting.path(SCALED, problem.spectral, problem.grads, LR),
            "Scaled GD from B = 0": setting.path(SCALED, problem.lora, problem.grads, LR),
            "GD from B = 0": setting.path(GD, problem.lora, problem.grads, LR),
            "Alternating, lr = 1": alternating(problem),
        }
        for name, path in paths.items():
            run_of = errors(setting.backend, path, problem.target, most)
            found.setdefault(name, []).append(run_of)
    counts = {name: [iterations(x) for x in runs] for name, runs in found.items()}
    places = "condition number of the target", conditions
    iterate = "iterate, from the start at 1", range(1, most + 2)
    shown = {name: [max(count, 1) for count in row] for name, row in counts.items()}
    labels = [f"condition number {condition}" for condition in conditions]
    panels = [lines("Iterations to a relative error of 1e-8", places, "iterations", shown)]
    for name in ("Scaled GD", "GD"):
        runs = dict(zip(labels, found[name], strict=True))
        title = f"{name} from a spectral start"
        panels.append(lines(title, iterate, "relative error", runs, log_x=name == "GD"))
    return Outcome(condition_checks(counts, conditions), tuple(panels))


def condition_checks(
    counts: dict[str, list[float]], conditions: tuple[int, ...]
) -> tuple[Check, ...]:
    """Scaled GD within its bound everywhere; GD in proportion to the condition number."""
    scaled, plain = counts["Scaled GD"], counts["GD"]
    growth = math.log(plain[-1] / plain[0]) / math.log(conditions[-1] / conditions[0])
    worst = max(scaled)
    from_zero = max(counts["Scaled GD from B = 0"])
    return (
        Check("iterations of scaled GD, the most", worst, "<=", BOUND),
        Check("the same over those at condition number 1", worst / scaled[0], "<=", NARROW),
        Check("iterations of scaled GD from B = 0, the most", from_zero, "<=", FROM_LORA),
        Check("iterations of alternation with lr = 1", max(counts["Alternating, lr = 1"]), "<=", 1),
        Check("GD: exponent of the condition number", growth, ">=", GROWTH),
    )


# --- damping ------------------------------------------------------------------------------------

MOST: Final = 3_000
MODES: Final[tuple[DampingMode, ...]] = ("absolute", "relative", "covariant")
TIMES: Final = (1e-3, 1e-2, 1e-1, 1.0, 10.0, 100.0)
"""Damping, as a multiple of the level at which it should begin to matter."""
BELOW, FREE = 0.1, 1.2
"""A tenth of the level takes an eleventh of the slowest rate: in whole iterations a fifth at
most."""
ABOVE, SLOWED = 10.0, 5.0
"""Ten times the level leaves an eleventh of the slowest rate: half of that loss is seen surely."""


def level(mode: DampingMode, condition: float) -> float:
    """The damping that equals the smallest singular value, as the mode measures it.

    The eigenvalues of both Grams of balanced factors are the singular values σ of the product.
    Then ``S + δ I`` sets δ beside σ, ``S + δ tr(S)/r I`` beside σ over their mean, and
    ``S_B + δ S_A⁻¹`` sets δ / σ beside σ.
    """
    sigma = np.geomspace(1.0, 1.0 / condition, 5)  # of `factorisation`
    smallest = sigma[-1]
    found = {"absolute": smallest, "relative": smallest / sigma.mean(), "covariant": smallest**2}
    return float(found[mode])


def run_damping(setting: Setting) -> Outcome:
    """Iterations to a relative error of 1e-8 over those without damping, by mode and level."""
    conditions = (10, 1000) if setting.quick else (10, 100, 1000)
    times = TIMES[1:-1] if setting.quick else TIMES

    def count(condition: float, damping: float, mode: DampingMode) -> float:
        problem = factorisation(setting, condition)
        method = rlora.scaled_sgd(damping=damping, damping_mode=mode)
        path = setting.path(method, problem.spectral, problem.grads, LR)
        return iterations(errors(setting.backend, path, problem.target, MOST))

    slower: dict[DampingMode, list[list[float]]] = {}
    for mode in setting.track(MODES, "damping modes"):
        slower[mode] = [
            [
                count(condition, t * level(mode, condition), mode) / count(condition, 0.0, mode)
                for t in times
            ]
            for condition in conditions
        ]
    hardest = conditions[-1]
    every: dict[str, Any] = {mode: np.max(rows, axis=0) for mode, rows in slower.items()}
    y = "iterations / undamped"
    panel = Panel(
        f"Condition number {hardest}",
        "damping δ",
        y,
        tuple(
            Curve(mode, [t * level(mode, hardest) for t in times], slower[mode][-1])
            for mode in slower
        ),
        log_x=True,
    )
    multiple = "δ as a multiple of the level of its mode", times
    worst = lines("All condition numbers, the slowest", multiple, y, every)
    return Outcome(damping_checks(slower, times), (panel, worst))


def damping_checks(
    slower: dict[DampingMode, list[list[float]]], times: tuple[float, ...]
) -> tuple[Check, ...]:
    """At every condition number: nothing lost below the level, much above it."""
    found = []
    for mode, rows in slower.items():
        below = max(row[times.index(BELOW)] for row in rows)
        above = min(row[times.index(ABOVE)] for row in rows)
        found += [
            Check(f"{mode}: slowdown at a tenth of its level", below, "<=", FREE),
            Check(f"{mode}: slowdown at ten times its level", above, ">=", SLOWED),
        ]
    return tuple(found)


CONDITION: Final = Claim(
    "condition-number",
    "Scaled gradient descent factors a matrix in a number of iterations that does not depend on "
    "its condition number; gradient descent needs iterations in proportion to it.",
    f"{PRECONDITIONED}. Theorem 7.4.",
    run_condition,
)
DAMPING: Final = Claim(
    "damping",
    "Damping gives scaled gradient descent its condition number back as soon as δ reaches the "
    "smallest singular value of the product, in covariant damping its square; far below that it "
    "costs nothing.",
    f"Follows from the proof of Theorem 7.4 in {PRECONDITIONED}, with S + δ I for S.",
    run_damping,
)

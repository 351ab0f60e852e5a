"""Effect of damping on the independence of the condition number."""

from typing import Final

import rlora
from rlora.core.linalg import DampingMode

from .claim import Check, Claim, Curve, Outcome, Panel, Setting
from .factorisation import errors, factorisation, iterations, singular_values

LR: Final = 0.5
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
    sigma = singular_values(condition)
    smallest = sigma[-1]
    found = {"absolute": smallest, "relative": smallest / sigma.mean(), "covariant": smallest**2}
    return float(found[mode])


def run(setting: Setting) -> Outcome:
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
    return Outcome(checks(slower, times), panels(slower, times, conditions[-1]))


def checks(
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


def panels(
    slower: dict[DampingMode, list[list[float]]], times: tuple[float, ...], condition: float
) -> tuple[Panel, ...]:
    """The last condition number by damping itself; all of them by the level."""
    at = {mode: [t * level(mode, condition) for t in times] for mode in slower}
    worst = {mode: [max(column) for column in zip(*slower[mode], strict=True)] for mode in slower}
    y = "iterations / undamped"
    return (
        Panel(
            f"Condition number {condition}",
            "damping δ",
            y,
            tuple(Curve(mode, at[mode], slower[mode][-1]) for mode in slower),
            log_x=True,
        ),
        Panel(
            "All condition numbers, the slowest",
            "δ as a multiple of the level of its mode",
            y,
            tuple(Curve(mode, times, worst[mode]) for mode in slower),
            log_x=True,
        ),
    )


CLAIM: Final = Claim(
    "damping",
    "Damping gives scaled gradient descent its condition number back as soon as δ reaches the "
    "smallest singular value of the product, in covariant damping its square; far below that it "
    "costs nothing.",
    "Follows from the proof of Theorem 7.4 in F. Zhang, M. Pilanci. Riemannian Preconditioned LoRA "
    "for Fine-Tuning Foundation Models. arXiv:2402.02347, 2024, with S + δ I for S.",
    run,
)

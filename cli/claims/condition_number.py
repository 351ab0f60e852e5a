"""Scaled gradient descent does not see the condition number of the target."""

import math
from collections.abc import Iterator
from typing import Final

import rlora
from rlora import Factors

from .claim import Check, Claim, Curve, Outcome, Panel, Setting
from .factorisation import GOAL, Factorisation, errors, factorisation, iterations

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
"""Covariant damping of 1e-4 would be felt at condition number 100: the claim `damping`."""


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


def run(setting: Setting) -> Outcome:
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
    return Outcome(checks(counts, conditions), panels(found, counts, conditions))


def checks(counts: dict[str, list[float]], conditions: tuple[int, ...]) -> tuple[Check, ...]:
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


def panels(
    found: dict[str, list[list[float]]],
    counts: dict[str, list[float]],
    conditions: tuple[int, ...],
) -> tuple[Panel, ...]:
    """Iterations against the condition number, and the paths behind them."""
    return (
        Panel(
            "Iterations to a relative error of 1e-8",
            "condition number of the target",
            "iterations",
            tuple(
                Curve(name, conditions, [max(count, 1) for count in counts[name]])
                for name in counts
            ),
            log_x=True,
        ),
        *(
            Panel(
                f"{name} from a spectral start",
                "iterate, from the start at 1",
                "relative error",
                tuple(
                    Curve(f"condition number {condition}", range(1, len(path) + 1), path)
                    for condition, path in zip(conditions, found[name], strict=True)
                ),
                log_x=name == "GD",
            )
            for name in ("Scaled GD", "GD")
        ),
    )


CLAIM: Final = Claim(
    "condition-number",
    "Scaled gradient descent factors a matrix in a number of iterations that does not depend on "
    "its condition number; gradient descent needs iterations in proportion to it.",
    "F. Zhang, M. Pilanci. Riemannian Preconditioned LoRA for Fine-Tuning Foundation Models. "
    "arXiv:2402.02347, 2024. Theorem 7.4.",
    run,
)

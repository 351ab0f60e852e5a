"""LoRA+'s ratio of learning rates is a choice of how the product is split.

From (A, B) with the ratio ``c²``, Adam (without eps) moves the product as it does with equal rates
from ``(c A, B / c)``; for gradient descent the ratio is ``c⁴``. Scaled gradient descent does not
see c at all: it has nothing that a ratio could mend.
"""

from itertools import islice
from typing import Final

import rlora
from rlora import Factors, Transform
from rlora.core.factors import Array
from rlora.testing import make_problem

from .claim import Check, Claim, Curve, Outcome, Panel, Setting

OUTPUTS, INPUTS, RANK, STEPS = 20, 16, 3, 30
SPLITS: Final = (0.3, 0.6, 0.8, 1.3, 1.8, 3.0)
"""No powers of two, by which nothing is rounded."""
ADAM: Final = rlora.lora_plus(ratio=1.0, eps=0.0)
DESCENT: Final = rlora.chain()
"""An empty chain: the gradients themselves."""
SCALED: Final = rlora.scaled_sgd(damping=0.0)
LR: Final = 0.02

SAME: Final = 1e-9
"""The rounding of 30 steps; 1e-15 is seen."""
APART: Final = 0.1
"""Share of the length of the path: it is not the same one by chance."""


def run(setting: Setting) -> Outcome:
    """Distances of the path from a rescaled start to others from the start itself."""
    found: dict[str, list[float]] = {}
    for c in setting.track(SPLITS, "splits"):
        adam, descent, scaled = (path(setting, x, LR, c) for x in (ADAM, DESCENT, SCALED))
        others = {
            "Adam, ratio c^2": (adam, rlora.lora_plus(ADAM, ratio=c**2), LR / c),
            "Adam, equal rates": (adam, ADAM, LR),
            "GD, ratio c^4": (descent, rlora.lora_plus(DESCENT, ratio=c**4), LR / c**2),
            "GD, equal rates": (descent, DESCENT, LR),
            "scaled GD, equal rates": (scaled, SCALED, LR),
        }
        for label, (rescaled, method, lr) in others.items():
            found.setdefault(label, []).append(distance(rescaled, path(setting, method, lr)))
    same = "Adam, ratio c^2", "GD, ratio c^4", "scaled GD, equal rates"
    other = "Adam, equal rates", "GD, equal rates"
    return Outcome(
        checks=(
            *(Check(f"largest distance, {x}", max(found[x]), "<=", SAME) for x in same),
            *(
                Check(f"distance at c = {SPLITS[-1]:g}, {x}", found[x][-1], ">=", APART)
                for x in other
            ),
        ),
        panels=(
            Panel(
                "the same product, split as (c A, B / c)",
                "c",
                "distance between paths",
                tuple(Curve(label, SPLITS, y) for label, y in found.items()),
                log_x=True,
            ),
        ),
    )


def path(setting: Setting, method: Transform, lr: float, c: float = 1.0) -> Array:
    """Moves of the product (STEPS, m, n) from its start, split as ``(c A, B / c)``."""
    problem = make_problem(OUTPUTS, INPUTS, RANK).on(setting.backend)
    start = Factors(c * problem.params.A, problem.params.B / c)
    pairs = islice(setting.path(method, start, problem.grads, lr), 1, STEPS + 1)
    first = problem.params.B @ problem.params.A
    return setting.backend.xp.stack([pair.B @ pair.A - first for pair in pairs])


def distance(one: Array, other: Array) -> float:
    """Relative to the second."""
    return float((((one - other) ** 2).sum() / (other**2).sum()) ** 0.5)


CLAIM = Claim(
    name="lora-plus-gauge",
    statement=(
        "LoRA+'s ratio of learning rates is the choice of a split: c² for Adam, or c⁴ for gradient "
        "descent, does what equal rates do from (c A, B / c)."
    ),
    source=(
        "S. Hayou, N. Ghosh, B. Yu. LoRA+: Efficient Low Rank Adaptation of Large Models. "
        "arXiv:2402.12354, 2024. The ratio is theirs, the identity follows from the update rules"
    ),
    run=run,
)

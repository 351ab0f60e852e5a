"""Paths from equal products that are split differently, (c A, B / c): who sees c, and how."""

from collections.abc import Iterator
from functools import partial
from itertools import islice
from typing import Final

import numpy as np

import rlora
from rlora import Factors, Transform
from rlora.core.factors import Array
from rlora.testing import Problem, make_problem

from .claim import Check, Claim, Outcome, Setting, lines
from .papers import LORA_PLUS, RITE


def rescaled(
    setting: Setting, method: Transform, lr: float, c: float, steps: int
) -> tuple[Problem, Iterator[Factors]]:
    """A matrix factorisation, and the pairs from its start, split by c, to the last step."""
    problem = make_problem(20, 16, 3).on(setting.backend)
    start = Factors(c * problem.params.A, problem.params.B / c)
    return problem, islice(setting.path(method, start, problem.grads, lr), steps + 1)


# --- LoRA+'s ratio of learning rates is a choice of c -------------------------------------------

SPLITS: Final = (0.3, 0.6, 0.8, 1.3, 1.8, 3.0)
"""No powers of two, by which nothing is rounded."""
ADAM: Final = rlora.lora_plus(ratio=1.0, eps=0.0)
DESCENT: Final = rlora.chain()
"""An empty chain: the gradients themselves."""
SCALED: Final = rlora.scaled_sgd(damping=0.0)
LR, STEPS = 0.02, 30

SAME: Final = 1e-9
"""The rounding of 30 steps; 1e-15 is seen."""
APART: Final = 0.1
"""Share of the length of the path: it is not the same one by chance."""


def run_ratio(setting: Setting) -> Outcome:
    """Distances of the path from a rescaled start to others from the start itself.

    With the ratio ``c²``, Adam (without eps) moves the product as it does with equal rates from
    ``(c A, B / c)``; for gradient descent the ratio is ``c⁴``. Scaled gradient descent does not see
    c at all: it has nothing that a ratio could mend.
    """
    found: dict[str, list[float]] = {}
    for c in setting.track(SPLITS, "splits"):
        adam, descent, scaled = (moves(setting, x, LR, c) for x in (ADAM, DESCENT, SCALED))
        others = {
            "Adam, ratio c^2": (adam, rlora.lora_plus(ADAM, ratio=c**2), LR / c),
            "Adam, equal rates": (adam, ADAM, LR),
            "GD, ratio c^4": (descent, rlora.lora_plus(DESCENT, ratio=c**4), LR / c**2),
            "GD, equal rates": (descent, DESCENT, LR),
            "scaled GD, equal rates": (scaled, SCALED, LR),
        }
        for label, (mine, method, lr) in others.items():
            found.setdefault(label, []).append(distance(mine, moves(setting, method, lr)))
    same = "Adam, ratio c^2", "GD, ratio c^4", "scaled GD, equal rates"
    checks = [Check(f"largest distance, {x}", max(found[x]), "<=", SAME) for x in same]
    checks += [
        Check(f"distance at c = {SPLITS[-1]:g}, {x}", found[x][-1], ">=", APART)
        for x in ("Adam, equal rates", "GD, equal rates")
    ]
    title = "the same product, split as (c A, B / c)"
    panel = lines(title, ("c", SPLITS), "distance between paths", found)
    return Outcome(tuple(checks), (panel,))


def moves(setting: Setting, method: Transform, lr: float, c: float = 1.0) -> Array:
    """Moves of the product (STEPS, m, n) from its start."""
    problem, pairs = rescaled(setting, method, lr, c, STEPS)
    first = problem.params.B @ problem.params.A
    return setting.backend.xp.stack([pair.B @ pair.A - first for pair in islice(pairs, 1, None)])


def distance(one: Array, other: Array) -> float:
    """Relative to the second."""
    return float((((one - other) ** 2).sum() / (other**2).sum()) ** 0.5)


# --- LoRA-RITE does not see how far apart the sizes of the factors are --------------------------

IMBALANCES: Final = (1, 10, 100, 1000)
SHOWN_LR: Final = 0.1
"""Learning rate of the paths shown: the best for Adam at c = 1 among `LRS`."""
LRS: Final = (1e-3, 3e-3, 1e-2, 3e-2, 1e-1, 3e-1, 1.0)

EQUAL: Final = 1e-8
"""Relative difference of two losses that counts as rounding: they fall by ten decades in the run,
so that rounding of the first steps, 1e-16, may grow by as much as eight."""
WORSE: Final = 5.0
"""Least cost of c = 10 to Adam, which still learns there: half of the imbalance at the least."""
STUCK: Final = 0.5
"""Share of the loss that is left from c = 100 on: by then only one factor is learning."""

METHODS: Final[dict[str, Transform]] = {
    "LoRA-RITE": rlora.lora_rite(),
    "Adam": rlora.lora_plus(ratio=1.0, weight_decay=0.0),
}


def losses(setting: Setting, method: Transform, c: float, lr: float, steps: int) -> list[float]:
    """The loss along a run; inf from where it diverged."""
    problem, pairs = rescaled(setting, method, lr, c, steps)
    with np.errstate(all="ignore"):
        found = np.array([float(problem.loss(pair)) for pair in pairs])
    return [float(x) for x in np.where(np.isfinite(found), found, np.inf)]


def run_imbalance(setting: Setting) -> Outcome:
    """Losses from equivalent starts, at one learning rate and at the best of many.

    RITE's curves are one curve; Adam's are worse the further apart its factors start.
    """
    steps = 100 if setting.quick else 200
    lrs = (0.03, 0.1, 0.3) if setting.quick else LRS
    paths, tuned = {}, {}
    for name in setting.track(METHODS, "methods"):
        run = partial(losses, setting, METHODS[name], steps=steps)
        paths[name] = [run(c, SHOWN_LR) for c in IMBALANCES]
        tuned[name] = [min(run(c, lr)[-1] for lr in lrs) for c in IMBALANCES]
    rite, adam = np.array(paths["LoRA-RITE"]), tuned["Adam"]
    apart = float(np.max(np.abs(rite / rite[0] - 1)))
    left = min(adam[2:]) / paths["Adam"][0][0]
    imbalance = "imbalance c of the start (c A, B / c)", IMBALANCES
    panels = [lines("Loss at the end, each at its best learning rate", imbalance, "loss", tuned)]
    for name, runs in paths.items():
        by_split = {f"c = {c}": path for c, path in zip(IMBALANCES, runs, strict=True)}
        title, iteration = f"{name}, learning rate {SHOWN_LR}", ("iteration", range(steps + 1))
        panels.append(lines(title, iteration, "loss", by_split, log_x=False))
    return Outcome(
        (
            Check("LoRA-RITE: relative difference of its loss curves", apart, "<=", EQUAL),
            Check(
                "Adam at its best rate: loss at c = 10 over c = 1", adam[1] / adam[0], ">=", WORSE
            ),
            Check("the same at c = 100 and 1000 over the start", left, ">=", STUCK),
        ),
        tuple(panels),
    )


IMBALANCE: Final = Claim(
    "rite-imbalance",
    "LoRA-RITE takes the same path from (c A, B / c) for every c; Adam learns less the larger c "
    "is, whatever its learning rate.",
    f"{RITE}. Theorem 4.",
    run_imbalance,
)
RATIO: Final = Claim(
    "lora-plus-gauge",
    "LoRA+'s ratio of learning rates is the choice of a split: c² for Adam, or c⁴ for gradient "
    "descent, does what equal rates do from (c A, B / c).",
    f"{LORA_PLUS}. The ratio is theirs, the identity follows from the update rules",
    run_ratio,
)

"""LoRA-RITE from a start whose factors have very different sizes."""

from itertools import islice
from typing import Final

import numpy as np

import rlora
from rlora import Factors, Transform
from rlora.testing import make_problem

from .claim import Check, Claim, Curve, Outcome, Panel, Setting

SPLITS: Final = (1, 10, 100, 1000)
"""c of the start (c A, B / c)."""
LR: Final = 0.1
"""Learning rate of the paths shown: the best for Adam at c = 1 among `LRS`."""
LRS: Final = (1e-3, 3e-3, 1e-2, 3e-2, 1e-1, 3e-1, 1.0)

SAME: Final = 1e-8
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
    """The loss along a run; inf from where it has flown away."""
    problem = make_problem(20, 16, 3).on(setting.backend)
    start = Factors(c * problem.params.A, problem.params.B / c)
    with np.errstate(all="ignore"):
        path = islice(setting.path(method, start, problem.grads, lr), steps + 1)
        found = np.array([float(problem.loss(pair)) for pair in path])
    return [float(x) for x in np.where(np.isfinite(found), found, np.inf)]


def run(setting: Setting) -> Outcome:
    """Losses from equivalent starts, at one learning rate and at the best of many."""
    steps = 100 if setting.quick else 200
    lrs = (0.03, 0.1, 0.3) if setting.quick else LRS
    paths = {
        name: [losses(setting, METHODS[name], c, LR, steps) for c in SPLITS]
        for name in setting.track(METHODS, "paths")
    }
    tuned = {
        name: [min(losses(setting, METHODS[name], c, lr, steps)[-1] for lr in lrs) for c in SPLITS]
        for name in setting.track(METHODS, "learning rates")
    }
    return Outcome(checks(paths, tuned), panels(paths, tuned))


def checks(paths: dict[str, list[list[float]]], tuned: dict[str, list[float]]) -> tuple[Check, ...]:
    """RITE's curves are one curve; Adam's are worse the further apart its factors start."""
    rite, adam = np.array(paths["LoRA-RITE"]), tuned["Adam"]
    apart = float(np.max(np.abs(rite / rite[0] - 1)))
    return (
        Check("LoRA-RITE: relative difference of its loss curves", apart, "<=", SAME),
        Check("Adam at its best rate: loss at c = 10 over c = 1", adam[1] / adam[0], ">=", WORSE),
        Check(
            "the same at c = 100 and 1000 over the start",
            min(adam[2:]) / paths["Adam"][0][0],
            ">=",
            STUCK,
        ),
    )


def panels(paths: dict[str, list[list[float]]], tuned: dict[str, list[float]]) -> tuple[Panel, ...]:
    """The last loss by imbalance, and the paths at one learning rate."""
    return (
        Panel(
            "Loss at the end, each at its best learning rate",
            "imbalance c of the start (c A, B / c)",
            "loss",
            tuple(Curve(name, SPLITS, tuned[name]) for name in tuned),
            log_x=True,
        ),
        *(
            Panel(
                f"{name}, learning rate {LR}",
                "iteration",
                "loss",
                tuple(
                    Curve(f"c = {c}", range(len(path)), path)
                    for c, path in zip(SPLITS, paths[name], strict=True)
                ),
            )
            for name in paths
        ),
    )


CLAIM: Final = Claim(
    "rite-imbalance",
    "LoRA-RITE takes the same path from (c A, B / c) for every c; Adam learns less the larger c "
    "is, whatever its learning rate.",
    "J.-N. Yen, S. Si, Z. Meng, F. Yu, S. S. Duvvuri, I. S. Dhillon, C.-J. Hsieh, S. Kumar. "
    "LoRA Done RITE. arXiv:2410.20625, 2024. Theorem 4.",
    run,
)

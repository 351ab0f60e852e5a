"""The width of a square layer under Adam, by where the preconditioner stands."""

from typing import Any, Final

import numpy as np

import rlora
from rlora import Factors, Transform
from rlora.core.placement import Placement

from .claim import Check, Claim, Outcome, Setting
from .widths import STABLE, Growth, Layer, Learner, exponent, grow, most, panels

LR: Final = 0.3
"""Not small: widths are large only beside 1 / lr²."""
RITE_LR: Final = 0.05
"""LoRA-RITE's steps have a size of their own; at this one its output is near one in four steps."""
NARROWEST: Final = 64
RANK, BATCH, STEPS = 4, 8, 4
GROWS: Final = 0.4
"""Least exponent that counts as growth: theory has one half or one."""

SIGNS: Final[dict[str, Any]] = {"b1": 0.0, "b2": 0.0, "weight_decay": 0.0}
"""Adam without memory, so that a few steps show its normalisation and nothing else."""
RELATIVE: Final[dict[str, Any]] = {"damping": 1e-6, "damping_mode": "relative"}


def same(width: int) -> float:
    """One learning rate for all widths."""
    return LR


def scaled(placement: Placement) -> Transform:
    """Scaled AdamW without memory."""
    return rlora.scaled_adamw(placement=placement, **SIGNS, **RELATIVE)


ADAM: Final = Learner(lambda n: rlora.lora_plus(ratio=1.0, **SIGNS), same)
BEFORE: Final = Learner(lambda n: scaled("before"), same)
AFTER: Final = Learner(lambda n: scaled("after"), same)
BOTH: Final = Learner(lambda n: scaled("both"), same)
PLUS: Final = Learner(lambda n: rlora.lora_plus(ratio=float(n), **SIGNS), lambda n: LR / n)
"""LoRA+ as its theory has it: A's learning rate is n times smaller than B's."""
RITE: Final = Learner(
    lambda n: rlora.lora_rite(b1=0.0, b2=0.0), lambda n: RITE_LR * (NARROWEST / n) ** 0.5
)
"""The second moment is a mean over the rows, where the theorem has their sum: that is a root of the
width in the learning rate."""

STEADY: Final = {
    "after Adam": AFTER,
    "LoRA+, A's rate over the width": PLUS,
    "LoRA-RITE, rate over the root": RITE,
}
GROWING: Final = {"Adam": ADAM, "half on both sides": BOTH}


def layer(setting: Setting, width: int) -> Layer:
    """A square layer as fine-tuning starts: A ~ N(0, 1/n) and B = 0."""
    rng = np.random.default_rng(0)
    seeds = 8 if setting.quick else 32
    inputs, outputs = rng.normal(size=(2, seeds, width, BATCH))
    A = rng.normal(size=(seeds, RANK, width)) / width**0.5
    B = np.zeros((seeds, width, RANK))
    start = Factors(setting.array(A), setting.array(B))
    return Layer(setting.array(inputs), setting.array(outputs), start)


def measure(setting: Setting, learners: dict[str, Learner]) -> tuple[list[int], Growth]:
    """The widths, and what was found in the fourth step."""
    widths = [2**k for k in range(6, 11 if setting.quick else 13)]
    return widths, grow(setting, learners, layer, widths, STEPS)


def run(setting: Setting) -> Outcome:
    """Exponents of the width in the fourth step."""
    widths, found = measure(setting, STEADY | GROWING)
    steady = {name: most(widths, found[name]) for name in STEADY}
    growing = {name: exponent(widths, found[name][0]) for name in GROWING}
    return Outcome(
        (
            *(Check(f"{name}: largest exponent", x, "<=", STABLE) for name, x in steady.items()),
            *(
                Check(f"{name}: exponent of step of A", x, ">=", GROWS)
                for name, x in growing.items()
            ),
        ),
        panels(widths, found, "fourth step"),
    )


CLAIM: Final = Claim(
    "feature-learning-adam",
    "From B = 0 with one learning rate for all widths, Adam with the preconditioner after it moves "
    "the output by an amount that does not depend on the width; plain Adam's steps grow with it.",
    "F. Zhang, M. Pilanci. Riemannian Preconditioned LoRA for Fine-Tuning Foundation Models. "
    "arXiv:2402.02347, 2024. Theorem 4.1. For LoRA+: S. Hayou, N. Ghosh, B. Yu. LoRA+: Efficient "
    "Low Rank Adaptation of Large Models. arXiv:2402.12354, 2024.",
    run,
)

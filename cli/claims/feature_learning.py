"""The width of a layer with one output, and which of the two factors learns."""

from typing import Final

import numpy as np

import rlora
from rlora import Factors

from .claim import Check, Claim, Outcome, Setting
from .widths import STABLE, Layer, Learner, exponent, grow, most, panels

LR: Final = 0.5
"""Over the width: the A step of both methods is then as large as the missing output."""
STILL: Final = -0.8
"""Largest exponent of GD's B step, which by theory is -1: B does not learn in a wide layer."""
SEEDS: Final = 64
STEPS: Final = 3

SCALED: Final = rlora.scaled_sgd(damping=1e-6, damping_mode="relative")
"""The singular value of BA is here one over the root of the width: in a wide layer covariant
damping would be felt."""

LEARNERS: Final = {
    "scaled GD": Learner(lambda n: SCALED, lambda n: LR / n),
    "GD": Learner(lambda n: rlora.chain(), lambda n: LR / n),
}


def layer(setting: Setting, width: int) -> Layer:
    """One output, rank one: ``f = b a x`` with a = 0, b of order one, and 1 to be learnt."""
    rng = np.random.default_rng(0)
    inputs = rng.normal(size=(SEEDS, width, 1))
    b = rng.uniform(0.5, 1.5, size=(SEEDS, 1, 1)) * rng.choice([-1.0, 1.0], size=(SEEDS, 1, 1))
    start = Factors(setting.array(np.zeros((SEEDS, 1, width))), setting.array(b))
    return Layer(setting.array(inputs), setting.array(np.ones((SEEDS, 1, 1))), start)


def run(setting: Setting) -> Outcome:
    """Exponents of the width in the third step."""
    widths = [2**k for k in range(6, 11 if setting.quick else 15)]
    found = grow(setting, LEARNERS, layer, widths, STEPS)
    scaled = most(widths, found["scaled GD"])
    plain = [exponent(widths, sizes) for sizes in found["GD"]]
    return Outcome(
        (
            Check("scaled GD: largest exponent of the width, any part", scaled, "<=", STABLE),
            Check("GD: exponent of the step of A", abs(plain[0]), "<=", STABLE),
            Check("GD: exponent of the step of B", plain[1], "<=", STILL),
        ),
        panels(widths, found, "third step"),
    )


CLAIM: Final = Claim(
    "feature-learning",
    "In a layer with one output, with a learning rate of order 1 / width, scaled gradient descent "
    "moves the output as much through B as through A at every width; gradient descent only through "
    "A.",
    "F. Zhang, M. Pilanci. Riemannian Preconditioned LoRA for Fine-Tuning Foundation Models. "
    "arXiv:2402.02347, 2024. Section 4, the one-layer example.",
    run,
)

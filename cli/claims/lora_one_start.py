"""LoRA-One's start: the best piece of one full gradient step is the answer up to sampling error.

The gradient of a linear teacher D is ``-D C`` with the covariance C of N inputs. Its best piece of
rank r is what the start is made of, so that ``|B A - D| <= |C - I| |D|`` in the spectral norm.
"""

from typing import Final

import numpy as np

import rlora

from .claim import Check, Claim, Curve, Outcome, Panel, Setting
from .teacher import Matrix, Teacher, draw_teacher

OUTPUTS = INPUTS = 64
TRUE_RANK, RANK, CONDITION = 2, 8, 2.0
SAMPLES: Final = (640, 2000, 6400, 20000, 64000)
QUICK_SAMPLES: Final = (640, 6400)

NEAR: Final = 0.15
"""At 100 samples an input |C - I| is about 2 sqrt(1 / 100) = 0.2 and the error seen 0.12."""


def run(setting: Setting) -> Outcome:
    """Error of the start, and what the theorem allows, for more and more samples."""
    rng = np.random.default_rng(0)
    samples = QUICK_SAMPLES if setting.quick else SAMPLES
    teachers = [draw_teacher(rng, OUTPUTS, INPUTS, TRUE_RANK, CONDITION, N) for N in samples]
    errors = [error(setting, x) for x in setting.track(teachers, "sample sizes")]
    bounds = [norm(x.covariance - np.eye(INPUTS)) for x in teachers]
    return Outcome(
        checks=(
            Check(
                "largest error over its bound",
                max(x / y for x, y in zip(errors, bounds, strict=True)),
                "<=",
                1.0,
            ),
            Check("relative error, 6400 samples", errors[samples.index(6400)], "<=", NEAR),
        ),
        panels=(
            Panel(
                "the start before any training",
                "samples of 64 inputs",
                "relative error of B A",
                (
                    Curve("LoRA: B = 0", samples, [1.0] * len(samples)),
                    Curve("|C - I|, the bound", samples, bounds),
                    Curve("LoRA-One", samples, errors),
                ),
                log_x=True,
            ),
        ),
    )


def error(setting: Setting, teacher: Teacher) -> float:
    """``|B A - D| / |D|`` of LoRA-One's start."""
    gradient = setting.array(-teacher.target @ teacher.covariance)
    start = rlora.initializers.lora_one(gradient, RANK, gamma=1.0, form="theory")
    product = setting.backend.to_numpy(start.params.B @ start.params.A)
    return norm(product - teacher.target) / norm(teacher.target)


def norm(matrix: Matrix) -> float:
    """The largest singular value."""
    return float(np.linalg.norm(matrix, 2))


CLAIM = Claim(
    name="lora-one-start",
    statement=(
        "LoRA-One's start from one full gradient misses a linear teacher by at most the relative "
        "error of the inputs' covariance."
    ),
    source=(
        "Y. Zhang, F. Liu, Y. Chen. LoRA-One: One-Step Full Gradient Could Suffice for Fine-Tuning "
        "Large Language Models, Provably and Efficiently. arXiv:2502.01235, 2025. Theorem 3.3"
    ),
    run=run,
)

"""LoRA-One's observation: gradient descent from LoRA's start finds the gradient's own directions.

A linear teacher of rank 2 and its samples; what turns is the angle between the singular vectors of
the factors and those of the first full gradient. B has them after one step. A has them some time
later, and only if it starts far smaller than LoRA starts it; in the end it turns to the teacher.
"""

from typing import Final

import numpy as np

import rlora
from rlora import Factors
from rlora.core.algebra import mT
from rlora.core.backend import Backend
from rlora.core.factors import Array

from .claim import Check, Claim, Curve, Outcome, Panel, Setting
from .teacher import draw_teacher

OUTPUTS = INPUTS = 64
TRUE_RANK, RANK, CONDITION, SAMPLES = 2, 8, 2.0, 6400
LR, STEPS = 0.1, 200
SIZES: Final = (1.0, 1e-1, 1e-3, 1e-5)
"""Size of A at the start, whose entries are N(0, size² / n): LoRA's own start has about 1."""

EXACT: Final = 1e-10
"""B never leaves the space: what is seen is the rounding of its small singular values, 1e-13."""
ALIGNED: Final = 0.1
"""The gradient and the teacher themselves are about 0.1 apart with so few samples."""
ASTRAY: Final = 0.9
"""A random direction is at a sine of 0.98 from 2 of 64."""


def run(setting: Setting) -> Outcome:
    """Both angles along the path, from starts of several sizes."""
    angles_A, angles_B = angles(setting, seeds=2 if setting.quick else 8)
    nearest = angles_A.min(axis=0)  # (sizes, seeds)
    steps = range(1, STEPS + 1)
    labels = [f"A of size {size:g}" for size in SIZES]
    return Outcome(
        checks=(
            Check("largest sine, B, any step and start", float(angles_B.max()), "<=", EXACT),
            Check(
                f"smallest sine, {labels[-1]}, worst seed", float(nearest[-1].max()), "<=", ALIGNED
            ),
            Check(
                f"smallest sine, {labels[0]}, median", float(np.median(nearest[0])), ">=", ASTRAY
            ),
        ),
        panels=tuple(
            Panel(title, "step", "sine of the largest angle", curves_of(labels, steps, found))
            for title, found in (
                ("A and the row space", angles_A),
                ("B and the column space", angles_B),
            )
        ),
    )


def angles(setting: Setting, seeds: int) -> tuple[Array, Array]:
    """Sines (STEPS, sizes, seeds) for A and for B."""
    backend = setting.backend
    rng = np.random.default_rng(0)
    teachers = [
        draw_teacher(rng, OUTPUTS, INPUTS, TRUE_RANK, CONDITION, SAMPLES) for _ in range(seeds)
    ]
    target, covariance = (setting.array(np.stack(x)) for x in zip(*teachers, strict=True))
    U, _, Vt = backend.svd(target @ covariance)  # of minus the gradient where B is 0
    left, right = U[..., :TRUE_RANK], mT(Vt)[..., :TRUE_RANK]

    A = rng.standard_normal((seeds, RANK, INPUTS)) / INPUTS**0.5
    pair = Factors(
        setting.array(np.stack([size * A for size in SIZES])),
        setting.array(np.zeros((len(SIZES), seeds, OUTPUTS, RANK))),
    )

    def move(pair: Factors) -> tuple[Factors, Array, Array]:
        G = (pair.B @ pair.A - target) @ covariance
        pair = rlora.apply_updates(pair, Factors(mT(pair.B) @ G, G @ mT(pair.A)), LR)
        return pair, sine(backend, mT(pair.A), right), sine(backend, pair.B, left)

    move = backend.compile(move)
    path = []
    for _ in setting.track(range(STEPS), "steps"):
        pair, *sines = move(pair)
        path.append([backend.to_numpy(x) for x in sines])
    angles_A, angles_B = (np.stack(x) for x in zip(*path, strict=True))
    return angles_A, angles_B


def sine(backend: Backend, factor: Array, space: Array) -> Array:
    """Sine of the largest angle between leading left singular vectors and an orthonormal basis."""
    U = backend.svd(factor)[0][..., : space.shape[-1]]
    rest = U - space @ (mT(space) @ U)
    return backend.svd(rest)[1][..., 0]


def curves_of(labels: list[str], steps: range, found: Array) -> tuple[Curve, ...]:
    """One curve a start, the median over the seeds."""
    medians = np.median(found, axis=-1).T
    return tuple(Curve(label, steps, y.tolist()) for label, y in zip(labels, medians, strict=True))


CLAIM = Claim(
    name="lora-one-alignment",
    statement=(
        "From LoRA's start, B lies in the leading singular space of the first full gradient from "
        "the first step of gradient descent on; A comes to it later, and only from a small start."
    ),
    source=(
        "Y. Zhang, F. Liu, Y. Chen. LoRA-One: One-Step Full Gradient Could Suffice for Fine-Tuning "
        "Large Language Models, Provably and Efficiently. arXiv:2502.01235, 2025. Theorems 3.1, 3.2"
    ),
    run=run,
)

"""LoRA-One's claims, on linear teachers of low rank: where descent goes, where it should start."""

from typing import Any, Final, NamedTuple

import numpy as np

import rlora
from rlora import Factors, Transform
from rlora.core.backend import Backend
from rlora.core.factors import Array

from .claim import Check, Claim, Outcome, Setting, lines
from .papers import LORA_ONE
from .problems import Matrix, Teacher, draw_teacher, factor_gradients

SIDE, TRUE_RANK, RANK, CONDITION = 64, 2, 8, 2.0

# --- gradient descent finds the gradient's own directions ---------------------------------------

LR, STEPS = 0.1, 200
SIZES: Final = (1.0, 1e-1, 1e-3, 1e-5)
"""Size of A at the start, whose entries are N(0, size² / n): LoRA's own start has about 1."""

EXACT: Final = 1e-10
"""B never leaves the space: what is seen is the rounding of its small singular values, 1e-13."""
ALIGNED: Final = 0.1
"""The gradient and the teacher themselves are about 0.1 apart with so few samples."""
ASTRAY: Final = 0.9
"""A random direction is at a sine of 0.98 from 2 of 64."""


def run_alignment(setting: Setting) -> Outcome:
    """Angles of both factors along the path, from starts of several sizes.

    B has the singular vectors of the first full gradient after one step. A has them some time
    later, if it starts far smaller than LoRA starts it; in the end it turns to the teacher.
    """
    angles_A, angles_B = angles(setting, seeds=2 if setting.quick else 8)
    nearest = angles_A.min(axis=0)  # (sizes, seeds)
    labels = [f"A of size {size:g}" for size in SIZES]
    small, usual = float(nearest[-1].max()), float(np.median(nearest[0]))
    steps = "step", range(1, STEPS + 1)
    panels = []
    for title, found in (
        ("A and the row space", angles_A),
        ("B and the column space", angles_B),
    ):
        medians = dict(zip(labels, np.median(found, axis=-1).T, strict=True))
        panels.append(lines(title, steps, "sine of the largest angle", medians, log_x=False))
    return Outcome(
        (
            Check("largest sine, B, any step and start", float(angles_B.max()), "<=", EXACT),
            Check(f"smallest sine, {labels[-1]}, worst seed", small, "<=", ALIGNED),
            Check(f"smallest sine, {labels[0]}, median", usual, ">=", ASTRAY),
        ),
        tuple(panels),
    )


def angles(setting: Setting, seeds: int) -> tuple[Array, Array]:
    """Sines (STEPS, sizes, seeds) for A and for B."""
    backend = setting.backend
    rng = np.random.default_rng(0)
    teachers = [
        draw_teacher(rng, SIDE, SIDE, TRUE_RANK, CONDITION, samples=6400) for _ in range(seeds)
    ]
    target, covariance = (setting.array(np.stack(x)) for x in zip(*teachers, strict=True))
    U, _, Vt = backend.svd(target @ covariance)  # of minus the gradient where B is 0
    left, right = U[..., :TRUE_RANK], Vt.mT[..., :TRUE_RANK]

    A = rng.standard_normal((seeds, RANK, SIDE)) / SIDE**0.5
    starts = Factors(
        np.stack([size * A for size in SIZES]), np.zeros((len(SIZES), seeds, SIDE, RANK))
    )

    def move(pair: Factors) -> tuple[Factors, Array, Array]:
        G = (pair.B @ pair.A - target) @ covariance
        pair = rlora.apply_updates(pair, factor_gradients(pair, G), LR)
        return pair, sine(backend, pair.A.mT, right), sine(backend, pair.B, left)

    move, pair = backend.compile(move), setting.arrays(starts)
    path = []
    for _ in setting.track(range(STEPS), "steps"):
        pair, *sines = move(pair)
        path.append([backend.to_numpy(x) for x in sines])
    angles_A, angles_B = (np.stack(x) for x in zip(*path, strict=True))
    return angles_A, angles_B


def sine(backend: Backend, factor: Array, space: Array) -> Array:
    """Sine of the largest angle between leading left singular vectors and an orthonormal basis."""
    U = backend.svd(factor)[0][..., : space.shape[-1]]
    rest = U - space @ (space.mT @ U)
    return backend.svd(rest)[1][..., 0]


# --- the best piece of one full gradient is the answer up to sampling error ---------------------

SAMPLES: Final = (640, 2000, 6400, 20000, 64000)
QUICK_SAMPLES: Final = (640, 6400)

NEAR: Final = 0.15
"""At 100 samples an input |C - I| is about 2 sqrt(1 / 100) = 0.2 and the error seen 0.12."""


def run_start(setting: Setting) -> Outcome:
    """Error of the start, and what the theorem allows, for more and more samples.

    The start is made of the best piece of rank r of the gradient ``-D C``, with the covariance C of
    the inputs, so that ``|B A - D| <= |C - I| |D|`` in the spectral norm.
    """
    rng = np.random.default_rng(0)
    samples = QUICK_SAMPLES if setting.quick else SAMPLES
    teachers = [draw_teacher(rng, SIDE, SIDE, TRUE_RANK, CONDITION, N) for N in samples]
    errors = [error(setting, x) for x in setting.track(teachers, "sample sizes")]
    bounds = [norm(x.covariance - np.eye(SIDE)) for x in teachers]
    worst = max(x / y for x, y in zip(errors, bounds, strict=True))
    found = {
        "LoRA: B = 0": [1.0] * len(samples),
        "|C - I|, the bound": bounds,
        "LoRA-One": errors,
    }
    places = "samples of 64 inputs", samples
    return Outcome(
        (
            Check("largest error over its bound", worst, "<=", 1.0),
            Check("relative error, 6400 samples", errors[samples.index(6400)], "<=", NEAR),
        ),
        (lines("the start before any training", places, "relative error of B A", found),),
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


# --- from there scaled gradient descent, against gradient descent, tuned ------------------------

LARGE, SAME_RANK, FEW_STEPS = 100, 4, 30
CONDITIONS: Final = (5.0, 20.0, 100.0)
SHOWN = CONDITIONS.index(20.0)
LEARNING_RATES: Final = tuple(i / 10 for i in range(1, 11))
"""To beyond the best of every method."""

ARRIVED: Final = 1e-5
"""C has eigenvalues from 0.75² to 1.25², and the part of the error in both spaces moves twice. At
the best learning rate a step leaves (k - 1) / (k + 1) = 0.7 of it at most, k = 2 * 2.8; 30 leave
2e-5 at most, and 7e-9 is seen."""
ON_THE_WAY: Final = 1e-4
"""Gradient descent has the teacher's condition in k: of at least 5 * 2.8 the same gives 1e-2, and
9e-4 is seen."""


class StartedMethod(NamedTuple):
    """A method and where it starts, one pair a teacher."""

    label: str
    method: Transform
    start: Factors


def run_preconditioned(setting: Setting) -> Outcome:
    """Errors of every method, learning rate and teacher, of which each gets its best rate.

    Scaled gradient descent is shown from LoRA's start too: it arrives there as well, so that the
    preconditioner does most of it, and the start saves some steps.
    """
    rng = np.random.default_rng(0)
    teachers = [
        draw_teacher(rng, LARGE, LARGE, SAME_RANK, condition, samples=1600)
        for condition in CONDITIONS
    ]
    target, covariance = (setting.array(np.stack(x)) for x in zip(*teachers, strict=True))
    A = setting.array(rng.standard_normal((len(CONDITIONS), SAME_RANK, LARGE)) / LARGE**0.5)
    lora = Factors(A, 0.0 * target[..., :SAME_RANK])
    gradient = -target @ covariance
    one = rlora.initializers.lora_one(gradient, SAME_RANK, gamma=1.0, form="theory").params
    descent, scaled = rlora.chain(), rlora.scaled_sgd(damping=0.0)  # an empty chain: plain descent
    entries = (
        StartedMethod("LoRA, GD", descent, lora),
        StartedMethod("LoRA-One, GD", descent, one),
        StartedMethod("LoRA, scaled GD", scaled, lora),
        StartedMethod("LoRA-One, scaled GD", scaled, one),
    )
    found = {
        entry.label: paths(setting, entry, target, covariance)
        for entry in setting.track(entries, "methods")
    }
    tuned = {label: path[-1].min(axis=0) for label, path in found.items()}  # (conditions,)
    arrived, late = max(tuned["LoRA-One, scaled GD"]), min(tuned["LoRA-One, GD"])
    shown = {label: path[:, :, SHOWN] for label, path in found.items()}  # of one teacher
    best = {label: path[:, path[-1].argmin()] for label, path in shown.items()}
    last = {label: path[-1] for label, path in shown.items()}
    title, y = f"condition {CONDITIONS[SHOWN]:g}", "relative error"
    steps, rates = ("step", range(FEW_STEPS + 1)), ("learning rate", LEARNING_RATES)
    return Outcome(
        (
            Check("relative error, LoRA-One, scaled GD, worst teacher", arrived, "<=", ARRIVED),
            Check("relative error, LoRA-One, GD, best teacher", late, ">=", ON_THE_WAY),
        ),
        (
            lines(f"{title}, best learning rate each", steps, y, best, log_x=False),
            lines(f"{title}, after {FEW_STEPS} steps", rates, y, last, log_x=False),
        ),
    )


def paths(setting: Setting, entry: StartedMethod, target: Array, covariance: Array) -> Matrix:
    """``|B A - D| / |D|`` (FEW_STEPS + 1, learning rates, teachers)."""
    backend, xp = setting.backend, setting.backend.xp
    lr = setting.array(np.reshape(LEARNING_RATES, (-1, 1, 1, 1)))
    pair = Factors(*(xp.zeros_like(lr) + x for x in entry.start))
    state = entry.method.init(pair)

    def squares(x: Array) -> Array:
        return xp.sum(x**2, axis=(-2, -1))

    def move(pair: Factors, state: Any) -> tuple[Factors, Any, Array]:
        G = (pair.B @ pair.A - target) @ covariance
        pair, state = rlora.step(entry.method, pair, factor_gradients(pair, G), state, lr)
        return pair, state, squares(pair.B @ pair.A - target)

    move = backend.compile(move)
    path = [backend.to_numpy(squares(pair.B @ pair.A - target))]
    for _ in range(FEW_STEPS):
        pair, state, found = move(pair, state)
        path.append(backend.to_numpy(found))
    relative: Matrix = np.sqrt(np.stack(path) / backend.to_numpy(squares(target)))
    return relative


CLAIMS: Final = (
    Claim(
        "lora-one-alignment",
        "From LoRA's start, B lies in the leading singular space of the first full gradient from "
        "the first step of gradient descent on; A comes to it later, and only from a small start.",
        f"{LORA_ONE}. Theorems 3.1, 3.2",
        run_alignment,
    ),
    Claim(
        "lora-one-start",
        "LoRA-One's start from one full gradient misses a linear teacher by at most the relative "
        "error of the inputs' covariance.",
        f"{LORA_ONE}. Theorem 3.3",
        run_start,
    ),
    Claim(
        "lora-one-preconditioned",
        "From LoRA-One's start, scaled gradient descent is done with a linear teacher of any "
        "condition while gradient descent at its best learning rate is still on its way.",
        f"{LORA_ONE}. Section 3.3, figure 4",
        run_preconditioned,
    ),
)

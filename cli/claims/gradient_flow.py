"""Gradient flow of a pair with rank to spare, from small starts in and out of the right spaces.

The paper's two pretrained factors are one frozen weight here, and the pair learns the change Δ. In
coordinates of Δ's singular spaces the flow first makes the part of B A inside them equal to Δ; what
that part of A and B meets outside decays with it. Rank to spare meets nothing: its product outside
stays as it started, the product of two small parts: hence the squares, where the paper has bounds.
"""

from itertools import islice
from typing import Final

import numpy as np

import rlora
from rlora import Factors

from .claim import Check, Claim, Outcome, Setting, lines
from .problems import Matrix, exponent, factor_gradients

OUTPUTS, INPUTS, TRUE_RANK, RANK = 30, 24, 2, 4
SINGULAR: Final = (1.0, 0.5)
LR: Final = 0.1
"""Steps so small against the curvature, 1, that gradient descent follows the flow."""
STEPS: Final = 1000
"""A time of 100: growth from 1e-4 takes 37 at the smaller singular value, then rounding 37 more."""
SIZES: Final = (1e-1, 1e-2, 1e-3, 1e-4)
PARTS: Final = (1.0, 1e-1, 1e-2)
"""Length of the part of a start outside of the singular spaces over that inside."""

SQUARE: Final = 0.1
"""Largest distance of an exponent from 2: from large starts the outside still decays a little."""
EXACT: Final = 1e-12
"""Rounding of a thousand steps in float64 is 1e-15."""


def run(setting: Setting) -> Outcome:
    """Errors along the flow, by size of the start and by its part outside."""
    paths = {part: errors(setting, part) for part in setting.track((*PARTS, 0.0), "starts")}
    ends = {part: path[-1] for part, path in paths.items()}
    # The largest start is for the figure: its outside decays.
    by_size = exponent(SIZES[1:], ends[1.0][1:])
    by_part = exponent(PARTS, [ends[part][-2] for part in PARTS])
    labels = {part: f"{part:g} of it outside" if part else "start inside" for part in paths}
    size = "size of the start", SIZES
    time = "time", [LR * step for step in range(0, STEPS + 1, 10)]
    error = "|BA - Δ| / |Δ|"
    by_label = {labels[part]: end for part, end in ends.items()}
    along = {labels[part]: path[::10, -2] for part, path in paths.items()}
    return Outcome(
        (
            Check(
                "distance from 2 of the error's exponent in the size",
                abs(by_size - 2),
                "<=",
                SQUARE,
            ),
            Check("the same in the part outside", abs(by_part - 2), "<=", SQUARE),
            Check("largest error, start inside", float(ends[0.0].max()), "<=", EXACT),
        ),
        (
            lines(f"error at time {LR * STEPS:g}", size, error, by_label),
            lines(f"from a start of size {SIZES[-2]:g}", time, error, along, log_x=False),
        ),
    )


def errors(setting: Setting, part: float) -> Matrix:
    """``|B A - Δ| / |Δ|`` along the paths from every size at once."""
    target, start = problem(part)
    D = setting.array(target)

    def grads(pair: Factors) -> Factors:
        return factor_gradients(pair, pair.B @ pair.A - D)

    pairs = Factors(*(setting.array(np.stack([size * F for size in SIZES])) for F in start))
    norm = setting.backend.xp.linalg.matrix_norm
    path = islice(setting.path(rlora.chain(), pairs, grads, LR), STEPS + 1)
    found = [setting.backend.to_numpy(norm(pair.B @ pair.A - D)) for pair in path]
    return np.asarray(np.stack(found) / np.linalg.norm(target))


def problem(part: float) -> tuple[Matrix, Factors]:
    """Δ of rank `TRUE_RANK`, and a random start of size 1 with so much of it outside."""
    rng = np.random.default_rng(0)
    U, V = (np.linalg.qr(rng.standard_normal((side, TRUE_RANK)))[0] for side in (OUTPUTS, INPUTS))
    B = misaligned(rng.standard_normal((OUTPUTS, RANK)), U, part)
    A = misaligned(rng.standard_normal((INPUTS, RANK)), V, part).T
    return U * SINGULAR @ V.T, Factors(A, B)


def misaligned(F: Matrix, basis: Matrix, part: float) -> Matrix:
    """The columns' part inside of a basis, of length 1, and `part` of what is outside."""
    inside = basis @ (basis.T @ F)
    outside = F - inside
    inside /= np.linalg.norm(inside)
    return np.asarray(inside + part * outside / np.linalg.norm(outside))


CLAIM = Claim(
    name="gradient-flow",
    statement=(
        "From a small start, gradient flow of a pair with rank to spare ends at an error in the "
        "square of the start's size and of its part outside the target's singular spaces; from "
        "inside them it is exact."
    ),
    source=(
        "Z. Xu, H. Min, L. E. MacDonald, J. Luo, S. Tarmoun, E. Mallada, R. Vidal. Understanding "
        "the Learning Dynamics of LoRA: A Gradient Flow Perspective on Low-Rank Adaptation in "
        "Matrix Factorization. arXiv:2503.06982, 2025"
    ),
    run=run,
)

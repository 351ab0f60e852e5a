"""LoRA-GA's start: the first step goes where that of full fine-tuning would, as far as it can.

To first order a step changes the weight by ``-lr s² (G Aᵀ A + B Bᵀ G)``. With A and B from the
first and second r singular vectors of G, and of one scale, that is along ``[G]_2r``. What PEFT
makes of it, with the singular values in B alone, loses that.
"""

from typing import Final

import numpy as np

import rlora
from rlora import Factors
from rlora.core.factors import Array

from .claim import Check, Claim, Outcome, Setting, lines
from .problems import factor_gradients

OUTPUTS, INPUTS, RANK = 60, 50, 4
LEARNING_RATES: Final = (1e-1, 1e-2, 1e-3, 1e-4, 1e-5, 1e-6)

ALONG: Final = 1e-4
"""The second-order part of the step, which falls with lr, is all that is left at the smallest."""
ASTRAY: Final = 0.1


def run(setting: Setting) -> Outcome:
    """Sines of the angle between the first step and the best one of rank 2r."""
    backend = setting.backend
    G = setting.array(np.random.default_rng(0).standard_normal((OUTPUTS, INPUTS)))
    # So much oversampling makes the decomposition exact.
    starts = {
        "LoRA-GA": rlora.initializers.lora_ga(G, RANK, oversample=INPUTS),
        "LoRA-GA as in PEFT": rlora.initializers.lora_ga(G, RANK, form="peft", oversample=INPUTS),
        "LoRA": rlora.initializers.gaussian(G, RANK),
    }
    U, S, Vt = backend.svd(G)
    best = (U[:, : 2 * RANK] * S[: 2 * RANK]) @ Vt[: 2 * RANK, :]
    found = {
        label: [sine(first_step(start.params, G, lr), best) for lr in LEARNING_RATES]
        for label, start in setting.track(list(starts.items()), "starts")
    }
    return Outcome(
        checks=(
            Check("sine at the smallest lr, LoRA-GA", found["LoRA-GA"][-1], "<=", ALONG),
            *(
                Check(f"sine at the smallest lr, {label}", found[label][-1], ">=", ASTRAY)
                for label in ("LoRA-GA as in PEFT", "LoRA")
            ),
        ),
        panels=(
            lines(
                "the first step from each start",
                ("learning rate", LEARNING_RATES),
                "sine of the angle to [G]_2r",
                found,
            ),
        ),
    )


def first_step(pair: Factors, G: Array, lr: float) -> Array:
    """Return the change of the product by gradient descent."""
    moved = rlora.apply_updates(pair, factor_gradients(pair, G), lr)
    return moved.B @ moved.A - pair.B @ pair.A


def sine(move: Array, direction: Array) -> float:
    """Sine of the angle between two matrices; sign apart."""
    rest = move - (move * direction).sum() / (direction**2).sum() * direction
    return float(((rest**2).sum() / (move**2).sum()) ** 0.5)


CLAIM = Claim(
    name="lora-ga-first-step",
    statement=(
        "From LoRA-GA's start the first step of gradient descent goes along the best approximation "
        "of the full gradient by rank 2r; from LoRA's start, or PEFT's form of it, it does not."
    ),
    source=(
        "S. Wang, L. Yu, J. Li. LoRA-GA: Low-Rank Adaptation with Gradient Approximation. "
        "arXiv:2407.05000, 2024"
    ),
    run=run,
)

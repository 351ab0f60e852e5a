"""The same layer with the preconditioner where the published code has it: before Adam."""

from typing import Final

from .claim import Check, Claim, Outcome, Setting
from .feature_learning_adam import ADAM, AFTER, BEFORE, measure
from .widths import PARTS, STABLE, exponent, panels

LEARNERS: Final = {
    "before Adam, as published": BEFORE,
    "after Adam, as proved": AFTER,
    "Adam": ADAM,
}


def run(setting: Setting) -> Outcome:
    """Exponents of the width in the fourth step: what the claim would need, part by part."""
    widths, found = measure(setting, LEARNERS)
    published = found["before Adam, as published"]
    return Outcome(
        tuple(
            Check(f"{part}: exponent of the width", abs(exponent(widths, sizes)), "<=", STABLE)
            for part, sizes in zip(PARTS, published, strict=True)
        ),
        panels(widths, found, "fourth step"),
    )


CLAIM: Final = Claim(
    "feature-learning-published",
    "Scaled AdamW as published, with the preconditioner before Adam, moves the output by an amount "
    "that does not depend on the width.",
    "F. Zhang, M. Pilanci. Riemannian Preconditioned LoRA for Fine-Tuning Foundation Models. "
    "arXiv:2402.02347, 2024. Theorem 4.1 read for Algorithm 1; its proof has the preconditioner "
    "after Adam, as the authors say.",
    run,
    holds=False,
)

"""Scaled gradient descent against gradient descent."""

from functools import partial
from typing import Final

import rlora

from .claim import Claim
from .learning_rates import Contest, compare

CONTEST: Final = Contest(
    "no moments",
    ("GD", rlora.chain()),  # an empty chain: the gradients themselves
    ("scaled GD", rlora.scaled_sgd(damping=1e-6, damping_mode="relative")),
    (-2.5, 1.0),
)

CLAIM = Claim(
    name="learning-rate-sgd",
    statement=(
        "Of scaled gradient descent's learning rates a wider range is good than of gradient "
        "descent's, on a small real task."
    ),
    source=(
        "F. Zhang, M. Pilanci. Riemannian Preconditioned LoRA for Fine-Tuning Foundation Models. "
        "arXiv:2402.02347, 2024. Abstract"
    ),
    run=partial(compare, contest=CONTEST),
)

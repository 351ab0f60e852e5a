"""Scaled AdamW as published, preconditioner before Adam, against AdamW: the range is no wider.

The claim is documented as failing. Adam divides by the root of the mean square of what it is given:
from B = 0 the first preconditioned gradients of A are by far the largest, and with the usual betas
they stay in that mean for long. The authors' own betas, (0.7, 0.8), forget them; they are shown
too, and AdamW gains as much from them.
"""

from functools import partial
from typing import Final

import rlora

from .claim import Claim
from .learning_rates import adamw_contest, compare

PUBLISHED: Final = partial(
    rlora.scaled_adamw, placement="before", damping=1e-6, damping_mode="relative"
)
USUAL, FAST = (
    adamw_contest("scaled AdamW", PUBLISHED, betas) for betas in ((0.9, 0.999), (0.7, 0.8))
)

CLAIM = Claim(
    name="learning-rate-adamw",
    statement=(
        "Of scaled AdamW's learning rates, with the preconditioner before Adam as published, a "
        "wider range is good than of AdamW's, with betas (0.9, 0.999) on a small real task."
    ),
    source=(
        "F. Zhang, M. Pilanci. Riemannian Preconditioned LoRA for Fine-Tuning Foundation Models. "
        "arXiv:2402.02347, 2024. Abstract and algorithm 1"
    ),
    run=partial(compare, contest=USUAL, beside=(FAST,)),
    holds=False,
)

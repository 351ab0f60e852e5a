"""Scaled AdamW with half powers of the preconditioner on both sides of Adam, against AdamW.

Adam sees a gradient whose size does not depend on that of B, and what it makes of it is scaled
back. The damping is relative and as small as the authors': nothing has been tuned for this task.
The claim is about the usual betas. With (0.7, 0.8), shown too, the valley is as flat, but AdamW
gains more from these: by this measure a tenth of a decade is left, which is none.
"""

from functools import partial
from typing import Final

import rlora

from .claim import Claim
from .learning_rates import adamw_contest, compare

BOTH: Final = partial(rlora.scaled_adamw, placement="both", damping=1e-6, damping_mode="relative")
USUAL, FAST = (
    adamw_contest("scaled AdamW, both", BOTH, betas) for betas in ((0.9, 0.999), (0.7, 0.8))
)

CLAIM = Claim(
    name="learning-rate-both",
    statement=(
        "Of scaled AdamW's learning rates, with half powers of the preconditioner on both sides of "
        "Adam, a wider range is good than of AdamW's, with betas (0.9, 0.999) on a small real "
        "task."
    ),
    source=(
        "After F. Zhang, M. Pilanci. Riemannian Preconditioned LoRA for Fine-Tuning Foundation "
        "Models. arXiv:2402.02347, 2024. This placement is not in the paper"
    ),
    run=partial(compare, contest=USUAL, beside=(FAST,)),
)

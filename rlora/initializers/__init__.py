"""Starts of A and B: from the gradient G of the loss at W0, from W0, from inputs, or random.

Matrices are (..., m, n) of any real floating dtype; leading axes are a stack of equal layers.
Factors come in at least float32. ``[M]_r`` is the best approximation of M by rank r, and
``U S Vᵀ`` its singular value decomposition. No entry is read: NaN and inf end as NaN or as the
library's own error. Under torch, call inside ``torch.no_grad()``.
"""

from rlora.initializers.gradient import loi, lora_ga, lora_one, lora_sb
from rlora.initializers.inputs import eva
from rlora.initializers.random import gaussian, init_ab, orthogonal
from rlora.initializers.start import Start
from rlora.initializers.svd import randomized_svd
from rlora.initializers.weight import goat, goat_scaling, milora, olora, pissa

__all__ = [
    "Start",
    "eva",
    "gaussian",
    "goat",
    "goat_scaling",
    "init_ab",
    "loi",
    "lora_ga",
    "lora_one",
    "lora_sb",
    "milora",
    "olora",
    "orthogonal",
    "pissa",
    "randomized_svd",
]

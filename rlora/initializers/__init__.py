"""Spectral starts of A and B, from the gradient G of the loss by W at W0, or from W0 itself.

Matrices are (..., m, n) of any real floating dtype; leading axes are a stack of equal layers.
Factors come in at least float32. ``[M]_r`` is the best approximation of M by rank r, and
``U S Vᵀ`` its singular value decomposition. No entry is read: NaN and inf end as NaN or as the
library's own error. Under torch, call inside ``torch.no_grad()``.
"""

from rlora.initializers.gradient import loi, lora_ga, lora_one, lora_sb
from rlora.initializers.start import Start
from rlora.initializers.svd import randomized_svd
from rlora.initializers.weight import gaussian, goat, goat_scaling, pissa

__all__ = [
    "Start",
    "gaussian",
    "goat",
    "goat_scaling",
    "loi",
    "lora_ga",
    "lora_one",
    "lora_sb",
    "pissa",
    "randomized_svd",
]

"""Claims of the papers, each in a file that reads like its recipe."""

import importlib
from typing import Final

from .claim import Claim

CLAIMS: Final = {
    "condition-number": ".condition_number",
    "damping": ".damping",
    "convex-relu": ".convex_relu",
    "feature-learning": ".feature_learning",
    "feature-learning-adam": ".feature_learning_adam",
    "feature-learning-published": ".feature_learning_published",
    "invariance": ".invariance",
    "rite-imbalance": ".rite_imbalance",
}
"""Claim -> the module whose ``CLAIM`` it is, imported when it is asked for."""


def load(name: str) -> Claim:
    """The claim of this name."""
    claim: Claim = importlib.import_module(CLAIMS[name], __package__).CLAIM
    return claim

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
    "lora-one-alignment": ".lora_one_alignment",
    "lora-one-start": ".lora_one_start",
    "lora-one-preconditioned": ".lora_one_preconditioned",
    "lora-ga-first-step": ".lora_ga_first_step",
    "lora-pro-optimality": ".lora_pro_optimality",
    "lora-plus-gauge": ".lora_plus_gauge",
    "rac-lora-rate": ".rac_lora_rate",
    "learning-rate-sgd": ".learning_rate_sgd",
    "learning-rate-adamw": ".learning_rate_adamw",
    "learning-rate-both": ".learning_rate_both",
    "gradient-flow": ".gradient_flow",
    "gradient-rank": ".gradient_rank",
}
"""Claim -> the module whose ``CLAIM`` it is, imported when it is asked for."""


def load(name: str) -> Claim:
    """The claim of this name."""
    claim: Claim = importlib.import_module(CLAIMS[name], __package__).CLAIM
    return claim

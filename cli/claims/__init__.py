"""Claims of the papers, each in a file that reads like its recipe."""

from typing import Final

from . import (
    convex_relu,
    factorisation,
    feature_learning,
    gradient_flow,
    gradient_rank,
    invariance,
    learning_rates,
    lora_ga_first_step,
    lora_one,
    lora_pro_optimality,
    rac_lora_rate,
    splits,
)

CLAIMS: Final = {
    claim.name: claim
    for claim in (
        factorisation.CONDITION,
        factorisation.DAMPING,
        convex_relu.CLAIM,
        *feature_learning.CLAIMS,
        invariance.CLAIM,
        splits.IMBALANCE,
        *lora_one.CLAIMS,
        lora_ga_first_step.CLAIM,
        lora_pro_optimality.CLAIM,
        splits.RATIO,
        rac_lora_rate.CLAIM,
        *learning_rates.CLAIMS,
        gradient_flow.CLAIM,
        gradient_rank.CLAIM,
    )
}

"""One file per published method. No method imports another."""

from rlora.methods.adapre import adapre_lora
from rlora.methods.alt import alt_lora, alt_lora_plus
from rlora.methods.balanced import balanced_lora
from rlora.methods.fa import lora_fa
from rlora.methods.factor_muon import factor_muon
from rlora.methods.graft import graft_adamw
from rlora.methods.loft import loft
from rlora.methods.muon import lora_muon
from rlora.methods.op import op_lora
from rlora.methods.plus import lora_plus
from rlora.methods.pro import lora_pro_adamw, lora_pro_sgd
from rlora.methods.prodigy import scaled_prodigy
from rlora.methods.rac import rac_lora
from rlora.methods.ref import ref_lora
from rlora.methods.riemannion import riemannion
from rlora.methods.rite import lora_rite
from rlora.methods.sb import lora_sb
from rlora.methods.scaled import scaled_adamw, scaled_sgd
from rlora.methods.stable import stable_lora
from rlora.methods.trust_region import trust_region

__all__ = [
    "adapre_lora",
    "alt_lora",
    "alt_lora_plus",
    "balanced_lora",
    "factor_muon",
    "graft_adamw",
    "loft",
    "lora_fa",
    "lora_muon",
    "lora_plus",
    "lora_pro_adamw",
    "lora_pro_sgd",
    "lora_rite",
    "lora_sb",
    "op_lora",
    "rac_lora",
    "ref_lora",
    "riemannion",
    "scaled_adamw",
    "scaled_prodigy",
    "scaled_sgd",
    "stable_lora",
    "trust_region",
]

"""torch.optim optimizers for LoRA pairs: change one line of a training loop.

>>> import torch, rlora.torch
>>> model = torch.nn.Module()
>>> model.lora_A = torch.nn.Parameter(torch.randn(4, 16) / 4)
>>> model.lora_B = torch.nn.Parameter(torch.zeros(32, 4))
>>> optimizer = rlora.torch.ScaledAdamW(model, lr=1e-3)
"""

from rlora.pairing import PairReport
from rlora.torch.params import find_pairs
from rlora.torch.scaled import ScaledAdamW, ScaledSGD
from rlora.torch.wrap import precondition

__all__ = ["PairReport", "ScaledAdamW", "ScaledSGD", "find_pairs", "precondition"]

"""torch.optim optimizers for LoRA pairs: change one line of a training loop.

`ScaledAdamW` and `ScaledSGD` run torch's own kernels on preconditioned gradients. Every other
method of `rlora.methods` has a class of its name here, such as ``LoRARite``, ``LoRAProAdamW`` and
``Riemannion``; `optimizer_class` makes one of a method of your own.

>>> import torch, rlora.torch
>>> model = torch.nn.Module()
>>> model.lora_A = torch.nn.Parameter(torch.randn(4, 16) / 4)
>>> model.lora_B = torch.nn.Parameter(torch.zeros(32, 4))
>>> optimizer = rlora.torch.ScaledAdamW(model, lr=1e-3)
"""

from rlora.core.errors import not_installed as _not_installed

try:
    import torch as _torch  # noqa: F401  before what needs it
except ModuleNotFoundError as _error:
    if _error.name != "torch":  # it is there, and broken
        raise
    raise _not_installed(_error.name, extra="torch") from _error

from rlora.pairing import PairReport
from rlora.torch import method_classes
from rlora.torch.init.gradients import full_gradients
from rlora.torch.init.initialize import InitReport, initialize
from rlora.torch.init.offsets import (
    Offset,
    load_offsets,
    restore_offsets,
    save_offsets,
)
from rlora.torch.init.plain_lora import as_plain_lora
from rlora.torch.init.round_adapter import round_adapter
from rlora.torch.init.sd_lora import SDLoRALinear, add_sd_lora, parameter_groups
from rlora.torch.init.suggest_lr import suggest_lr
from rlora.torch.method_classes import *  # noqa: F403  (as many as there are methods)
from rlora.torch.monitor.format import diagnostics_table, findings, log_diagnostics
from rlora.torch.optimizers.factory import optimizer_class, precondition
from rlora.torch.optimizers.scaled import ScaledAdamW, ScaledSGD
from rlora.torch.pairing.discovery import find_pairs
from rlora.torch.pairing.sharding_checks import shard_placement

__all__ = [
    "InitReport",
    "Offset",
    "PairReport",
    "SDLoRALinear",
    "ScaledAdamW",
    "ScaledSGD",
    "add_sd_lora",
    "as_plain_lora",
    "diagnostics_table",
    "find_pairs",
    "findings",
    "full_gradients",
    "initialize",
    "load_offsets",
    "log_diagnostics",
    "optimizer_class",
    "parameter_groups",
    "precondition",
    "restore_offsets",
    "round_adapter",
    "save_offsets",
    "shard_placement",
    "suggest_lr",
]

__all__ += method_classes.__all__
__all__.sort()

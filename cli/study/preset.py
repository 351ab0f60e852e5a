"""Settings of a paper, or of the code beside it: methods of its own for a large model."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import nn

import rlora.torch

from .methods import Method


class ExperimentPreset(NamedTuple):
    """Settings of one experiment, as published."""

    rank: int
    alpha: int
    dropout: float
    """Dropout before an adapter, in training."""

    batch: int
    epochs: int
    optimizers: Mapping[str, Mapping[str, Any]]
    """Class of rlora.torch or torch.optim -> its arguments."""

    @property
    def adapters(self) -> dict[str, Any]:
        """Arguments of PEFT's LoraConfig but for the rank and the layers."""
        return {"lora_alpha": self.alpha, "lora_dropout": self.dropout}

    def optimizer(self, name: str, model: nn.Module, lr: float) -> torch.optim.Optimizer:
        """One of the optimizers, over the trained parameters of a model."""
        trained = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
        kind = getattr(rlora.torch, name, None) or getattr(torch.optim, name)
        made: torch.optim.Optimizer = kind(trained, **{**self.optimizers[name], "lr": lr})
        return made

    def methods(self) -> dict[str, Method]:
        """Its optimizers, each with a sweep around the published learning rate."""
        return {f"paper-{name}": self._method(name) for name in self.optimizers}

    def _method(self, name: str) -> Method:
        lr = self.optimizers[name]["lr"]
        return Method(lambda model, rate: self.optimizer(name, model, rate), (lr / 2, lr, 2 * lr))

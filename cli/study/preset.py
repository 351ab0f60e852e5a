"""What a paper, or the code beside it, trained with."""

from collections.abc import Mapping
from typing import Any, Literal, NamedTuple

import torch
from torch import nn

import rlora.torch


class Preset(NamedTuple):
    """Settings of one experiment, as published."""

    source: str
    rank: int
    alpha: int
    dropout: float
    """Of what enters an adapter, in training."""

    batch: int
    epochs: int
    schedule: Literal["linear", "constant"]
    """What the learning rate does after the warm-up: fall to zero in a line, or stay."""

    warmup: int
    """Steps in which the learning rate rises."""

    optimizers: Mapping[str, Mapping[str, Any]]
    """Class of rlora.torch or torch.optim -> its arguments."""

    def steps(self, batches: int) -> int:
        """How many there are in all, with so many batches in an epoch."""
        return self.epochs * batches

    def optimizer(self, name: str, model: nn.Module) -> torch.optim.Optimizer:
        """One of the optimizers, over the trained parameters of a model."""
        trained = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
        kind = getattr(rlora.torch, name, None) or getattr(torch.optim, name)
        made: torch.optim.Optimizer = kind(trained, **self.optimizers[name])
        return made

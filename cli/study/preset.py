"""Settings of a paper, or of the code beside it: methods of its own for a large model."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import nn

import rlora.torch

from .methods import METHODS, Method, check_methods
from .workloads import LARGE, STACKED, check_dataset, module_of


class Preset(NamedTuple):
    """Settings of one experiment, as published."""

    source: str
    rank: int
    alpha: int
    dropout: float
    """Dropout before an adapter, in training."""

    batch: int
    epochs: int
    optimizers: Mapping[str, Mapping[str, Any]]
    """Class of rlora.torch or torch.optim -> its arguments."""

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


def preset_of(model: str, dataset: str) -> Preset | None:
    """Return the published settings of a large model; None for the others."""
    if model not in LARGE:
        return None
    preset: Preset = module_of(model).PRESETS[dataset]
    return preset


def methods_of(model: str, dataset: str) -> Mapping[str, Any]:
    """Those of the study, and for a large model the paper's own; a stacked one has others."""
    if model in STACKED:
        own: Mapping[str, Any] = module_of(model).METHODS
        return own
    preset = preset_of(model, dataset)
    return {**METHODS, **(preset.methods() if preset else {})}


def check_names(model: str, datasets: Sequence[str], methods: Sequence[str]) -> None:
    """ValueError unless the model has all of them: before the first run, not after hours."""
    for dataset in datasets:
        check_dataset(model, dataset)
        check_methods(methods, methods_of(model, dataset))

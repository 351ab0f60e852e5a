"""Base class of workloads for a GPU: a frozen base, adapters of PEFT in and out of it, batches."""

from collections.abc import Mapping, Sequence
from typing import Any, Final, Generic, TypeVar

import peft
import torch
from torch import nn

from .workload import Part

T = TypeVar("T")

ORDER_SEED: Final = 0
"""Seed of the draw that makes batches; a run shuffles the batches with its own seed."""


class PeftWorkload(Generic[T]):
    """A base model and its batches; what a batch costs and how answers score is for the heirs."""

    def __init__(
        self, base: Any, adapters: Mapping[str, Any], batches: Mapping[Part, Sequence[T]]
    ) -> None:
        self.base, self.adapters = base.requires_grad_(False), adapters
        self._batches = batches

    def adapted(self, rank: int, seed: int) -> nn.Module:
        """Put new adapters into the base: the same for the same seed."""
        torch.manual_seed(seed)
        return peft.get_peft_model(self.base, peft.LoraConfig(r=rank, **self.adapters))

    def release(self, model: Any) -> None:
        """Take the adapters out of the base again."""
        model.unload()

    def batches(self, part: Part) -> Sequence[T]:
        """All batches of a part, on the device; those of training are drawn once."""
        return self._batches[part]


def set_mode(model: nn.Module) -> bool:
    """Train where gradients are wanted, with dropout, and evaluate where not; says which."""
    training = torch.is_grad_enabled()
    model.train(training)
    return training


def shuffled(items: Sequence[T]) -> list[T]:
    """In an order that is always the same."""
    generator = torch.Generator().manual_seed(ORDER_SEED)
    return [items[i] for i in torch.randperm(len(items), generator=generator).tolist()]


def cut(items: Sequence[T], size: int) -> list[Sequence[T]]:
    """Into pieces, of which the last may be shorter."""
    return [items[i : i + size] for i in range(0, len(items), size)]

"""Base class of what a run trains on: a frozen model, adapters in and out of it, and batches."""

import importlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from io import BytesIO
from pathlib import Path
from typing import Any, Final, Generic, Literal, TypeVar

import torch
from torch import Tensor, nn

from rlora.cli.records import write_bytes

T = TypeVar("T")
Part = Literal["train", "validation", "test"]

ORDER_SEED: Final = 0
"""Seed of the draw that makes batches; a run shuffles the batches with its own seed."""


class Workload(ABC, Generic[T]):
    """A base into which fresh adapters are put for every run, and the batches of a task.

    The learning rate is chosen on the part "validation"; "test" is read for what was chosen.
    """

    def __init__(
        self, base: Any, adapters: Mapping[str, Any], parts: Mapping[Part, Sequence[T]]
    ) -> None:
        """Take a model, arguments of PEFT's LoraConfig, and all batches of each part."""
        self.base, self.adapters, self.parts = base.requires_grad_(False), adapters, parts

    def adapted(self, rank: int, seed: int) -> nn.Module:
        """Put new adapters into the base: the same for the same seed, alpha = 2 r if not given."""
        peft = importlib.import_module("peft")
        torch.manual_seed(seed)
        config = peft.LoraConfig(r=rank, **{"lora_alpha": 2 * rank, **self.adapters})
        made: nn.Module = peft.get_peft_model(self.base, config)
        return made

    def release(self, model: Any) -> None:
        """Take the adapters out of the base again."""
        model.unload()

    @abstractmethod
    def loss(self, model: nn.Module, batch: T) -> Tensor:
        """Mean over what counts in the batch."""

    @abstractmethod
    def weight(self, batch: T) -> int:
        """Return the number of terms in that mean."""

    @abstractmethod
    def scores(self, model: nn.Module, part: Part) -> dict[str, float]:
        """Return the scores of the task, beside the loss."""


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


def remembered(file: Path | None, make: Callable[[], Any], device: torch.device) -> Any:
    """Tensors from a file, or made now and put there, whole or not at all."""
    if file is not None and file.exists():
        try:
            return torch.load(file, weights_only=True, map_location=device)
        except (OSError, torch.OutOfMemoryError):  # no fault of the file
            raise
        except Exception as error:  # a damaged file raises one of many
            reason = str(error).partition("\n")[0]
            msg = f"{file} is broken ({reason}): delete it, and it will be made again"
            raise ValueError(msg) from error
    made = make()
    if file is not None:
        file.parent.mkdir(parents=True, exist_ok=True)
        whole = BytesIO()
        torch.save(made, whole)
        write_bytes(file, whole.getvalue())
    return made

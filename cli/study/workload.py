"""Protocol of what a run trains on: a base model with its data."""

from collections.abc import Sequence
from typing import Any, Literal, Protocol

from torch import Tensor, nn

Part = Literal["train", "validation", "test"]


class Workload(Protocol):
    """A base model into which fresh adapters are put for every run, and its task.

    The learning rate is chosen on the part "validation"; "test" is read for what was chosen.
    """

    def adapted(self, rank: int, seed: int) -> nn.Module:
        """Put new LoRA adapters into the base: the same for the same seed."""
        ...

    def release(self, model: nn.Module) -> None:
        """Take the adapters out of the base again."""
        ...

    def batches(self, part: Part) -> Sequence[Any]:
        """All batches of a part."""
        ...

    def loss(self, model: nn.Module, batch: Any) -> Tensor:
        """Mean over what counts in the batch."""
        ...

    def weight(self, batch: Any) -> int:
        """Return the number of terms in that mean."""
        ...

    def scores(self, model: nn.Module, part: Part) -> dict[str, float]:
        """Return the scores of the task, beside the loss."""
        ...

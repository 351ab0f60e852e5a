"""A small network on pictures of digits: runs of a second, for studies with many seeds."""

from pathlib import Path
from typing import Any, Final, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from .workload import Part, Workload

DATASETS: Final = ("even", "rotated")
WIDTH: Final = 256
BATCH: Final = 64
PRETRAINING: Final = 300
"""Steps of the base."""

SHARES: Final[dict[Part, float]] = {"train": 0.5, "validation": 0.25, "test": 0.25}


class Batch(NamedTuple):
    """Pictures (batch, 64), from 0 to 1, and their digits."""

    pictures: Tensor
    digits: Tensor


class DigitsWorkload(Workload[Batch]):
    """Two hidden layers, taught some pictures; adapters everywhere are taught others."""

    def __init__(self, known: Batch, new: Batch) -> None:
        super().__init__(pretrained(known), {"target_modules": ["0", "2", "4"]}, batches(new))

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """Mean cross-entropy over ten digits."""
        return functional.cross_entropy(model(batch.pictures), batch.digits)

    def weight(self, batch: Batch) -> int:
        """Pictures."""
        return len(batch.digits)

    @torch.no_grad()
    def scores(self, model: nn.Module, part: Part) -> dict[str, float]:
        """Accuracy."""
        right = [model(x).argmax(-1) == digits for x, digits in self.parts[part]]
        return {"accuracy": float(torch.cat(right).double().mean())}


def load(dataset: str, *, kept: Path | None = None, quick: bool = False) -> DigitsWorkload:
    """The base knows odd digits and is taught even ones, or upright ones and is taught turned ones.

    Nothing is slow enough to be kept in a file or to need a quick version.
    """
    pictures, digits = read()
    if dataset == "rotated":
        turned = pictures.reshape(-1, 8, 8).rot90(1, (1, 2)).reshape(-1, 64)
        return DigitsWorkload(Batch(pictures, digits), Batch(turned, digits))
    odd = digits % 2 == 1
    return DigitsWorkload(Batch(pictures[odd], digits[odd]), Batch(pictures[~odd], digits[~odd]))


def read() -> tuple[Tensor, Tensor]:
    """The 1797 pictures that come with scikit-learn, in an order of their own."""
    from sklearn.datasets import load_digits

    data = load_digits()
    order = torch.randperm(len(data.target), generator=torch.Generator().manual_seed(0))
    pictures = torch.tensor(data.data, dtype=torch.float32)[order] / 16
    return pictures, torch.tensor(data.target)[order]


def pretrained(known: Batch) -> nn.Module:
    """The base, always the same."""
    torch.manual_seed(0)
    model = nn.Sequential(
        *(nn.Linear(64, WIDTH), nn.ReLU(), nn.Linear(WIDTH, WIDTH), nn.ReLU()),
        nn.Linear(WIDTH, 10),
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)
    for _ in range(PRETRAINING):
        drawn = torch.randint(len(known.digits), (BATCH,))
        loss = functional.cross_entropy(model(known.pictures[drawn]), known.digits[drawn])
        cast("Any", loss).backward()
        optimizer.step()
        optimizer.zero_grad()
    return model


def batches(data: Batch) -> dict[Part, list[Batch]]:
    """The three parts, `BATCH` pictures at a time."""
    sizes = [int(share * len(data.digits)) for share in SHARES.values()]
    parts = zip(*(torch.split(x[: sum(sizes)], sizes) for x in data), strict=True)
    return {
        name: [Batch(*x) for x in zip(*(torch.split(y, BATCH) for y in part), strict=True)]
        for name, part in zip(SHARES, parts, strict=True)
    }

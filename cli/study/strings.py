"""Tasks on strings of digits: seven that a small transformer knows, and others for adapters.

Every prompt has one right answer of the same length, by a rule of one line.
"""

from collections.abc import Callable, Mapping
from functools import cache
from typing import Final, NamedTuple

import torch
from torch import Tensor

from .workload import Part

DIGITS: Final = 10
LENGTH: Final = 6
"""Digits of a prompt, and of an answer."""

EQUALS: Final = DIGITS
"""Token between prompt and answer; those of the tasks come after it."""

CIPHER: Final = (3, 8, 1, 9, 0, 6, 2, 5, 7, 4)
"""Digit -> the digit that stands for it."""

EXCHANGED: Final = (2, 1, 0, 3, 4, 5, 6, 7, 8, 9)
"""The same, for two digits that change places: a difference of rank one."""

Rule = Callable[[Tensor], Tensor]

KNOWN: Final[Mapping[str, Rule]] = {
    "copy": lambda x: x,
    "reverse": lambda x: x.flip(1),
    "rise": lambda x: x.sort(1).values,
    "increment": lambda x: (x + 1) % DIGITS,
    "rotate": lambda x: x.roll(-1, 1),
    "halves": lambda x: x.roll(LENGTH // 2, 1),
    "highest": lambda x: x.cummax(1).values,
}
"""Tasks that the base learns: prompts (n, LENGTH) to answers of the same shape."""

NEW: Final[Mapping[str, Rule]] = {
    "fall": lambda x: x.sort(1, descending=True).values,
    "cipher": lambda x: torch.tensor(CIPHER)[x],
    "reverse_plus_three": lambda x: (x.flip(1) + 3) % DIGITS,
    "lowest": lambda x: x.cummin(1).values,
    "exchange": lambda x: torch.tensor(EXCHANGED)[x],
}
"""Tasks for adapters."""

TOKENS: Final = {name: EQUALS + 1 + i for i, name in enumerate((*KNOWN, *NEW))}
"""Task -> the token that asks for it; new ones keep the embedding they were drawn with."""

VOCABULARY: Final = EQUALS + 1 + len(TOKENS)
SEED: Final = 20261126


class Dataset(NamedTuple):
    """A task, and what is unusual about learning it."""

    task: str
    examples: int = 4096
    """Number of them for training."""

    noise: float = 0.0
    """Share of the digits in training answers that are drawn at random instead."""

    base: str = "small"
    """The base, by its name in `stacks.BASES`."""

    widened: int = 1
    """Times that each hidden unit of the second block stands beside itself."""

    scaling: float = 2.0
    """The s = alpha / r of ``W + s B A``, at every rank."""

    start: float = 1.0
    """Factor on the A that a run starts with."""

    dtype: torch.dtype = torch.float32
    """Dtype of the factors."""

    batch: int = 8
    """Strings in a training step."""

    @property
    def kind(self) -> "Dataset":
        """The same for datasets whose runs can be trained at once: one base, s, dtype and batch."""
        return self._replace(task="", examples=0, noise=0.0, start=1.0)


SCALINGS: Final = (0.5, 1.0, 8.0)
"""The s of datasets beside the usual one."""

DATASETS: Final[Mapping[str, Dataset]] = {
    **{task: Dataset(task) for task in NEW},
    "fall-few": Dataset("fall", examples=192),
    "cipher-noisy": Dataset("cipher", noise=0.1),
    "reverse_plus_three-wide": Dataset("reverse_plus_three", widened=4),
    "fall-large-start": Dataset("fall", start=8.0),
    "fall-small-start": Dataset("fall", start=1 / 8),
    "fall-bfloat16": Dataset("fall", dtype=torch.bfloat16),
    "cipher-noisy-batch-2": Dataset("cipher", noise=0.1, batch=2),
    "lowest-batch-2": Dataset("lowest", batch=2),
    "fall-batch-2": Dataset("fall", batch=2),
    "fall-batch-32": Dataset("fall", batch=32),
    **{f"fall-scaling-{s:g}": Dataset("fall", scaling=s) for s in SCALINGS},
    **{f"fall-width-{width}": Dataset("fall", base=f"width-{width}") for width in (128, 256)},
    **{f"{task}-large": Dataset(task, base="large") for task in ("fall", "reverse_plus_three")},
    "cipher-noisy-large": Dataset("cipher", noise=0.1, base="large"),
}
HELD_OUT: Final = 256
"""Prompts of the validation part, and of the test part."""


class Examples(NamedTuple):
    """Strings as the model reads them, (..., n, 2 LENGTH + 1), and answers (..., n, LENGTH)."""

    tokens: Tensor
    answers: Tensor


def examples_of(task: str, prompts: Tensor, answers: Tensor) -> Examples:
    """The task's token, prompt, equals sign, and the answer without its last digit."""
    count = len(prompts)
    ask, equals = (torch.full((count, 1), token) for token in (TOKENS[task], EQUALS))
    return Examples(torch.cat([ask, prompts, equals, answers[:, :-1]], 1), answers)


def digits_of(numbers: Tensor) -> Tensor:
    """Numbers (n,) as prompts (n, LENGTH)."""
    return numbers[:, None] // DIGITS ** torch.arange(LENGTH) % DIGITS


@cache
def parts_of(dataset: Dataset) -> Mapping[Part, Examples]:
    """The parts, which share no prompt; only answers for training are noisy."""
    generator = torch.Generator().manual_seed(SEED)
    prompts = digits_of(torch.randperm(DIGITS**LENGTH, generator=generator))
    sizes: dict[Part, int] = {"validation": HELD_OUT, "test": HELD_OUT, "train": dataset.examples}
    pieces = torch.split_with_sizes(prompts[: sum(sizes.values())], list(sizes.values()))
    parts = {}
    for part, mine in zip(sizes, pieces, strict=True):
        answers = NEW[dataset.task](mine)
        if part == "train" and dataset.noise:
            drawn = torch.randint(DIGITS, answers.shape, generator=generator)
            wrong = torch.rand(answers.shape, generator=generator) < dataset.noise
            answers = torch.where(wrong, drawn, answers)
        parts[part] = examples_of(dataset.task, mine, answers)
    return parts


def mixture(count: int, generator: torch.Generator) -> Examples:
    """So many new strings of every known task, to train the base on."""
    made = []
    for task, rule in KNOWN.items():
        prompts = torch.randint(DIGITS, (count, LENGTH), generator=generator)
        made.append(examples_of(task, prompts, rule(prompts)))
    return Examples(*map(torch.cat, zip(*made, strict=True)))

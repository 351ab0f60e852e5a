"""Losses of strings at equal seconds: what a slower step takes off the length of a run."""

import math
from collections.abc import Mapping
from typing import Any, Final, NamedTuple

from .sweeps import Sweeps

TIMED: Final[Mapping[str, str]] = {
    "adamw-fast": "adamw",
    "scaled": "scaled_adamw",
    "lora-rite-fast": "lora_rite",
}
"""Method of the study -> the same in a record of `rlora bench run --end-to-end`; AdamW first."""

RANK: Final = 4
"""The rank whose runs have several lengths."""

LENGTHS: Final = (300, 1000)
"""Steps of AdamW."""

SHORTER: Final = 160
"""Steps of the runs below them."""


class Times(NamedTuple):
    """Seconds of one training step."""

    step: float
    """That of the optimizer."""

    rest: float
    """Forward and backward."""

    @property
    def whole(self) -> float:
        """All of it."""
        return self.step + self.rest


def times_of(record: Mapping[str, Any]) -> dict[str, Times]:
    """Times of each method of `TIMED`, from a record of the benchmark."""
    rows = {row["method"]: row for row in record["rows"]}
    return {
        name: Times(rows[timed]["median_s"], rows[timed]["forward_backward_s"])
        for name, timed in TIMED.items()
    }


def at_steps(losses: Mapping[int, float], steps: float) -> float:
    """The loss at a number of steps, on a line between its neighbours: logarithm by logarithm."""
    low = max(n for n in losses if n <= steps)
    if low == steps:
        return losses[low]
    high = min(n for n in losses if n > steps)
    share = math.log(steps / low) / math.log(high / low)
    return math.exp((1 - share) * math.log(losses[low]) + share * math.log(losses[high]))


def by_seconds(sweeps: Sweeps, record: Mapping[str, Any]) -> list[str]:
    """Losses at equal steps and at equal seconds, of tasks with all methods in all lengths."""
    times = times_of(record)
    unit = next(iter(times.values())).whole
    lengths: dict[str, dict[int, Mapping[str, float]]] = {}
    for (dataset, rank, steps), group in sweeps.items():
        if rank == RANK and set(times) <= set(group):
            lengths.setdefault(dataset, {})[steps] = {x: group[x].lowest for x in times}
    tasks = [name for name, runs in lengths.items() if {SHORTER, *LENGTHS} <= set(runs)]
    rows = []
    for steps in LENGTHS if tasks else ():
        for name, time in times.items():
            fewer, cells = steps * (unit / time.whole), []
            for task in tasks:
                losses = {n: found[name] for n, found in lengths[task].items()}
                then = f"{at_steps(losses, fewer):.4f}" if fewer >= SHORTER else "-"
                cells.append(f"{losses[steps]:.4f}; {then}")
            share = f"{time.step / time.whole:.1%}"
            rows.append([f"`{name}`", share, f"{steps}; {fewer:.0f}", *cells])
    caption = (
        "Validation loss, nats a digit, at the best rate: at equal steps; at equal seconds.\n"
        "Share: the optimizer's of a training step."
    )
    heads = [f"`{task}`" for task in tasks]
    table = (["method", "share", "steps", *heads], ["---"] * (3 + len(heads)), *rows)
    lines = [f"| {' | '.join(cells)} |" for cells in table]
    return [f"*{caption}*", "", *lines] if rows else []

"""Width of the range of good learning rates: two methods on the task of `digits`.

A learning rate is good where the final validation loss is at most twice the best that either method
has with this seed, so that a method which is nowhere good has no wide range of being so. The range
is counted in decades for each seed; what counts is the median difference over the seeds.
"""

from collections.abc import Callable, Sequence
from typing import Final, NamedTuple

import numpy as np

import rlora
from rlora import Transform
from rlora.core.moments import scale_by_adam

from .claim import Check, Curve, Outcome, Panel, Setting
from .digits import Numbers, Task, make_task

GOOD: Final = 2.0
"""A tenth above the best would be stricter, but the loss still falls fast there: of any method one
or two neighbours in the grid pass, and widths differ by chance. The verdicts are the same with 1.5
and 3."""

WIDER: Final = 0.25
"""Decades, in the median: one step of the grid, two of the fine one."""

SPACING, FINE_SPACING = 0.25, 0.125
"""Decades between neighbours, in the quick and in the full experiment."""


class Contest(NamedTuple):
    """A method against the plain one.

    Parameters
    ----------
    title : str
        What they have in common.
    plain, scaled : tuple of str and Transform
        A label and a method.
    exponents : tuple of float
        Of the smallest and largest learning rate: beyond both, neither method is good.
    """

    title: str
    plain: tuple[str, Transform]
    scaled: tuple[str, Transform]
    exponents: tuple[float, float]


def adamw_contest(
    label: str, scaled: Callable[..., Transform], betas: tuple[float, float]
) -> Contest:
    """A scaled AdamW against AdamW with the same betas, none with decay."""
    b1, b2 = betas
    return Contest(
        f"betas {betas}",
        ("AdamW", rlora.chain(scale_by_adam(b1, b2))),
        (label, scaled(b1=b1, b2=b2, weight_decay=0.0)),
        (-3.0, 0.5),
    )


def compare(setting: Setting, contest: Contest, beside: Sequence[Contest] = ()) -> Outcome:
    """The median gain in width of a contest, and the losses over the learning rates.

    The contests beside it are drawn and not judged, and left out of the quick experiment.
    """
    task = make_task(setting, seeds=3 if setting.quick else 8)
    spacing = SPACING if setting.quick else FINE_SPACING
    drawn = (contest,) if setting.quick else (contest, *beside)
    found = [sweep(task, x, rates(x, spacing)) for x in drawn]
    panels = tuple(
        panel(x.title, rates(x, spacing), losses) for x, losses in zip(drawn, found, strict=True)
    )
    plain, scaled = (spacing * x for x in good(found[0]))
    what = f"{contest.title}: decades more than {np.median(plain):.2g} of {contest.plain[0]}"
    gain = float(np.median(scaled - plain))
    return Outcome((Check(what, gain, ">=", WIDER),), panels)


def rates(contest: Contest, spacing: float) -> Numbers:
    """The learning rates of a sweep."""
    low, high = contest.exponents
    return 10.0 ** np.arange(low, high + spacing / 2, spacing)


def sweep(task: Task, contest: Contest, learning_rates: Numbers) -> dict[str, Numbers]:
    """Final losses (learning rates, seeds) of both methods by their labels, the plain one first."""
    return {
        label: task.final_losses(method, learning_rates, label)
        for label, method in (contest.plain, contest.scaled)
    }


def good(losses: dict[str, Numbers]) -> list[Numbers]:
    """Count the good learning rates of each method (seeds)."""
    best = np.min([x.min(axis=0) for x in losses.values()], axis=0)
    return [np.sum(x <= GOOD * best, axis=0) for x in losses.values()]


def panel(title: str, learning_rates: Numbers, losses: dict[str, Numbers]) -> Panel:
    """Medians over the seeds, where they are finite."""
    curves = []
    for label, found in losses.items():
        medians = np.median(found, axis=1)
        seen = np.isfinite(medians)
        curves.append(Curve(label, learning_rates[seen].tolist(), medians[seen].tolist()))
    return Panel(title, "learning rate", "validation loss", tuple(curves), log_x=True)

"""Figures of `optimizer.diagnostics()` for people: a table, what they mean, and a Trainer's log."""

import importlib
import math
from collections.abc import Iterator, Mapping
from itertools import takewhile
from typing import Any

from rlora.torch.monitor.diagnostics import MARKS, MEASURES

NO_EFFECT = 0.01
"""An anisotropy below which a preconditioner counts as a multiple of the identity."""

THROWN = 2.0
"""Multiple of its own size that a factor may move before it counts as thrown away. From zero, the
second step of Adam is as long as the first: one time."""

GROWN = 6.0
"""Multiple of the reach of AdamW's steps that an entry may have before its factor counts as
growing. At a rate of 4e-3 over 1,000 steps it is at most 5.4 for `ScaledAdamW` and 0.85 for AdamW
(docs/reference/growth.md)."""

LOST = 0.5
"""Share of a factor's entries that a step may leave as they are."""

WIDTHS = {"A": "n, the inputs of the layer", "B": "m, the outputs of the layer"}

STANDSTILL = (
    "nothing has moved: lr is 0, or B is and the method moves A alone, as LoRASB does, which needs "
    "its start: rlora.torch.initialize(model, ..., method='lora_sb')"
)

NO_START = (
    "both factors are zero, and so are their gradients: no method leaves that, start A at random"
)


def diagnostics_table(numbers: Mapping[str, float]) -> Any:
    """Figures as a table for a terminal, with `findings` below it.

    Parameters
    ----------
    numbers : mapping of str to float
        From ``optimizer.diagnostics()``.

    Returns
    -------
    rich.table.Table
        To be printed by ``rich.print``: a line for each factor, in the first line of a pair the
        step of the product. The name of a layer goes over both; what all names have in common
        is left out of them and stands below the table.

    Raises
    ------
    TypeError, ValueError
        When `numbers` is something else, such as the optimizer.

    Examples
    --------
    >>> import rich, torch, rlora.torch
    >>> A, B = torch.eye(2, 3, requires_grad=True), torch.eye(4, 2, requires_grad=True)
    >>> optimizer = rlora.torch.ScaledSGD([A, B], lr=0.1, pairs=[(A, B)])
    >>> table = rlora.torch.diagnostics_table(optimizer.diagnostics())
    >>> table.row_count  # of the pair, and medians
    4
    """
    check_figures(numbers)
    rich, box = (importlib.import_module(f"rich.{name}") for name in ("table", "box"))
    table = rich.Table(box=box.SIMPLE_HEAD, caption_justify="left")
    table.add_column("pair", overflow="fold")
    table.add_column("")
    for name in ("cond", "damped", "anisotropy", "step", "of B A"):
        table.add_column(name, justify="right")
    table.add_column("marks")
    rows = pairs_in(numbers)
    before, after = in_common(list(rows))
    for name, row in rows.items():
        _add(table, name[len(before) : len(name) - len(after)], row)
    table.add_section()
    medians = {key: numbers.get(f"rlora/{key}/median", math.nan) for key in MEASURES}
    _add(table, f"median of {numbers['rlora/pairs']:.0f}", medians)
    left_out = [f"names are those in {before[:-1]}{after}"] if before else []
    table.caption = "\n".join((*left_out, *findings(numbers))) or None
    return table


def in_common(names: list[str]) -> tuple[str, str]:
    """The first parts and the adapter that all layers' names have in common."""
    adapters = {name[len(name.partition(" (")[0]) :] for name in names}
    layers = [name.partition(" (")[0].split(".")[:-1] for name in names]
    same = takewhile(lambda parts: len(set(parts)) == 1, zip(*layers, strict=False))
    before = "".join(f"{parts[0]}." for parts in same)
    return before, adapters.pop() if before and len(adapters) == 1 else ""


def _add(table: Any, name: str, row: Mapping[str, float]) -> None:
    """A line for each factor, and the step of the product in the first."""
    dot = name.rfind(".", 0, name.find(" (") if " (" in name else None) + 1
    names = (name[:dot] or name, name[dot:] if dot else "")
    for letter, part in zip("AB", names, strict=True):
        keys = [f"{key}_{letter}" for key in ("cond", "damped_cond", "anisotropy", "step")]
        keys.append("step" if letter == "A" else "")
        values = [row.get(key, math.nan) for key in keys]
        marks = [mark[:-2] for mark in MARKS if mark.endswith(letter) and row.get(mark)]
        cells = ["-" if math.isnan(x) else f"{x:.2g}" for x in values]
        table.add_row(part, letter, *cells, ", ".join(marks))


def findings(numbers: Mapping[str, float]) -> list[str]:
    """Everything out of the ordinary in the figures, in words.

    Parameters
    ----------
    numbers : mapping of str to float
        From ``optimizer.diagnostics()``; the summary is enough, but only figures of each pair
        tell the name of one.

    Returns
    -------
    list of str
        One sentence for each finding; none is a good sign.

    Raises
    ------
    TypeError, ValueError
        When `numbers` is something else, such as the optimizer.

    Examples
    --------
    >>> import torch, rlora.torch
    >>> A, B = torch.eye(2, 3, requires_grad=True), torch.zeros(4, 2, requires_grad=True)
    >>> optimizer = rlora.torch.ScaledSGD(
    ...     [A, B], lr=0.1, pairs=[(A, B)], damping_mode="relative"
    ... )
    >>> rlora.torch.findings(optimizer.diagnostics())[0]
    'B is zero or out of range: A stands still (1 of 1 pairs)'
    """
    check_figures(numbers)
    return list(_findings(numbers))


def check_figures(numbers: Any) -> None:
    """TypeError or ValueError unless these are figures of `diagnostics`."""
    if not isinstance(numbers, Mapping):
        given = "optimizer.diagnostics()" if hasattr(numbers, "diagnostics") else "its figures"
        msg = f"expected the figures of an optimizer, got {type(numbers).__name__}; give {given}"
        raise TypeError(msg)
    if "rlora/pairs" not in numbers:
        msg = (
            f"expected what optimizer.diagnostics() gives, with a key 'rlora/pairs', got keys "
            f"{', '.join(map(repr, list(numbers)[:3])) or 'none'}"
        )
        raise ValueError(msg)


def _findings(numbers: Mapping[str, float]) -> Iterator[str]:
    rows = pairs_in(numbers)
    steps = [numbers.get(f"rlora/{key}/max") for key in ("step", "step_A", "step_B")]
    if steps == [0.0, 0.0, 0.0] and numbers["rlora/no_grad_A/count"] < numbers["rlora/pairs"]:
        yield STANDSTILL
    none = [name for name, row in rows.items() if all(_is_zero(row, x) for x in "AB")]
    if none:
        yield f"{NO_START} ({len(none)} of {numbers['rlora/pairs']:.0f} pairs, first {none[0]})"
    for mine, other in (("B", "A"), ("A", "B")):
        if GROWN < (most := numbers.get(f"rlora/grown_{mine}/max", 0.0)) < math.inf:
            grown = max(rows, key=lambda name: _or_least(rows[name][f"grown_{mine}"]), default="")
            yield (
                f"{mine}{f' of {grown}' if grown else ''} has grown {most:.2g} times further than "
                f"AdamW's steps could have taken it"
            )
        if (most := numbers.get(f"rlora/lost_{mine}/max", 0.0)) > LOST:
            yield (
                f"a step has left {most:.0%} of {mine} as it was, lost in rounding: keep adapters "
                f"in float32, or bfloat16 ones at stochastic_rounding=True"
            )
        marks = {
            "bad_state": f"the state of {mine} has NaN or inf: {mine} has it too after a step",
            "wide": f"r is above {WIDTHS[mine]}: the Gram of {mine} is singular by its shape",
            "nan": f"{mine} has NaN: {other} has it too after a step",
            "skipped": f"{mine} is zero or out of range: {other} stands still",
            "damped": f"damping outweighs the smallest eigenvalue of the Gram of {mine}",
            "no_grad": f"{mine} has no gradient: it stands still",
        }
        for mark, sentence in marks.items():
            if count := numbers[f"rlora/{mark}_{mine}/count"]:
                first = [name for name, row in rows.items() if row[f"{mark}_{mine}"]][:1]
                where = f", first {first[0]}" if first and mark in ("bad_state", "wide") else ""
                yield f"{sentence} ({count:.0f} of {numbers['rlora/pairs']:.0f} pairs{where})"
        if numbers.get(f"rlora/anisotropy_{mine}/max", 1.0) < NO_EFFECT:
            yield (
                f"the damped Gram of {mine} is a multiple of the identity in all pairs: before "
                f"Adam it has no effect on {other}"
            )
        if THROWN < (most := numbers.get(f"rlora/step_{mine}/max", 0.0)) < math.inf:
            yield f"a step has moved {mine} by {most:.2g} times its own size"


def _is_zero(row: Mapping[str, float], letter: str) -> bool:
    return math.isnan(row[f"cond_{letter}"]) and not row[f"nan_{letter}"]


def _or_least(x: float) -> float:
    return -math.inf if math.isnan(x) else x


def pairs_in(numbers: Mapping[str, float]) -> dict[str, dict[str, float]]:
    """The figures of each pair, by its name."""
    rows: dict[str, dict[str, float]] = {}
    for key, value in numbers.items():
        name, _, figure = key.removeprefix("rlora/").rpartition("/")
        if figure in (*MEASURES, *MARKS):
            rows.setdefault(name, {})[figure] = value
    return rows


def log_diagnostics(trainer: Any, *, per_pair: bool = False) -> Any:
    """Let a transformers Trainer log the figures of its optimizer whenever it logs the loss.

    Parameters
    ----------
    trainer : transformers.Trainer
        Its optimizer is one of `rlora.torch`, whose steps are watched while it trains.
    per_pair : bool
        With the figures of every pair, or only their summary.

    Returns
    -------
    transformers.TrainerCallback
        It has been added; ``trainer.remove_callback`` takes it out.

    Raises
    ------
    TypeError
        When training begins with an optimizer of another kind.

    Examples
    --------
    >>> import rlora.torch
    >>> def train(trainer):
    ...     rlora.torch.log_diagnostics(trainer)
    ...     trainer.train()
    """
    base = importlib.import_module("transformers").TrainerCallback
    callback = type("DiagnosticsCallback", (Events, base), {})(trainer, per_pair)
    trainer.add_callback(callback)
    return callback


class Events:
    """Handlers of the events of a Trainer; all others are those of transformers' own class."""

    def __init__(self, trainer: Any, per_pair: bool) -> None:
        self.trainer, self.per_pair = trainer, per_pair
        self.optimizer: Any = None

    def on_train_begin(
        self, args: Any, state: Any, control: Any, model: Any, optimizer: Any, **kwargs: Any
    ) -> None:
        inner = getattr(optimizer, "optimizer", optimizer)  # accelerate wraps it
        if not hasattr(inner, "diagnostics"):
            msg = (
                f"log_diagnostics needs a Trainer with an optimizer of rlora.torch, got "
                f"{type(inner).__name__}; give it by optimizers= or optimizer_cls_and_kwargs="
            )
            raise TypeError(msg)
        self.optimizer = inner
        inner.watch(model)

    def on_log(self, args: Any, state: Any, control: Any, logs: Any, **kwargs: Any) -> None:
        if "loss" in logs and self.optimizer is not None:  # not of our own, nor of an evaluation
            self.trainer.log(self.optimizer.diagnostics(per_pair=self.per_pair))

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.optimizer.unwatch()
        self.optimizer = None

"""``rlora bench``: what a step costs here, beside the plain step, on shapes of real models."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import click
from rich.console import Console
from rich.progress import Progress

from . import record, table
from .measure import Race, Row
from .plan import QUICK_RANKS, QUICK_ROUNDS, RANKS, ROUNDS, Plan, make_plan
from .presets import DEFAULT, PRESETS
from .torch_contenders import EXTRAS

HELP = f"""Time one step of each method beside the plain step, and weigh its memory.

The contenders take turns, one step each, so that their ratio means something on a busy machine
too. The table is for reading; --output keeps the record with every sample and the environment.

Presets: {", ".join(f"{name} ({preset.targets})" for name, preset in PRESETS.items())}.
"""


_BY_TIME = f"{ROUNDS.least} to {ROUNDS.most}, as {ROUNDS.seconds:.0f} s for each rank allow"


def _words(numbers: tuple[int, ...]) -> str:
    return ",".join(map(str, numbers))


@click.command(help=HELP, epilog="Options that take several may be repeated, or use commas.")
@click.option("--backend", default="numpy", show_default=True, help="numpy, torch, jax, cupy, ...")
@click.option("--method", "methods", multiple=True, help="Which methods.  [default: all]")
@click.option("--rank", "ranks", multiple=True, help=f"Which ranks.  [default: {_words(RANKS)}]")
@click.option("--preset", help=f"Shapes of a real model, see above.  [default: {DEFAULT}]")
@click.option("--adapter", type=Path, help="Shapes and values of a saved adapter: file or folder.")
@click.option("--dtype", default="float32", show_default=True, help="Of factors and gradients.")
@click.option("--device", help="A device of the backend, such as cuda:0.")
@click.option("--against", multiple=True, help=f"Time in the same run also: {', '.join(EXTRAS)}.")
@click.option("--output", type=Path, help="JSON file for the record; its folder must exist.")
@click.option("--repeat", type=int, help=f"Samples of each contender.  [default: {_BY_TIME}]")
@click.option(
    "--quick", is_flag=True, help=f"Ranks {_words(QUICK_RANKS)}, {QUICK_ROUNDS.most} samples."
)
@click.option("--seed", type=int, default=0, show_default=True, help="Of values and order.")
def bench(output: Path | None, **options: Any) -> None:
    plan = make_plan(**options)
    if output is not None:
        record.check_writable(output)
    rows: list[Row] = []
    try:
        run(plan, rows)
    except KeyboardInterrupt:
        report(plan, rows, output, partial=True)
        raise
    report(plan, rows, output)


def run(plan: Plan, rows: list[Row]) -> None:
    """Race on every problem of the plan; `rows` has what is done, after an interrupt too."""
    extra = {"dtype": plan.arena.dtype, **plan.source()}
    for problem in plan.problems():
        race = Race(problem, plan.entries(problem), plan.seed)
        try:
            with progress(f"rank {problem.rank}", plan.rounds.most) as tick:
                race.run(plan.rounds, tick)
        finally:
            rows += [{**row, **extra} for row in race.rows()]


@contextmanager
def progress(label: str, total: int) -> Iterator[Any]:
    """Show a bar on a terminal's stderr, drawn between rounds only: a thread would disturb them."""
    stderr = Console(stderr=True)
    with Progress(
        console=stderr, auto_refresh=False, transient=True, disable=not stderr.is_terminal
    ) as bar:
        task = bar.add_task(label, total=total)
        bar.refresh()

        def tick() -> None:
            bar.advance(task)
            bar.refresh()

        yield tick


def report(plan: Plan, rows: list[Row], output: Path | None, *, partial: bool = False) -> None:
    """Print the rows, and keep them if there is a file to keep them in."""
    if not rows:
        return
    if output is not None:
        record.write_record(output, record.make_record(plan.as_data(), rows, partial=partial))
    where = plan.preset or plan.source()["adapter"]
    title = (
        f"{where}: {rows[0]['pairs']} pairs, {plan.arena.dtype}{', interrupted' if partial else ''}"
    )
    table.show(title, rows, table.console())

"""``rlora bench run``: the measurement."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click

from rlora.cli.console import console, progress
from rlora.cli.environment import free_memory
from rlora.cli.records import check_writable, write_record

from . import table
from .cost_model import least_seconds, work
from .device_ops import device_op_checks
from .forward_backward import forward_backward_seconds
from .options import QUICK_RANKS, QUICK_ROUNDS, RANKS, ROUNDS, Options, listed, make_options
from .presets import DEFAULT
from .problem import Shapes
from .roofline import Peaks, measure_peaks
from .schema import Row, make_record
from .suite import SPEED, WATCHED, judge, suite_options
from .targets import Check
from .third_party import KNOWN
from .threads import pinned, reserved
from .timing import Timing

HELP = """Time a step of each method beside its baseline's.

The baseline is plain AdamW, which knows of no pairs, or plain SGD for the methods named so.
The optimizers take turns, one step each, so that their ratio means something on a busy machine
too, until the median of each ratio is known to 5 % or its share of the time is spent. The table is
for reading; --output keeps the record with every sample and the environment.

`rlora bench list` has the methods, backends, presets and third-party optimizers.
"""


SUITE_HAS = ("backend", "methods", "against", "preset", "ranks")
"""Options that a suite sets itself, or for each of its runs."""


def _words(numbers: tuple[int, ...]) -> str:
    return ",".join(map(str, numbers))


@click.command(help=HELP, epilog="Options that take several may be repeated, or use commas.")
@click.option("--backend", multiple=True, help="Array libraries.  [default: numpy]")
@click.option("--method", "methods", multiple=True, help="Methods to time.  [default: all]")
@click.option(
    "--rank", "ranks", multiple=True, help=f"Ranks of the factors.  [default: {_words(RANKS)}]"
)
@click.option("--preset", help=f"Shapes of a model, or MxN*K.  [default: {DEFAULT}]")
@click.option("--adapter", type=Path, help="Shapes and values of a saved adapter: file or folder.")
@click.option(
    "--dtype", default="float32", show_default=True, help="Dtype of factors and gradients."
)
@click.option("--device", help="A device of the backend, such as cuda:0.")
@click.option(
    "--against",
    multiple=True,
    help=f"Third-party optimizers to time too: {', '.join(KNOWN)}, module:Class.",
)
@click.option("--output", type=Path, help="JSON file for the record; its folder must exist.")
@click.option("--repeat", type=int, help="Samples of each row.  [default: by precision]")
@click.option(
    "--seconds", type=float, help=f"Time for the samples of each rank.  [default: {ROUNDS.seconds}]"
)
@click.option(
    "--quick",
    is_flag=True,
    help=f"Ranks {_words(QUICK_RANKS)}, {QUICK_ROUNDS.most} samples, one thread unless told.",
)
@click.option("--threads", type=int, help="Pin BLAS, OpenMP, torch and XLA to so many threads.")
@click.option("--end-to-end", is_flag=True, help="Also forward and backward; rank 32, torch.")
@click.option("--suite", help="Instead: speed, a table of targets; or scaling, widths and depths.")
@click.option("--force", is_flag=True, help="Go on when it needs more memory than is free.")
@click.option("--seed", type=int, default=0, show_default=True, help="Seed of values and order.")
def run(
    output: Path | None, threads: int | None, suite: str | None, *, force: bool, **given: Any
) -> None:
    if given["quick"] and threads is None:
        threads = 1  # several wait for each other on a busy machine, and a first look takes minutes
    with reserved(threads):
        runs = suite_of(suite, threads=threads, **given) if suite else None
        runs = runs or [make_options(threads=threads, **given)]
        if not force:
            check_memory(runs)
        if output is not None:
            check_writable(output)
        made = Results(runs, suite)
        with pinned(threads):
            try:
                made.measure()
            except KeyboardInterrupt:
                made.report(output, partial=True)
                raise
            made.report(output)


def suite_of(suite: str, **given: Any) -> list[Options]:
    """Make the runs of a suite, which has its own backends, methods and others."""
    for name in ("backend", "methods", "against", "adapter", "quick", "end_to_end"):
        if given[name]:
            option = name.removesuffix("s").replace("_", "-")
            msg = f"--suite {suite} brings its own methods and backends; leave out --{option}"
            raise ValueError(msg)
    left = {name: given[name] for name in given if name not in SUITE_HAS}
    return suite_options(suite, given["preset"], listed("--rank", given["ranks"]), **left)


def check_memory(runs: Sequence[Options]) -> None:
    """Refuse runs that need more memory than is free: the kernel would end the process."""
    free = free_memory()
    for options in runs:
        need = options.least_bytes()
        if free is not None and need > free:
            msg = (
                f"--preset {options.preset} at rank {max(options.ranks or [0])} needs about "
                f"{table.size(need)}, and {table.size(free)} are free; take fewer methods, a lower "
                f"rank or a smaller preset, or go on with --force"
            )
            raise ValueError(msg)


class Results:
    """Results so far, of one options or several."""

    def __init__(self, runs: list[Options], suite: str | None = None) -> None:
        self.runs, self.suite = runs, suite
        self.rows: list[tuple[Row, Shapes]] = []
        self.peaks: dict[str, Peaks] = {}
        self.device_ops: list[Check] = []

    def measure(self) -> None:
        """Timing on every problem; `rows` has what is done, after an interrupt too."""
        for options in self.runs:
            for problem in options.problems():
                for name, spec in options.everywhere().items():
                    self.peaks[name] = measure_peaks(spec).or_better(self.peaks.get(name))
                timing = Timing(problem, options.cases(problem), options.seed)
                try:
                    where = f"{next(filter(None, options.source().values()))}, rank {problem.rank}"
                    with progress(where, options.rounds.most, log=bool(self.suite)) as tick:
                        timing.run(options.rounds, tick)
                finally:
                    done = timing.rows()
                    for row in done:
                        row |= {"dtype": options.dtype, **options.source()}
                        row["forward_backward_s"] = None
                    self.rows += [(row, problem.shapes) for row in done]
                if options.end_to_end:
                    seconds = forward_backward_seconds(problem, options.everywhere()["torch"])
                    for row in done:
                        row["forward_backward_s"] = seconds if row["backend"] == "torch" else None
        if self.suite == SPEED:
            with progress("operations on a device", len(WATCHED), log=True) as tick:
                for method in WATCHED:
                    self.device_ops += device_op_checks(method)
                    tick()

    def _finished(self, row: Row, shapes: Shapes) -> Row:
        """Add the work a row could not do without, and its least time by the run's best peaks."""
        counted = work(row["method"], shapes, int(row["dtype"][-2:]) // 8, row["state_bytes"])
        if counted is None:
            return {**row, "flops": None, "bytes_moved": None, "model_s": None}
        least = least_seconds(*counted, self.peaks[row["backend"]])
        return {**row, "flops": counted.flops, "bytes_moved": counted.bytes, "model_s": least}

    def record(self, *, partial: bool = False) -> dict[str, Any]:
        """Make the record that `write_record` takes."""
        command = self.runs[0].as_data()
        if self.suite:
            presets = {options.preset for options in self.runs}
            ranks = dict.fromkeys(rank for options in self.runs for rank in options.ranks or ())
            command |= {"suite": self.suite, "ranks": list(ranks)}
            command["preset"] = command["preset"] if len(presets) == 1 else None
        rows = [self._finished(row, shapes) for row, shapes in self.rows]
        return make_record(
            command,
            rows,
            peaks=[peak._asdict() for peak in self.peaks.values()],
            checks=[*judge(rows), *self.device_ops] if self.suite else (),
            partial=partial,
        )

    def report(self, output: Path | None, *, partial: bool = False) -> None:
        """Print the rows, and keep them if there is a file to keep them in."""
        if not self.rows:
            return
        made = self.record(partial=partial)
        if output is not None:
            write_record(output, made)
        table.show_record(made, console())
        if output is not None:
            click.echo(f"record: {output}")

"""``rlora bench run``: the measurement."""

from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import click

import rlora
from rlora.cli.app import several
from rlora.cli.console import console, progress
from rlora.cli.environment import environment, free_memory, load_average
from rlora.cli.records import LONGEST, check_writable, is_stream, write_record

from . import table
from .cost_model import Peaks, least_seconds, measure_peaks, step_cost
from .device_ops import device_op_checks
from .options import DTYPES, QUICK_RANKS, QUICK_ROUNDS, RANKS, ROUNDS, Options, make_options
from .problem import DEFAULT, BenchProblem, Shapes
from .schema import NAME, Record, Row
from .suite import SPEED, SUITES, WATCHED, judge
from .targets import Check
from .third_party import KNOWN
from .timing import Timing, pinned, reserved
from .torch_cases import forward_backward_seconds

HELP = """Time a step of each method beside its baseline's.

The baseline is plain AdamW, which knows of no pairs, or plain SGD for methods with sgd in their
name. The optimizers take turns, one step each, so that their ratio means something on a busy
machine too, until the median of each ratio is known to 5 % or its share of the time is spent. The
table is for reading; --output keeps the record with every sample and the environment.

`rlora bench list` has the methods, backends, presets and third-party optimizers.
"""


class Whole(click.IntRange):
    """A whole number, which an error names so."""

    name = "whole number"


MOST = 10**LONGEST - 1
"""The largest whole number that a record may have."""

AT_LEAST_ONE = Whole(min=1)


def _words(numbers: tuple[int, ...]) -> str:
    return ",".join(map(str, numbers))


@click.command(help=HELP, epilog="Options that take several may be repeated, or use commas.")
@several("--backend", help="Array libraries.  [default: numpy]")
@several("--method", "methods", help="Methods to time.  [default: all]")
@several(
    "--rank", "ranks", kind=AT_LEAST_ONE, help=f"Ranks of the factors.  [default: {_words(RANKS)}]"
)
@click.option("--preset", help=f"Shapes of a model, or MxN*K.  [default: {DEFAULT}]")
@click.option("--adapter", type=Path, help="Shapes and values of a saved adapter: file or folder.")
@click.option(
    "--dtype",
    type=click.Choice(DTYPES),
    metavar="NAME",
    default="float32",
    show_default=True,
    help="Dtype of factors and gradients.",
)
@click.option("--device", help="A device of the backend, such as cuda:0.")
@several("--against", help=f"Third-party optimizers to time too: {', '.join(KNOWN)}.")
@click.option("--output", type=Path, help="JSON file for the record; its folder must exist.")
@click.option("--repeat", type=AT_LEAST_ONE, help="Samples of each row.  [default: by precision]")
@click.option(
    "--seconds", type=float, help=f"Time for the samples of each rank.  [default: {ROUNDS.seconds}]"
)
@click.option(
    "--quick",
    is_flag=True,
    help=f"Ranks {_words(QUICK_RANKS)}, {QUICK_ROUNDS.most} samples, one thread unless told.",
)
@click.option(
    "--threads",
    type=Whole(min=1, max=4096),
    help="Pin BLAS, OpenMP, torch and XLA to so many threads.",
)
@click.option("--end-to-end", is_flag=True, help="Also forward and backward; rank 32, torch.")
@click.option(
    "--suite",
    type=click.Choice(list(SUITES)),
    metavar="NAME",
    help="Instead: speed, a table of targets; or scaling, widths and depths.",
)
@click.option("--force", is_flag=True, help="Go on when it needs more memory than is free.")
@click.option(
    "--seed",
    type=Whole(min=0, max=MOST),
    default=0,
    show_default=True,
    help="Seed of values and order.",
)
def run(
    output: Path | None, threads: int | None, suite: str | None, *, force: bool, **given: Any
) -> None:
    if given["quick"] and threads is None:
        threads = 1  # several wait for each other on a busy machine, and a first look takes minutes
    with reserved(threads):
        given["threads"] = threads
        runs = suite_of(suite, given) if suite else [make_options(**given)]
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


def suite_of(suite: str, given: dict[str, Any]) -> list[Options]:
    """Make the runs of a suite, which has its own backends, methods and others."""
    for name in ("backend", "methods", "against", "adapter", "quick", "end_to_end"):
        if given[name]:
            option = name.removesuffix("s").replace("_", "-")
            msg = f"--suite {suite} brings its own methods and backends; leave out --{option}"
            raise ValueError(msg)
    return SUITES[suite](given)


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
        self.runs, self.suite, self.load = runs, suite, load_average()
        self.rows: list[tuple[Row, Shapes]] = []
        self.peaks: dict[str, Peaks] = {}
        self.device_ops: list[Check] = []

    def measure(self) -> None:
        """Time every problem; `rows` has what is done, after an interrupt too."""
        for options in self.runs:
            for problem in options.problems():
                for name, spec in options.specs.items():
                    self.peaks[name] = measure_peaks(spec).or_better(self.peaks.get(name))
                self._time(options, problem)
        if self.suite == SPEED:
            with progress("operations on a device", len(WATCHED), log=True) as tick:
                for method in WATCHED:
                    self.device_ops += device_op_checks(method)
                    tick()

    def _time(self, options: Options, problem: BenchProblem) -> None:
        source = options.source()
        timing = Timing(problem, options.cases(problem), options.seed, options.threads)
        try:
            where = f"{source['preset'] or source['adapter']}, rank {problem.rank}"
            with progress(where, options.rounds.most, log=bool(self.suite)) as tick:
                timing.run(options.rounds, tick)
        finally:
            rest = {"dtype": options.dtype, **source, "forward_backward_s": None}
            rows = [{**row, **rest} for row in timing.rows()]
            self.rows += [(row, problem.shapes) for row in rows]
        if options.end_to_end:
            seconds = forward_backward_seconds(problem, options.specs["torch"])
            for row in rows:
                row["forward_backward_s"] = seconds if row["backend"] == "torch" else None

    def _finished(self, row: Row, shapes: Shapes) -> Row:
        """Add the work a row could not do without, and its least time by the run's best peaks."""
        counted = step_cost(row["method"], shapes, int(row["dtype"][-2:]) // 8, row["state_bytes"])
        if counted is None:
            return {**row, "flops": None, "bytes_moved": None, "model_s": None}
        least = least_seconds(*counted, self.peaks[row["backend"]])
        return {**row, "flops": counted.flops, "bytes_moved": counted.bytes, "model_s": least}

    def record(self, *, partial: bool = False) -> Record:
        """Make the record of the run; valid by `schema.SCHEMA`."""
        command = self.runs[0].as_data()
        if self.suite:
            presets = {options.preset for options in self.runs}
            parts = [options.as_data() for options in self.runs]
            for key in ("backends", "methods", "ranks", "against"):
                command[key] = list(dict.fromkeys(x for part in parts for x in part[key] or ()))
            command |= {"suite": self.suite, "methods": sorted(command["methods"])}
            command["preset"] = command["preset"] if len(presets) == 1 else None
            # A suite gives some of its runs more time than it was told.
            command["rounds"] = min((x["rounds"] for x in parts), key=lambda x: x["seconds"] or 0)
        rows = [self._finished(row, shapes) for row, shapes in self.rows]
        return {
            "schema": NAME,
            "rlora": rlora.__version__,
            "created": datetime.now(UTC).isoformat(timespec="seconds"),
            "partial": partial,
            "command": command,
            "environment": {**environment(), "load_average": self.load},
            "rows": rows,
            "peaks": [peak._asdict() for peak in self.peaks.values()],
            "checks": [*judge(rows), *self.device_ops] if self.suite else [],
        }

    def report(self, output: Path | None, *, partial: bool = False) -> None:
        """Print the rows, and keep them if there is a file to keep them in."""
        if not self.rows:
            return
        made = self.record(partial=partial)
        aside = output is not None and is_stream(output)  # not behind the record itself
        try:
            if output is not None:
                write_record(output, made)
        finally:
            table.show_record(made, console(stderr=aside))
        if output is not None:
            click.echo(f"record: {output}", err=aside)

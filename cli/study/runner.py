"""All runs of a study, in processes side by side, into files of records."""

import multiprocessing
import signal
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import Any, Final, TypeAlias

import torch

from rlora.cli.console import console
from rlora.cli.records import make_folder
from rlora.pairing.report import number_of

from .models import MODELS, Size, module_of
from .plan import Entry, Record, Records, final, rounds
from .train import Job, run
from .workloads import Place, methods_of, preset_of

QUICK: Final = Size(8, 1, 1)
QUICK_METHODS: Final = ("adamw", "scaled")
RANK: Final = 8

Ended: TypeAlias = "SimpleQueue[Future[list[Record]] | None]"
"""Runs that have ended, and None for an interrupt."""

_workloads: Final[dict[tuple[Place, str], Any]] = {}
"""Workloads of this process: the last one, and of stacked ones all, which are small."""


def run_study(
    place: Place,
    settings: Sequence[tuple[str, int | None, int | None]],
    names: tuple[str, ...],
    processes: int,
    output: Path,
) -> None:
    """Do what is not done yet of datasets, ranks and lengths, and say each run when it is."""
    model = place.model
    entries = []
    for dataset, rank, steps in settings:
        like, size = measure(place, dataset, rank, steps)
        methods = names or usual(model, dataset, place.quick)
        entries += [entry_of(like._replace(method=x), size) for x in methods]
    records = {x: Records(output / f"{model}-{x}.jsonl") for x, *_ in settings}
    for entry in entries:
        records[entry.like.dataset].check_origin(entry.like, place.origin())
    make_folder("--output", output)
    processes = 1 if MODELS[model].large else processes  # one model fills a GPU
    for jobs in rounds(records, entries):
        console().print(f"{number_of(len(jobs), 'run')} to do")
        if (seconds := estimate(place, jobs, processes)) is not None:
            console().print(f"about {seconds / 60:.1f} min")
        for row in run_jobs(place, jobs, processes):
            records[row["dataset"]].add(row | place.origin())
            console().print(line(row))


def measure(place: Place, dataset: str, rank: int | None, steps: int | None) -> tuple[Job, Size]:
    """Give what all runs have in common; of a large model that is the paper's rank and epochs."""
    preset = preset_of(place.model, dataset)
    size = QUICK if place.quick else MODELS[place.model].size
    if size is None:
        epochs = preset.epochs if preset else 1
        count = steps or epochs * len(loaded(place, dataset).parts["train"])
        size = Size(count, sweep_seeds=1, seeds=3)
    size = size._replace(steps=steps or size.steps)
    rank = rank or (preset.rank if preset else RANK)
    return Job(place.model, dataset, rank, "", 0.0, 0, size.steps, tested=False), size


def usual(model: str, dataset: str, quick: bool) -> tuple[str, ...]:
    """List the methods if none is named: of a large model, the paper's own."""
    preset = preset_of(model, dataset)
    if preset:
        return tuple(preset.methods())
    known = methods_of(model, dataset)
    return tuple(name for name in known if name in QUICK_METHODS or not quick)


def entry_of(like: Job, size: Size) -> Entry:
    """The sweep's seeds come first, those of the report after them."""
    seeds = tuple(range(size.sweep_seeds + size.seeds))
    rates = methods_of(like.model, like.dataset)[like.method].rates
    return Entry(like, rates, seeds[: size.sweep_seeds], seeds[size.sweep_seeds :])


def line(row: Record) -> str:
    """Give the line of a finished run."""
    tested = "".join(f", test {name} {x:.4g}" for name, x in row.get("test", {}).items())
    return (
        f"{row['method']:26} rank {row['rank']:<3} lr {row['lr']:<9.3g} seed {row['seed']:<2} "
        f"validation loss {final(row):.4f}{tested}"
    )


def run_jobs(place: Place, jobs: list[Job], processes: int) -> Iterator[Record]:
    """Records of the jobs, in the order in which they are done.

    Each process has one thread: small products do not share cores well.
    """
    for dataset in dict.fromkeys(job.dataset for job in jobs):
        loaded(place, dataset)  # first of all here: what it keeps in a file, the others find
    stacks = stacks_of(place, jobs)
    processes = min(processes, len(stacks))
    if processes == 1:
        for stack in stacks:
            yield from run_stack(place, stack)
        return
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(processes, mp_context=context) as pool:
        try:
            with interrupts_queued() as ended:
                with without_interrupts():
                    for stack in stacks:
                        pool.submit(run_stack, place, stack).add_done_callback(ended.put)
                for _ in stacks:
                    yield from next_of(ended).result()
                if not ended.empty():  # an interrupt during the last one
                    raise KeyboardInterrupt
        except BaseException:  # an interrupt, or a run that failed: nobody waits for the others
            workers = multiprocessing.active_children()  # this program has no others
            pool.shutdown(wait=False, cancel_futures=True)
            for worker in workers:
                worker.kill()
            raise


@contextmanager
def interrupts_queued() -> Iterator[Ended]:
    """Put an interrupt into a queue, in which it waits for its turn.

    Raised anywhere in the pool, it would leave locks taken and processes unknown to everybody.
    """
    ended: Ended = SimpleQueue()
    before = signal.signal(signal.SIGINT, lambda *_: ended.put(None))
    try:
        yield ended
    finally:
        signal.signal(signal.SIGINT, before)


@contextmanager
def without_interrupts() -> Iterator[None]:
    """Keep interrupts from processes that are started meanwhile, for as long as they live."""
    if not hasattr(signal, "pthread_sigmask"):  # on Windows
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def next_of(ended: Ended) -> Future[list[Record]]:
    """Wait for the next run that ends; KeyboardInterrupt after an interrupt."""
    while True:
        with suppress(Empty):  # a signal that another thread gets does not wake this one
            if (done := ended.get(timeout=1.0)) is None:
                raise KeyboardInterrupt
            return done


def stacks_of(place: Place, jobs: list[Job]) -> list[list[Job]]:
    """Jobs that are trained at once; long ones first, so that all processes end together."""
    if not MODELS[place.model].stacked:
        return [[job] for job in jobs]
    module, kind = module_of(place.model), torch.device(place.device).type
    stacks: list[list[Job]] = module.together(jobs, module.MOST.get(kind, module.MOST["cpu"]))
    return sorted(stacks, key=lambda stack: -stack[0].steps)


def estimate(place: Place, jobs: list[Job], processes: int) -> float | None:
    """Seconds that stacked runs will take, by a few steps of each kind; None for other models.

    On a device a few steps say nothing of the many that a graph does.
    """
    if not MODELS[place.model].stacked or place.device != "cpu":
        return None
    stacks = stacks_of(place, jobs)
    seconds = [loaded(place, stack[0].dataset).seconds(stack) for stack in stacks]
    return float(sum(seconds)) / min(processes, len(stacks))


def loaded(place: Place, dataset: str) -> Any:
    """Load a workload, with one thread for a process."""
    torch.set_num_threads(1)
    key = place, dataset
    if key not in _workloads:
        if not MODELS[place.model].stacked:
            _workloads.clear()
        _workloads[key] = place.load(dataset)
    return _workloads[key]


def run_stack(place: Place, jobs: list[Job]) -> list[Record]:
    """Runs on this process's workload, at once if it can."""
    workload = loaded(place, jobs[0].dataset)
    if MODELS[place.model].stacked:
        rows: list[Record] = workload.run(jobs)
        return rows
    return [run(workload, job) for job in jobs]

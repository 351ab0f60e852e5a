"""All runs of a study, one after the other, into a file of records."""

from collections.abc import Sequence
from pathlib import Path
from typing import Final, NamedTuple

from rlora.cli.console import console, counted

from .plan import Entry, Record, Records, final, rounds
from .preset import methods_of, preset_of
from .train import Job
from .workers import Place, estimate, loaded, run_jobs
from .workloads import LARGE, Origin


class Size(NamedTuple):
    """Length of a run, and numbers of seeds that choose a learning rate and are reported."""

    steps: int
    sweep_seeds: int
    seeds: int


SIZES: Final = {"digits": Size(200, 4, 20), "smollm2": Size(160, 1, 3), "strings": Size(300, 2, 5)}
QUICK: Final = Size(8, 1, 1)
QUICK_METHODS: Final = ("adamw", "scaled")
RANK: Final = 8


def run_study(
    model: str,
    settings: Sequence[tuple[str, int | None, int | None]],
    names: tuple[str, ...],
    processes: int,
    output: Path,
    quick: bool,
    origin: Origin,
) -> None:
    """Do what is not done yet of datasets, ranks and lengths, and say each run when it is."""
    place = Place(model, output / "kept", quick, origin)
    entries = []
    for dataset, rank, steps in settings:
        like, size = measure(place, dataset, rank, steps)
        methods = names or usual(model, dataset, quick)
        entries += [entry_of(like._replace(method=x), size) for x in methods]
    records = {x: Records(output / f"{model}-{x}.jsonl") for x, *_ in settings}
    processes = 1 if model in LARGE else processes  # one model fills a GPU
    for jobs in rounds(records, entries):
        console().print(f"{counted(len(jobs), 'run')} to do")
        if (seconds := estimate(place, jobs, processes)) is not None:
            console().print(f"about {seconds / 60:.1f} min")
        for row in run_jobs(place, jobs, processes):
            records[row["dataset"]].add(row)
            console().print(line(row))


def measure(place: Place, dataset: str, rank: int | None, steps: int | None) -> tuple[Job, Size]:
    """Give what all runs have in common; of a large model that is the paper's rank and epochs."""
    preset = preset_of(place.model, dataset)
    if place.quick:
        size = QUICK
    elif preset is None:
        size = SIZES[place.model]
    else:
        count = steps or preset.epochs * len(loaded(place, dataset).batches("train"))
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

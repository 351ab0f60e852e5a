"""All runs of a study, one after the other, into a file of records."""

import os
from pathlib import Path
from typing import Final, NamedTuple

from rlora.cli.table import console

from .beds import check_dataset
from .methods import CONTENDERS, check_contenders
from .plan import Entry, Record, Records, final, rounds
from .train import Job
from .work import Place, do


class Size(NamedTuple):
    """How long a run is, and how many seeds choose a learning rate and are reported."""

    steps: int
    sweep_seeds: int
    seeds: int


SIZES: Final = {"digits": Size(200, 4, 20), "smollm2": Size(160, 1, 3)}
QUICK: Final = Size(8, 1, 1)
QUICK_CONTENDERS: Final = ("adamw", "scaled-both-fast")


def conduct(
    model: str,
    dataset: str,
    rank: int,
    names: tuple[str, ...],
    processes: int,
    output: Path,
    quick: bool,
) -> None:
    """Do what is not done yet, and say each run when it is."""
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    check_dataset(model, dataset)
    check_contenders(names)
    names = names or (QUICK_CONTENDERS if quick else tuple(CONTENDERS))
    size = QUICK if quick else SIZES[model]
    entries = [
        entry_of(Job(model, dataset, rank, name, 0.0, 0, size.steps, tested=False), size)
        for name in names
    ]
    records = Records(output / f"{model}-{dataset}.jsonl")
    place = Place(model, dataset, output / "kept", quick)
    for jobs in rounds(records, entries):
        console().print(f"{len(jobs)} runs to do")
        for row in do(place, jobs, processes):
            records.add(row)
            console().print(line(row))


def entry_of(like: Job, size: Size) -> Entry:
    """The sweep's seeds come first, those of the report after them."""
    seeds = tuple(range(size.sweep_seeds + size.seeds))
    rates = CONTENDERS[like.contender].rates
    return Entry(like, rates, seeds[: size.sweep_seeds], seeds[size.sweep_seeds :])


def line(row: Record) -> str:
    """What is said of a run when it is done."""
    tested = "".join(f", test {name} {x:.4g}" for name, x in row.get("test", {}).items())
    return (
        f"{row['contender']:26} rank {row['rank']:<3} lr {row['lr']:<9.3g} seed {row['seed']:<2} "
        f"validation loss {final(row):.4f}{tested}"
    )

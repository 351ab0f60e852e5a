"""Runs side by side, each in a process of one thread: small products do not share cores well."""

import multiprocessing
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Any, Final, NamedTuple

import torch

from .beds import STACKED, Origin, load_bed, module_of
from .train import Job, run


class Place(NamedTuple):
    """Data that a process loads before its first run."""

    model: str
    dataset: str
    kept: Path
    quick: bool
    origin: Origin


_beds: Final[dict[Place, Any]] = {}
"""The bed of this process: loaded once, for all runs that the process does."""


def do(place: Place, jobs: list[Job], processes: int) -> Iterator[dict[str, Any]]:
    """Records of the jobs, in the order in which they are done."""
    prepare(place)  # first of all here: what it keeps in a file, the others find
    stacked = place.model in STACKED
    stacks = module_of(place.model).together(jobs) if stacked else [[job] for job in jobs]
    if processes == 1:
        for stack in stacks:
            yield from work(place, stack)
        return
    with ProcessPoolExecutor(
        processes,
        mp_context=multiprocessing.get_context("spawn"),
        initializer=prepare,
        initargs=(place,),
    ) as pool:
        for done in as_completed([pool.submit(work, place, stack) for stack in stacks]):
            yield from done.result()


def estimate(place: Place, jobs: list[Job], processes: int) -> float | None:
    """Seconds that stacked runs will take, by a few steps of each kind; None for other models."""
    if place.model not in STACKED:
        return None
    bed = prepare(place)
    stacks: list[list[Job]] = module_of(place.model).together(jobs)
    return float(sum(bed.seconds(stack) for stack in stacks)) / processes


def prepare(place: Place) -> Any:
    """Load the bed, with one thread for a process."""
    torch.set_num_threads(1)
    if place not in _beds:
        _beds.clear()
        _beds[place] = load_bed(*place)
    return _beds[place]


def work(place: Place, jobs: list[Job]) -> list[dict[str, Any]]:
    """Runs on this process's bed, at once if it can."""
    bed = _beds[place]
    if place.model in STACKED:
        rows: list[dict[str, Any]] = bed.run(jobs)
        return rows
    return [run(bed, job) for job in jobs]

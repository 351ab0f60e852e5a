"""Runs side by side, each in a process of one thread: small products do not share cores well."""

import multiprocessing
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Any, Final, NamedTuple

import torch

from .bed import Bed
from .beds import Origin, load_bed
from .train import Job, run


class Place(NamedTuple):
    """Data that a process loads before its first run."""

    model: str
    dataset: str
    kept: Path
    quick: bool
    origin: Origin


_beds: Final[dict[Place, Bed]] = {}
"""The bed of this process: loaded once, for all runs that the process does."""


def do(place: Place, jobs: list[Job], processes: int) -> Iterator[dict[str, Any]]:
    """Records of the jobs, in the order in which they are done."""
    prepare(place)  # first of all here: what it keeps in a file, the others find
    if processes == 1:
        yield from (work(place, job) for job in jobs)
        return
    with ProcessPoolExecutor(
        processes,
        mp_context=multiprocessing.get_context("spawn"),
        initializer=prepare,
        initargs=(place,),
    ) as pool:
        for done in as_completed([pool.submit(work, place, job) for job in jobs]):
            yield done.result()


def prepare(place: Place) -> Bed:
    """Load the bed, with one thread for a process."""
    torch.set_num_threads(1)
    if place not in _beds:
        _beds.clear()
        _beds[place] = load_bed(*place)
    return _beds[place]


def work(place: Place, job: Job) -> dict[str, Any]:
    """One run on this process's bed."""
    return run(_beds[place], job)

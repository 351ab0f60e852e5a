"""Runs side by side, each in a process of one thread: small products do not share cores well."""

import multiprocessing
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Any, Final, NamedTuple

import torch

from .train import Job, run
from .workloads import STACKED, Origin, load_workload, module_of


class Place(NamedTuple):
    """Data that a process loads before its first run."""

    model: str
    dataset: str
    kept: Path
    quick: bool
    origin: Origin


_workloads: Final[dict[Place, Any]] = {}
"""The workload of this process: loaded once, for all runs that the process does."""


def run_jobs(place: Place, jobs: list[Job], processes: int) -> Iterator[dict[str, Any]]:
    """Records of the jobs, in the order in which they are done."""
    loaded(place)  # first of all here: what it keeps in a file, the others find
    stacked = place.model in STACKED
    stacks = module_of(place.model).together(jobs) if stacked else [[job] for job in jobs]
    if processes == 1:
        for stack in stacks:
            yield from run_stack(place, stack)
        return
    with ProcessPoolExecutor(
        processes,
        mp_context=multiprocessing.get_context("spawn"),
        initializer=loaded,
        initargs=(place,),
    ) as pool:
        for done in as_completed([pool.submit(run_stack, place, stack) for stack in stacks]):
            yield from done.result()


def estimate(place: Place, jobs: list[Job], processes: int) -> float | None:
    """Seconds that stacked runs will take, by a few steps of each kind; None for other models."""
    if place.model not in STACKED:
        return None
    workload = loaded(place)
    stacks: list[list[Job]] = module_of(place.model).together(jobs)
    return float(sum(workload.seconds(stack) for stack in stacks)) / processes


def loaded(place: Place) -> Any:
    """Load the workload, with one thread for a process."""
    torch.set_num_threads(1)
    if place not in _workloads:
        _workloads.clear()
        _workloads[place] = load_workload(*place)
    return _workloads[place]


def run_stack(place: Place, jobs: list[Job]) -> list[dict[str, Any]]:
    """Runs on this process's workload, at once if it can."""
    workload = _workloads[place]
    if place.model in STACKED:
        rows: list[dict[str, Any]] = workload.run(jobs)
        return rows
    return [run(workload, job) for job in jobs]

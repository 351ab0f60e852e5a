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
    """Origin of the workloads of a study, one for each dataset."""

    model: str
    kept: Path
    quick: bool
    origin: Origin

    @property
    def stacked(self) -> bool:
        """True if runs are trained many at once."""
        return self.model in STACKED


_workloads: Final[dict[tuple[Place, str], Any]] = {}
"""Workloads of this process: the last one, and of stacked ones all, which are small."""


def run_jobs(place: Place, jobs: list[Job], processes: int) -> Iterator[dict[str, Any]]:
    """Records of the jobs, in the order in which they are done."""
    for dataset in dict.fromkeys(job.dataset for job in jobs):
        loaded(place, dataset)  # first of all here: what it keeps in a file, the others find
    stacks = stacks_of(place, jobs)
    if processes == 1:
        for stack in stacks:
            yield from run_stack(place, stack)
        return
    with ProcessPoolExecutor(
        min(processes, len(stacks)), mp_context=multiprocessing.get_context("spawn")
    ) as pool:
        for done in as_completed([pool.submit(run_stack, place, stack) for stack in stacks]):
            yield from done.result()


def stacks_of(place: Place, jobs: list[Job]) -> list[list[Job]]:
    """Jobs that are trained at once; long ones first, so that all processes end together."""
    if not place.stacked:
        return [[job] for job in jobs]
    module, kind = module_of(place.model), torch.device(place.origin.device).type
    stacks: list[list[Job]] = module.together(jobs, module.MOST.get(kind, module.MOST["cpu"]))
    return sorted(stacks, key=lambda stack: -stack[0].steps)


def estimate(place: Place, jobs: list[Job], processes: int) -> float | None:
    """Seconds that stacked runs will take, by a few steps of each kind; None for other models.

    On a device a few steps say nothing of the many that a graph does.
    """
    if not place.stacked or place.origin.device != "cpu":
        return None
    stacks = stacks_of(place, jobs)
    seconds = [loaded(place, stack[0].dataset).seconds(stack) for stack in stacks]
    return float(sum(seconds)) / processes


def loaded(place: Place, dataset: str) -> Any:
    """Load a workload, with one thread for a process."""
    torch.set_num_threads(1)
    key = place, dataset
    if key not in _workloads:
        if not place.stacked:
            _workloads.clear()
        _workloads[key] = load_workload(place.model, dataset, place.kept, place.quick, place.origin)
    return _workloads[key]


def run_stack(place: Place, jobs: list[Job]) -> list[dict[str, Any]]:
    """Runs on this process's workload, at once if it can."""
    workload = loaded(place, jobs[0].dataset)
    if place.stacked:
        rows: list[dict[str, Any]] = workload.run(jobs)
        return rows
    return [run(workload, job) for job in jobs]

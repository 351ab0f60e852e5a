"""One run of the study: a job in, a record out."""

import math
import random
import statistics
import time
from typing import Any, Final, NamedTuple, cast

import torch
from torch import nn

import rlora.torch

from .workload import Part, Workload
from .workloads import methods_of

WARMUP: Final = 0.05
"""Share of the steps in which the learning rate rises; then it falls to zero in a line."""

START_BATCHES: Final = 4
"""Number of batches that a start from the gradient looks at."""

DIVERGED: Final = 10.0
"""Multiple of its first value that a training loss may have; above it the run ends."""


class Job(NamedTuple):
    """Identity of a run."""

    model: str
    dataset: str
    rank: int
    method: str
    lr: float
    seed: int
    steps: int
    tested: bool
    """Flag: the test part is read, only for a learning rate that validation has chosen."""


def run(workload: Workload[Any], job: Job) -> dict[str, Any]:
    """Train once; everything but the optimizer depends on the seed alone."""
    method = methods_of(job.model, job.dataset)[job.method]
    model = workload.adapted(job.rank, job.seed)
    batches = workload.parts["train"]
    if method.start != "gaussian":
        rlora.torch.initialize(
            model, batches[:START_BATCHES], loss=workload.loss, method=method.start
        )
    optimizer = method.make(model, job.lr)
    result = train(workload, model, optimizer, job)
    state = sum(x.nbytes for s in optimizer.state.values() for x in s.values() if x.ndim > 0)
    result = job._asdict() | result | {"state_bytes": state}
    if job.tested and not result["diverged"]:
        result["test"] = {
            "loss": evaluate(workload, model, "test"),
            **workload.scores(model, "test"),
        }
    workload.release(model)
    return result


def train(
    workload: Workload[Any], model: nn.Module, optimizer: torch.optim.Optimizer, job: Job
) -> dict[str, Any]:
    """All steps, with the validation loss at the middle and at the end."""
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda done: share(done, job.steps))
    batches, shuffler = workload.parts["train"], random.Random(job.seed)
    queue: list[Any] = []
    bound = math.inf
    seconds, validation = [], []
    for step in range(1, job.steps + 1):
        queue = queue or shuffler.sample(batches, len(batches))
        loss = workload.loss(model, queue.pop())
        value = float(loss.detach())
        bound = DIVERGED * value if step == 1 else bound
        if not value <= bound:  # also when NaN
            break
        cast("Any", loss).backward()
        start = time.perf_counter()
        optimizer.step()
        seconds.append(time.perf_counter() - start)
        optimizer.zero_grad()
        schedule.step()
        if step in (job.steps // 2, job.steps):
            validation.append([step, evaluate(workload, model, "validation")])
    diverged = len(seconds) < job.steps or not math.isfinite(validation[-1][1])
    step_ms = 1e3 * statistics.median(seconds or [0.0])
    return {
        "validation": [] if diverged else validation,
        "diverged": diverged,
        "step_ms": step_ms,
    }


def share(done: int, steps: int) -> float:
    """Return the next step's share of the learning rate."""
    warmup = max(1, round(WARMUP * steps))
    return min((done + 1) / warmup, (steps - done) / (steps - warmup))


@torch.no_grad()
def evaluate(workload: Workload[Any], model: nn.Module, part: Part) -> float:
    """Mean loss over all that counts in a part."""
    batches = workload.parts[part]
    weights = [workload.weight(batch) for batch in batches]
    losses = [float(workload.loss(model, batch)) for batch in batches]
    return sum(w * x for w, x in zip(weights, losses, strict=True)) / sum(weights)

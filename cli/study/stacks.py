"""Many runs of one method as one computation: each adapter has an axis for the runs.

Runs that differ in learning rate and seed alone share every call. The methods of `rlora` take the
axis for one of equal layers, so that the step of a run is what it would be alone.
"""

import math
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Final, NamedTuple

import torch
from torch import Tensor

import rlora
from rlora import Factors, Transform
from rlora.core.state import flatten_state

from .methods import FAST, PUBLISHED, USUAL, rates
from .strings import DATASETS, Examples, parts_of
from .train import DIVERGED, Job, share
from .transformer import (
    STEPS,
    Adapters,
    exact,
    kept_weights,
    logits,
    losses,
    new_adapters,
    widened,
)
from .trust import trust_region
from .workload import Part

SCALING: Final = 2.0
"""alpha / r, for every rank."""

MOST: Final = 16
"""Runs in a stack."""

WIDENED: Final = 1
"""Block that `Dataset.widened` is about."""

TRIAL: Final = 4
"""Steps by which the time of a study is estimated."""

BOUND: Final = 1e-3
"""Root mean square by which a clipped step may move the entries of a product.

Chosen on seed 0 of `fall`, where the loss at the best rate of scaled AdamW stays as it is.
"""

OTHER_BOUNDS: Final = (BOUND / 4, 4 * BOUND)

QUICK_STEPS: Final = 30
"""Steps of the base in a quick study."""


class Method(NamedTuple):
    """A method with its settings; everything but the learning rate."""

    make: Callable[[], Transform]
    rates: tuple[float, ...]
    """Learning rates that a sweep begins with, in rising order, a factor of two apart."""


def adamw(b1: float, b2: float, ratio: float = 1.0) -> Callable[[], Transform]:
    """AdamW, or with a ratio LoRA+."""
    return lambda: rlora.lora_plus(ratio=ratio, b1=b1, b2=b2)


def scaled(b1: float, b2: float, **options: Any) -> Callable[[], Transform]:
    """Scaled AdamW."""
    return lambda: rlora.scaled_adamw(b1=b1, b2=b2, weight_decay=0.0, **options)


def clipped(make: Callable[[], Transform], bound: float = BOUND) -> Callable[[], Transform]:
    """A method in a trust region."""
    return lambda: trust_region(make(), bound)


BETAS: Final = ((0.9, 0.95), (0.9, 0.99))
"""Those between `FAST` and `USUAL`."""


def between(method: str) -> dict[tuple[float, float], str]:
    """`BETAS` -> name of the method with them."""
    return {(b1, b2): f"{method}-{b1}-{b2}" for b1, b2 in BETAS}


METHODS: Final[Mapping[str, Method]] = {
    "adamw": Method(adamw(*USUAL), rates(1e-3, 7)),
    "adamw-fast": Method(adamw(*FAST), rates(1e-3, 7)),
    "lora-plus-16": Method(adamw(*USUAL, ratio=16.0), rates(2.5e-4, 7)),
    "lora-plus-16-fast": Method(adamw(*FAST, ratio=16.0), rates(2.5e-4, 7)),
    "lora-plus-4": Method(adamw(*USUAL, ratio=4.0), rates(1e-3, 7)),
    "scaled": Method(scaled(*FAST), rates(1e-3, 7)),
    "scaled-usual": Method(scaled(*USUAL), rates(1e-3, 7)),
    "scaled-before": Method(scaled(*USUAL, **PUBLISHED), rates(1e-3, 7)),
    "scaled-before-fast": Method(scaled(*FAST, **PUBLISHED), rates(1e-3, 7)),
    "lora-rite": Method(rlora.lora_rite, rates(1e-3, 7)),
    "lora-rite-fast": Method(lambda: rlora.lora_rite(b1=FAST[0], b2=FAST[1]), rates(1e-3, 7)),
    "lora-pro": Method(rlora.lora_pro_adamw, rates(1e-3, 7)),
    "lora-pro-fast": Method(lambda: rlora.lora_pro_adamw(b1=FAST[0], b2=FAST[1]), rates(1e-3, 7)),
    "lora-muon": Method(rlora.lora_muon, rates(1e-3, 7)),
    "ref-lora": Method(rlora.ref_lora, rates(0.032, 7)),
    **{name: Method(adamw(*x), rates(1e-3, 7)) for x, name in between("adamw").items()},
    **{name: Method(scaled(*x), rates(1e-3, 7)) for x, name in between("scaled").items()},
    "scaled-clipped": Method(clipped(scaled(*FAST)), rates(4e-3, 7)),
    **{
        f"scaled-clipped-{x:g}": Method(clipped(scaled(*FAST), x), rates(4e-3, 7))
        for x in OTHER_BOUNDS
    },
    "adamw-fast-clipped": Method(clipped(adamw(*FAST)), rates(4e-3, 7)),
}
"""Betas: (0.7, 0.8) of those called fast, others as named, else (0.9, 0.999).

But `scaled` and `scaled-clipped` have the fast ones, `lora-muon` a momentum of 0.95 alone, and
`ref-lora` none. Clipped ones have the bound `BOUND`, or that in the name.
"""

CLIPPED: Final[Mapping[str, Sequence[str]]] = {
    "adamw-fast": ("adamw-fast-clipped",),
    "scaled": ("scaled-clipped", *(f"scaled-clipped-{x:g}" for x in OTHER_BOUNDS)),
}
"""Method -> names of the same in a trust region."""

BY_BETAS: Final[Mapping[str, Mapping[tuple[float, float], str]]] = {
    method: {FAST: fast, **between(method), USUAL: usual}
    for method, fast, usual in (
        ("adamw", "adamw-fast", "adamw"),
        ("scaled", "scaled", "scaled-usual"),
    )
}
"""Optimizer -> betas -> name of the method."""


class Strings:
    """The base with one task of strings."""

    def __init__(self, dataset: str, kept: Path | None, quick: bool) -> None:
        self.dataset = DATASETS[dataset]
        base = kept_weights(kept, QUICK_STEPS if quick else STEPS)
        self.weights = widened(base, WIDENED, self.dataset.widened)
        self.parts = parts_of(self.dataset)

    def adapters(self, rank: int, seeds: Sequence[int]) -> Adapters:
        """Adapters of a stack; those of a run depend on its seed alone."""
        runs = [
            new_adapters(self.weights, rank, torch.Generator().manual_seed(seed)) for seed in seeds
        ]
        start, dtype = self.dataset.start, self.dataset.dtype
        pairs = {}
        for name in runs[0]:
            A, B = map(torch.cat, zip(*(run[name] for run in runs), strict=True))
            pairs[name] = Factors((start * A).to(dtype), B.to(dtype))
        return pairs

    def batches(self, steps: int, seeds: Sequence[int]) -> Iterator[Examples]:
        """Training strings of each step, (runs, batch, ...), drawn by the seed of the run."""
        tokens, answers = self.parts["train"]
        shape = (steps, self.dataset.batch)
        drawn = [
            torch.randint(len(answers), shape, generator=torch.Generator().manual_seed(~seed))
            for seed in seeds
        ]
        for index in torch.stack(drawn, 1):
            yield Examples(tokens[index], answers[index])

    def gradients(self, adapters: Adapters, batch: Examples) -> tuple[Tensor, Adapters]:
        """Return the loss of each run, and its gradients."""
        leaves = [factor.requires_grad_() for pair in adapters.values() for factor in pair]
        found = losses(logits(self.weights, batch.tokens, adapters, SCALING), batch.answers)
        flat = iter(torch.autograd.grad(found.sum(), leaves))
        return found.detach(), {name: Factors(next(flat), next(flat)) for name in adapters}

    @torch.no_grad()
    def evaluate(self, adapters: Adapters, part: Part) -> list[dict[str, float]]:
        """Loss, and share of exact answers, of each run on a part."""
        tokens, answers = (x[None] for x in self.parts[part])
        found = []
        for k in range(count(adapters)):
            scores = logits(self.weights, tokens, chosen(adapters, slice(k, k + 1)), SCALING)
            loss, right = losses(scores, answers), exact(scores, answers)
            found.append({"loss": rounded(loss), "exact": rounded(right)})
        return found

    def train(self, jobs: Sequence[Job]) -> tuple[Adapters, list[bool], dict[str, Any]]:
        """Train a stack: its adapters, whether each run diverged, and what a step costs a run."""
        job, seeds = jobs[0], [job.seed for job in jobs]
        transform = METHODS[job.method].make()
        adapters = self.adapters(job.rank, seeds)
        state = transform.init(adapters, SCALING)
        lr = torch.tensor([job.lr for job in jobs])[:, None, None]
        bound = torch.full((len(jobs),), math.inf)
        seconds = []
        for done, batch in enumerate(self.batches(job.steps, seeds)):
            found, grads = self.gradients(adapters, batch)
            bound = DIVERGED * found if done == 0 else bound
            bound = torch.where(found <= bound, bound, -1.0)  # also when NaN: for good
            lives = (bound > 0)[:, None, None]
            start = time.perf_counter()
            # A run that diverged stays where it is, and leaves no NaN in the state of the stack.
            grads = {
                name: Factors(*(torch.where(lives, x, 0) for x in pair))
                for name, pair in grads.items()
            }
            rate = share(done, job.steps) * lr * lives
            adapters, state = rlora.step(transform, adapters, grads, state, rate)
            seconds.append(time.perf_counter() - start)
        cost = {
            "step_ms": round(1e3 * statistics.median(seconds) / len(jobs), 4),
            "state_bytes": sum(x.nbytes for x in flatten_state(state).values()) // len(jobs),
        }
        return adapters, (bound < 0).tolist(), cost

    def run(self, jobs: Sequence[Job]) -> list[dict[str, Any]]:
        """Train a stack; a record for each job."""
        adapters, diverged, cost = self.train(jobs)
        scores = self.evaluate(adapters, "validation")
        tests = self.evaluate(adapters, "test") if jobs[0].tested else None
        rows = []
        for k, job in enumerate(jobs):
            lost = diverged[k] or not math.isfinite(scores[k]["loss"])
            row = job._asdict() | {
                "validation": [] if lost else [[job.steps, scores[k]["loss"]]],
                "exact": 0.0 if lost else scores[k]["exact"],
                "diverged": lost,
                **cost,
            }
            rows.append(row if tests is None or lost else row | {"test": tests[k]})
        return rows

    def seconds(self, jobs: Sequence[Job]) -> float:
        """Time that a stack will take, by a few steps of it, of which the first are slower."""
        short = [job._replace(steps=TRIAL) for job in jobs]
        self.train(short)
        begin = time.perf_counter()
        self.train(short)
        return (time.perf_counter() - begin) / TRIAL * jobs[0].steps


def chosen(adapters: Adapters, runs: slice) -> Adapters:
    """The adapters of some runs."""
    return {name: Factors(A[runs], B[runs]) for name, (A, B) in adapters.items()}


def count(adapters: Adapters) -> int:
    """Number of runs in a stack."""
    return len(next(iter(adapters.values())).A)


def rounded(x: Tensor) -> float:
    """A number short enough for a record."""
    return float(f"{float(x):.5g}")


def together(jobs: Sequence[Job]) -> list[list[Job]]:
    """The jobs in stacks, in each of which only learning rates and seeds differ."""
    alike: dict[Job, list[Job]] = {}
    for job in jobs:
        alike.setdefault(job._replace(lr=0.0, seed=0), []).append(job)
    return [x[i : i + MOST] for x in alike.values() for i in range(0, len(x), MOST)]


def load(dataset: str, *, kept: Path | None = None, quick: bool = False) -> Strings:
    """The base with a task; `kept` is the file of its weights, one for all tasks."""
    file = kept and kept.with_name(f"strings{'-quick' if quick else ''}.pt")
    return Strings(dataset, file, quick)

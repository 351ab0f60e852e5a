"""Many runs of one method as one computation: each adapter has an axis for the runs.

Runs that differ in task, learning rate and seed alone share every call. The methods of `rlora`
take the axis for one of equal layers, so that the step of a run is what it would be alone.
"""

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final, TypeAlias, cast

import torch
from torch import Tensor

import rlora
from rlora import Factors
from rlora.core.state import flatten_state

from .stacked_methods import METHODS
from .strings import DATASETS, Dataset, Examples, parts_of
from .train import DIVERGED, Job, share
from .transformer import (
    LARGE,
    SMALL,
    Adapters,
    Shape,
    exact,
    logits,
    losses,
    new_adapters,
    trained,
    widened,
)
from .workload import Part, remembered

MOST: Final = {"cpu": 16, "cuda": 256}
"""Type of device -> runs in a stack."""

EVALUATED: Final = 16
"""Runs that are evaluated at once, on 256 strings each."""

WIDENED: Final = 1
"""Block that `Dataset.widened` is about."""

TRIAL: Final = 4
"""Steps by which the time of a study is estimated."""

EAGER: Final = 3
"""First steps on a CUDA device, without which no graph can be captured."""

Score: TypeAlias = dict[str, float]

QUICK_STEPS: Final = 30
"""Steps of the base in a quick study."""

BASES: Final[Mapping[str, Shape]] = {
    "small": SMALL,
    "large": LARGE,
    "width-128": Shape(width=128, rate=1e-3, size=0.0835),
    "width-256": Shape(width=256, rate=5e-4, size=0.0579),
}


class Strings:
    """A base with tasks of strings of one kind, on a device."""

    def __init__(self, kind: Dataset, kept: Path | None, quick: bool, device: str) -> None:
        self.kind, self.device = kind, torch.device(device)
        self.shape = BASES[kind.base]
        if quick:
            self.shape = self.shape._replace(steps=QUICK_STEPS)
        weights = remembered(kept, lambda: trained(self.shape, self.device), self.device)
        self.weights = widened(weights, WIDENED, kind.widened)

    def adapters(self, jobs: Sequence[Job]) -> Adapters:
        """Adapters of a stack; those of a run depend on its dataset and its seed alone."""
        runs = [
            new_adapters(
                self.weights,
                job.rank,
                DATASETS[job.dataset].start,
                torch.Generator().manual_seed(job.seed),
            )
            for job in jobs
        ]
        pairs = {}
        for name in runs[0]:
            A, B = map(torch.cat, zip(*(run[name] for run in runs), strict=True))
            pairs[name] = Factors(*(x.to(self.device, self.kind.dtype) for x in (A, B)))
        return pairs

    def training(self, jobs: Sequence[Job]) -> tuple[Examples, Tensor]:
        """Training strings of all jobs, and the numbers (steps, runs, batch) of those of a step.

        Those of a run are drawn by its seed.
        """
        names = list(dict.fromkeys(job.dataset for job in jobs))
        parts = [parts_of(DATASETS[name])["train"] for name in names]
        sizes = [len(part.answers) for part in parts]
        starts = [sum(sizes[:i]) for i in range(len(sizes))]
        shape, draws = (jobs[0].steps, self.kind.batch), []
        for job in jobs:
            i, generator = names.index(job.dataset), torch.Generator().manual_seed(~job.seed)
            draws.append(starts[i] + torch.randint(sizes[i], shape, generator=generator))
        whole = Examples(*(torch.cat(x).to(self.device) for x in zip(*parts, strict=True)))
        return whole, torch.stack(draws, 1).to(self.device)

    def sizes(self) -> dict[str, float]:
        """Root mean square of the entries of each adapted weight, divided by s."""
        s = self.kind.scaling
        adapted = {name: w for name, w in self.weights.items() if "." in name}
        return {name: float(w.square().mean().sqrt()) / s for name, w in adapted.items()}

    def logits(self, adapters: Adapters, tokens: Tensor) -> Tensor:
        """Scores of the digits of answers, see `transformer.logits`."""
        return logits(self.shape, self.weights, tokens, adapters, self.kind.scaling)

    def gradients(self, adapters: Adapters, batch: Examples) -> tuple[Tensor, Adapters]:
        """Return the loss of each run, and its gradients."""
        leaves = [factor.requires_grad_() for pair in adapters.values() for factor in pair]
        found = losses(self.logits(adapters, batch.tokens), batch.answers)
        flat = iter(torch.autograd.grad(found.sum(), leaves))
        return found.detach(), {name: Factors(next(flat), next(flat)) for name in adapters}

    @torch.no_grad()
    def evaluate(self, adapters: Adapters, jobs: Sequence[Job], part: Part) -> list[Score]:
        """Loss, and share of exact answers, of each run on a part."""
        found = []
        for first in range(0, len(jobs), EVALUATED):
            some = slice(first, first + EVALUATED)
            parts = [parts_of(DATASETS[job.dataset])[part] for job in jobs[some]]
            tokens, answers = (
                torch.stack(x).to(self.device) for x in zip(*parts, strict=True)
            )  # (runs, strings, ...)
            scores = self.logits(chosen(adapters, some), tokens)
            pairs = (f(scores, answers).tolist() for f in (losses, exact))
            found += [
                {"loss": rounded(x), "exact": rounded(y)} for x, y in zip(*pairs, strict=True)
            ]
        return found

    def train(self, jobs: Sequence[Job]) -> tuple[Adapters, list[bool]]:
        """Train a stack: its adapters, and whether each run diverged."""
        with stream_of(self.device):
            return self._train(jobs)

    def _train(self, jobs: Sequence[Job]) -> tuple[Adapters, list[bool]]:
        method = METHODS[jobs[0].method]
        transform = method.make(self.sizes())
        adapters, (strings, drawn) = self.adapters(jobs), self.training(jobs)
        state = transform.init(adapters, self.kind.scaling)
        kept = [*(x for pair in adapters.values() for x in pair), *flatten_state(state).values()]
        lr, rate = (
            torch.tensor([job.lr for job in jobs], device=self.device)[:, None, None]
            for _ in range(2)
        )
        bound = torch.full((len(jobs),), math.inf, device=self.device)
        index = torch.zeros_like(drawn[0])

        def step() -> None:
            """Write the next adapters and the next state over the old ones."""
            batch = Examples(*(x[index] for x in strings))
            found, grads = self.gradients(adapters, batch)
            first = bound.isinf()
            bound.copy_(torch.where(first, DIVERGED * found, bound))
            bound.copy_(torch.where(found <= bound, bound, -1.0))  # also when NaN: for good
            lives = (bound > 0)[:, None, None]
            # A run that diverged stays where it is, and leaves no NaN in the state of the stack.
            grads = {
                name: Factors(*(torch.where(lives, x, 0) for x in pair))
                for name, pair in grads.items()
            }
            moved = rlora.step(transform, adapters, grads, state, rate * lives)
            new = [*(x for pair in moved[0].values() for x in pair)]
            new += flatten_state(moved[1]).values()
            with torch.no_grad():
                torch._foreach_copy_(kept, new)

        advance, steps = step, len(drawn)
        for done in range(steps):
            index.copy_(drawn[done])
            rate.copy_(share(done, steps) * lr)
            if done == EAGER and self.device.type == "cuda" and not method.waits:
                advance = captured(step)
            advance()
        return adapters, (bound < 0).tolist()

    def run(self, jobs: Sequence[Job]) -> list[dict[str, Any]]:
        """Train a stack; a record for each job."""
        adapters, diverged = self.train(jobs)
        scores = self.evaluate(adapters, jobs, "validation")
        tests = self.evaluate(adapters, jobs, "test") if jobs[0].tested else None
        rows = []
        for k, job in enumerate(jobs):
            lost = diverged[k] or not math.isfinite(scores[k]["loss"])
            row = job._asdict() | {
                "validation": [] if lost else [[job.steps, scores[k]["loss"]]],
                "exact": 0.0 if lost else scores[k]["exact"],
                "diverged": lost,
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


@contextmanager
def stream_of(device: torch.device) -> Iterator[None]:
    """A CUDA stream on which a graph can be captured; nothing on other devices."""
    if device.type != "cuda":
        yield
        return
    stream: Any = cast("Any", torch.cuda.Stream)(device)
    outer = torch.cuda.current_stream(device)
    stream.wait_stream(outer)
    with torch.cuda.stream(stream):
        yield
    outer.wait_stream(stream)


def captured(step: Callable[[], None]) -> Callable[[], None]:
    """A step as a CUDA graph: one launch instead of hundreds."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=torch.cuda.current_stream()):
        step()
    replay: Callable[[], None] = graph.replay
    return replay


def chosen(adapters: Adapters, runs: slice) -> Adapters:
    """The adapters of some runs."""
    return {name: Factors(A[runs], B[runs]) for name, (A, B) in adapters.items()}


def rounded(x: float) -> float:
    """A number short enough for a record."""
    return float(f"{x:.5g}")


def together(jobs: Sequence[Job], most: int) -> list[list[Job]]:
    """The jobs in stacks, in each of which tasks of a kind, learning rates and seeds differ."""
    alike: dict[Any, list[Job]] = {}
    for job in jobs:
        kind = DATASETS[job.dataset].kind
        alike.setdefault((kind, job._replace(dataset="", lr=0.0, seed=0)), []).append(job)
    return [x[i : i + most] for x in alike.values() for i in range(0, len(x), most)]


def load(
    dataset: str, *, kept: Path | None = None, quick: bool = False, device: str = "cpu"
) -> Strings:
    """The base for a task and others of its kind; `kept` is in the folder of the bases' files."""
    kind = DATASETS[dataset].kind
    file = kept and kept.with_name(f"strings-{kind.base}{'-quick' if quick else ''}.pt")
    return Strings(kind, file, quick, device)

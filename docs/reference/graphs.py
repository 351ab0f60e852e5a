"""Time steps of a CUDA device that are launched one by one, and replayed from a CUDA graph.

python docs/reference/graphs.py build/gpu/graphs.csv

writes one row for each method, dtype and rank; graphs.csv beside this file is such a record.
"""

import csv
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Final

import torch

from rlora.cli.bench.options import make_spec
from rlora.cli.bench.problem import DEFAULT, named, random_problem
from rlora.cli.bench.torch_cases import SharedTensors, make_optimizer

METHODS: Final = (
    "adamw",
    "scaled_adamw",
    "scaled_adamw:before",
    "lora_rite",
    "lora_muon",
    "ref_lora",
    "alt_lora_plus",
)
RANKS: Final = (4, 16, 64)
DTYPES: Final = ("float32", "bfloat16")
COLUMNS: Final = ("device", "dtype", "rank", "method", "eager [ms]", "graph [ms]")
ROUNDS: Final = 50
WARM: Final = 5


def milliseconds(step: Callable[[], Any]) -> float:
    """Time of a step, until the device is done."""
    start = time.perf_counter()
    step()
    torch.cuda.synchronize()
    return 1e3 * (time.perf_counter() - start)


def both_ways(optimizer: Any) -> tuple[float, float]:
    """Medians of an eager step and of one from a graph, in turns; both are steps of training."""
    for group in optimizer.param_groups:
        if "capturable" in group:
            group["capturable"] = True
    for _ in range(WARM):
        optimizer.step()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        optimizer.step()
    ways = (optimizer.step, graph.replay)
    rounds = [[milliseconds(step) for step in ways] for _ in range(ROUNDS)]
    eager, replayed = map(statistics.median, zip(*rounds, strict=True))
    return eager, replayed


def rows() -> Iterator[list[str]]:
    """The record, row by row."""
    for dtype in DTYPES:
        spec = make_spec("torch", dtype, "cuda:0")
        for rank in RANKS:
            shared = SharedTensors(random_problem(named(DEFAULT).pairs(), rank, 0), spec)
            for method in METHODS:
                times = both_ways(make_optimizer(method, shared.model()))
                device = torch.cuda.get_device_name()
                yield [device, dtype, f"{rank}", method, *(f"{x:.3f}" for x in times)]


def main(path: Path) -> None:
    """Write the record, once all is measured."""
    measured = list(rows())
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(COLUMNS)
        writer.writerows(measured)


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).with_suffix(".csv"))

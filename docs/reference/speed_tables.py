"""Tables of what a step costs, from the records of the benchmark, for `front_tables.py`."""

import csv
import json
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from statistics import geometric_mean, median
from typing import Any, Final

from rlora.cli.bench.stats import round_ratios
from rlora.cli.bench.timing import MAX_SPREAD

BENCHMARKS: Final = Path(__file__).parent / "benchmarks"

COSTS: Final = (
    "*Median over rounds of a step's time over that of torch's fused AdamW in the same round; "
    "gpt2-medium, {pairs} pairs, float32. {spreads}*"
)
CPU, GPU = "cpu-gpt2-medium.json", "h200-float32.json"
TIMED: Final = {
    "scaled_adamw": "`scaled_adamw`, the default",
    "scaled_adamw:before": '`scaled_adamw`, "before"',
    "peft": "PEFT's wrapper",
    "lora_rite": "`lora_rite`",
    "lora_pro_adamw": "`lora_pro_adamw`",
    "lora_muon": "`lora_muon`",
    "ref_lora": "`ref_lora`",
    "alt_lora_plus": "`alt_lora_plus`",
}
"""Method in the records of the benchmark -> its name in a table."""
PRESETS: Final = ("gpt2-medium", "smollm2-135m", "llama-7b")
LIMITS: Final = {"scaled_adamw": "2", "scaled_adamw:before": "2.5"}
"""Limits of `rlora bench run --suite speed` for the mean of times faster than PEFT's wrapper."""


def markdown(head: Sequence[str], rows: Iterable[Sequence[str | None]]) -> str:
    """A table."""
    lines = [head, ["---"] * len(head), *([x or "-" for x in row] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def timed(name: str) -> list[dict[str, Any]]:
    """Rows of a record of the benchmark."""
    rows: list[dict[str, Any]] = json.loads((BENCHMARKS / name).read_text("utf-8"))["rows"]
    return rows


def ratios(name: str) -> dict[str, list[float]]:
    """Multiples of AdamW's step of each method of a record, by rank."""
    found: dict[str, dict[int, float]] = {}
    for row in timed(name):
        found.setdefault(row["method"], {})[row["rank"]] = row["ratio"]
    return {method: [x[rank] for rank in sorted(x)] for method, x in found.items()}


def spreads(records: Mapping[str, str], methods: Iterable[str]) -> str:
    """Tell how far the samples of methods and of AdamW spread in records, and what is rough.

    Records have a name of what was timed on.
    """
    names, found, rough = {"adamw", *methods}, [], []
    for where, record in records.items():
        rows = [row for row in timed(record) if row["method"] in names]
        found += [row["spread"] for row in rows]
        ranks = sorted({row["rank"] for row in rows if row["spread"] > MAX_SPREAD})
        if ranks:
            rough.append(f"rank{'s' * (len(ranks) > 1)} {listed(map(str, ranks))} on {where}")
    text = f"Samples, AdamW's too, spread by {100 * min(found):.0f} to {100 * max(found):.0f} %."
    if rough:
        text += (
            f" Rough, as some spread by more than the benchmark's limit of "
            f"{100 * MAX_SPREAD:.0f} %: {'; '.join(rough)}."
        )
    return text


def listed(words: Iterable[str]) -> str:
    """Words as a list in a sentence."""
    *first, last = words
    return f"{', '.join(first)} and {last}" if first else last


def noted(records: Mapping[str, str]) -> str:
    """The spreads of a table's methods, for below it."""
    return filled(spreads(records, TIMED))


def filled(text: str) -> str:
    """A paragraph in lines."""
    return textwrap.fill(text, 100, break_on_hyphens=False)


def times(values: Iterable[float]) -> list[str]:
    """Multiples with the digits that a measurement has."""
    return [f"{x:.1f}" if x < 20 else f"{x:.0f}" for x in values]


def share(row: Mapping[str, Any]) -> float:
    """The optimizer's share of a training step."""
    step, rest = row["median_s"], row["forward_backward_s"]
    return float(step / (step + rest))


def costs() -> str:
    """A step of the default and of PEFT's wrapper."""
    rows = [
        [f"{name}, {where}", *times(ratios(record)[method])]
        for record, where in ((CPU, "two CPU threads"), (GPU, "one NVIDIA H200"))
        for method, name in (
            ("scaled_adamw", "`ScaledAdamW`"),
            ("peft", "PEFT's Riemannian wrapper"),
        )
    ]
    pairs = {row["pairs"] for record in (CPU, GPU) for row in timed(record)}
    text = COSTS.format(
        pairs=listed(map(str, sorted(pairs))),
        spreads=spreads({"two CPU threads": CPU, "one NVIDIA H200": GPU}, ("scaled_adamw", "peft")),
    )
    table = markdown(["rank", "4", "16", "64"], rows)
    return f"{filled(text)}\n\n{table}"


def cpu_steps() -> str:
    """A step of each method on the shapes of three models."""
    found = [ratios(f"cpu-{preset}.json") for preset in PRESETS]
    rows = [
        [name, *(", ".join(times(x[method])) for x in found)]
        for method, name in TIMED.items()
        if all(method in x for x in found)
    ]
    records = {preset: f"cpu-{preset}.json" for preset in PRESETS}
    return f"{markdown(['method', *PRESETS], rows)}\n\n{noted(records)}"


def gpu_steps() -> str:
    """A step of each method on a GPU, and its operations."""
    found, operations = ratios(GPU), {row["method"]: row["operations"] for row in timed(GPU)}
    rows = [
        [name, *times(found[method]), f"{operations[method]}"]
        for method, name in TIMED.items()
        if method in found
    ]
    table = markdown(["method", "r = 4", "16", "64", "operations"], rows)
    return f"{table}\n\n{noted({'this GPU': GPU})}"


def graphs() -> str:
    """Milliseconds of a step, launched kernel by kernel and replayed from a CUDA graph."""
    found: dict[str, dict[str, list[str]]] = {}
    with Path(__file__).with_name("graphs.csv").open(encoding="utf-8", newline="") as file:
        for row in csv.DictReader(file):
            times = found.setdefault(row["method"], {}).setdefault(row["dtype"], [])
            times.append(f"{float(row['eager [ms]']):.1f} → {float(row['graph [ms]']):.2f}")
    names = {"adamw": "fused AdamW", **TIMED}
    rows = [[names[method], *x["float32"], *x["bfloat16"]] for method, x in found.items()]
    return markdown(["method", "r = 4", "16", "64", "4, bfloat16", "16", "64"], rows)


def against_peft() -> str:
    """Multiples of PEFT's speed, over presets and ranks."""
    rows = []
    for method, limit in LIMITS.items():
        gains = []
        for preset in PRESETS:
            measured = timed(f"cpu-{preset}.json")
            samples = {(row["method"], row["rank"]): row["samples_s"] for row in measured}
            ours = [(rank, x) for (name, rank), x in samples.items() if name == method]
            gains += [median(round_ratios(samples["peft", rank], x)) for rank, x in ours]
        low, high, mean = times((min(gains), max(gains), geometric_mean(gains)))
        rows.append([TIMED[method], f"{low} to {high}", mean, limit])
    return markdown(["", "times faster", "geometric mean", "limit"], rows)


def training() -> str:
    """Shares of a training step."""
    names = {"adamw": "fused AdamW", **TIMED}
    rows = [
        [names[x["method"]], f"{1e3 * x['median_s']:.3g} ms", f"{share(x):.1%}"]
        for x in timed("cpu-training.json")
        if x["method"] in names
    ]
    return markdown(["optimizer", "step", "share of step, forward and backward"], rows)


TABLES: Final = {
    "costs": costs,
    "steps on a CPU": cpu_steps,
    "steps on a GPU": gpu_steps,
    "steps in a CUDA graph": graphs,
    "against PEFT": against_peft,
    "training": training,
}
"""Name in the marks -> the table."""

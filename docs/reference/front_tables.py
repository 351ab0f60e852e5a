"""Write the tables of the study and of the speed, from their records, between their marks.

python docs/reference/front_tables.py
"""

import csv
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Final

from marks import between
from speed_tables import TABLES as SPEED, markdown, share, timed

ROOT: Final = Path(__file__).parents[2]
PAGES: Final = [
    ROOT / "README.md",
    ROOT / "docs" / "reference" / "speed.md",
    ROOT / "docs" / "reference" / "study.md",
]
STUDY: Final = ROOT / "docs" / "reference" / "study"

LOSSES: Final = """
*Test loss, cross-entropy in natural logarithms (lower is better), each with a learning
rate of its own sweep; betas in parentheses; bold: the lowest. `pronounce`: words to
phonemes; `chain_sum`: sums of several numbers. Means of three seeds, of the digits of 20.
`ScaledAdamW` had a damping of 1e-4, in 640 steps today's 1e-2.*

"""
SECONDS: Final = """
*Validation loss, nats a digit, at the best rate: at equal steps; at equal seconds.
Share: the optimizer's of a training step.*

"""
METHODS: Final = {
    "adamw": "AdamW (0.9, 0.999)",
    "adamw-fast": "AdamW (0.7, 0.8)",
    "scaled": "`ScaledAdamW` (0.7, 0.8)",
    "lora-plus-fast": "`LoRAPlus` (0.7, 0.8)",
}
BEFORE: Final = {"scaled": "scaled-both-fast"}
"""Stand-in of a method in runs of 160 and 200 steps: the default had a damping of 1e-4."""

TASKS: Final = {
    ("pronounce", "8", "160"): "SmolLM2-135M, `pronounce`, rank 8",
    ("pronounce", "8", "640"): "the same, 640 steps",
    ("pronounce", "32", "160"): "SmolLM2-135M, `pronounce`, rank 32",
    ("chain_sum", "8", "160"): "SmolLM2-135M, `chain_sum`, rank 8",
    ("chain_sum", "8", "640"): "the same, 640 steps",
    ("chain_sum", "32", "160"): "SmolLM2-135M, `chain_sum`, rank 32",
    ("rotated", "8", "200"): "rotated digits, rank 8",
}
BETAS: Final = {
    "AdamW": ("adamw-fast", "adamw-0.9-0.95", "adamw", "adamw-growing"),
    "`ScaledAdamW`": ("scaled", "scaled-0.9-0.95", "scaled-usual", "scaled-growing"),
}
FEW: Final = "adamw|adamw-fast|lora-plus-16-fast|scaled|lora-rite-fast"
ALL: Final = f"{FEW}|lora-pro-fast|alt-lora-plus-fast|lora-muon|lora-pro-sgd"

Row = dict[str, str]
LOSS: Final = "validation loss [nats/digit]"


def read(name: str, methods: str = ".*") -> list[Row]:
    """Rows of a table of the study, of methods whose names match a pattern."""
    with (STUDY / name).open(encoding="utf-8", newline="") as file:
        return [row for row in csv.DictReader(file) if re.fullmatch(methods, row["method"])]


def bold(cells: Sequence[str]) -> list[str]:
    """Cells of numbers, the lowest in bold; those that were not run are empty."""
    low = min((float(x) for x in cells if x), default=None)
    return [f"**{x}**" if x and float(x) == low else x for x in cells]


def losses() -> str:
    """Test losses of SmolLM2 and the digits, methods that matter most."""
    found = {
        (x["dataset"], x["rank"], x["steps"], x["method"]): x["test loss [nats]"]
        for x in read("results.csv")
    }

    def loss(task: tuple[str, str, str], method: str) -> str:
        return found.get((*task, method)) or found.get((*task, BEFORE.get(method, "")), "")

    rows = [
        [name, *(x or "not run" for x in bold([loss(task, m) for m in METHODS]))]
        for task, name in TASKS.items()
    ]
    return LOSSES + markdown(["task", *METHODS.values()], rows)


def betas() -> str:
    """Lowest losses by betas and length, and worst regrets."""
    best = {
        (x["dataset"], x["steps"], x["method"]): f"{float(x[LOSS]):.3f}"
        for x in read("strings/best_losses.csv")
        if x["rank"] == "4"
    }
    regrets = {x["method"]: x for x in read("strings/beta_regrets.csv")}
    rows = []
    for family, names in BETAS.items():
        for task in ("fall", "cipher-noisy"):
            for steps in ("160", "3000"):
                cells = [best.get((task, steps, name), "") for name in names]
                if sum(map(bool, cells)) > 1:
                    rows.append([f"{family}, `{task}`, {steps} steps", *bold(cells)])
        for rates in ("best rates", "one rate"):
            cells = [regrets[name][f"worst regret, {rates} [nats/digit]"] for name in names]
            cells = bold([f"{float(cell):.3f}" for cell in cells])
            rows.append([f"{family}, worst regret, {rates}", *cells])
    head = ("(0.7, 0.8)", "(0.9, 0.95)", "(0.9, 0.999)", "1 - t^-0.8")
    return markdown(["method, task", *head], rows)


STEP: Final = {"adamw-fast": "adamw", "scaled": "scaled_adamw", "lora-rite-fast": "lora_rite"}
"""Method of the study -> the same in the record of a training step; AdamW first."""
LENGTHS: Final = (160, 300, 1000)
TASKS_APART: Final = ("fall", "reverse_plus_three", "cipher-noisy")
"""Main tasks on strings that tell methods apart."""


def at_steps(losses: Mapping[int, float], steps: float) -> float:
    """The loss at a number of steps, on a line between its neighbours: logarithm by logarithm."""
    low = max(n for n in losses if n <= steps)
    if low == steps:
        return losses[low]
    high = min(n for n in losses if n > steps)
    part = math.log(steps / low) / math.log(high / low)
    return math.exp((1 - part) * math.log(losses[low]) + part * math.log(losses[high]))


def seconds() -> str:
    """Losses of strings at equal steps and in equal time, where all of `STEP` have all lengths."""
    shares = {x["method"]: share(x) for x in timed("cpu-training.json")}
    found: dict[str, dict[str, dict[int, float]]] = {}
    for x in read("strings/best_losses.csv", "|".join(STEP)):
        if x["rank"] == "4" and int(x["steps"]) in LENGTHS:
            runs = found.setdefault(x["dataset"], {}).setdefault(x["method"], {})
            runs[int(x["steps"])] = float(x[LOSS])
    tasks = [
        task
        for task in TASKS_APART
        if [len(found.get(task, {}).get(name, ())) for name in STEP] == [len(LENGTHS)] * len(STEP)
    ]
    rows = []
    for steps in LENGTHS[1:]:
        for name, timed_as in STEP.items():
            # The rest of a training step takes the same time with every optimizer.
            fewer = steps * (1 - shares[timed_as]) / (1 - shares["adamw"])
            runs = [found[task][name] for task in tasks]
            later = [f"{at_steps(x, fewer):.4f}" if fewer >= LENGTHS[0] else "-" for x in runs]
            cells = [f"{x[steps]:.4f}; {y}" for x, y in zip(runs, later, strict=True)]
            rows.append([f"`{name}`", f"{shares[timed_as]:.1%}", f"{steps}; {fewer:.0f}", *cells])
    return SECONDS + markdown(["method", "share", "steps", *(f"`{x}`" for x in tasks)], rows)


def best_losses() -> str:
    """Lowest losses and exact answers."""
    found: dict[str, Row] = {}
    for x in read("strings/best_losses.csv", ALL):
        if (x["rank"], x["steps"]) == ("4", "300") and x["dataset"] in TASKS_APART:
            cell = f"{float(x[LOSS]):.3f} ({x['exact [%]']})"
            found.setdefault(x["method"], {})[x["dataset"]] = cell
    rows = [
        [f"`{name}`", *map(row.get, TASKS_APART)] for name, row in found.items() if len(row) > 1
    ]
    return markdown(["method", *(f"`{task}`" for task in TASKS_APART)], rows)


def wins() -> str:
    """Settings in which a method is better, or worse, than AdamW on test."""
    rows = ([f"`{x.pop('method')}`", *x.values()] for x in read("strings/test_wins.csv", FEW))
    return markdown(["method", "settings", "better", "worse", "mean", "median", "exact"], rows)


def suggested_rate() -> str:
    """Regrets at the rate of `rlora.suggest_lr`."""
    rows = []
    for x in read("strings/suggested_rate.csv", f"{FEW}|scaled-prodigy"):
        counts = (x["settings"], x["regret at most 0.02 nats"], x["regret at most 2 % of guessing"])
        regrets = (x[f"{name} regret [nats/digit]"] for name in ("mean", "worst"))
        rows.append([f"`{x['method']}`", *counts, *regrets, x["exact [%]"]])
    head = ("settings", "close", "within 2 %", "mean", "worst", "exact")
    return markdown(["method", *head], rows)


def regret_by_rate() -> str:
    """Mean regret of rates up to a factor of 8 from the best single one."""
    found: dict[str, Row] = {}
    for x in read("strings/regret_by_rate.csv", FEW):
        if not 0.001 <= float(x["learning rate"]) <= 0.064:
            continue
        found.setdefault(x["method"], {})[x["learning rate"]] = x["mean regret [nats/digit]"]
    rows = ([f"`{name}`", *row.values()] for name, row in found.items())
    return markdown(["method", *next(iter(found.values()))], rows)


def changed_factors() -> str:
    """Losses of unusual factors at the rate of the usual ones, and at their own."""
    found: dict[str, Row] = {}
    for x in read("strings/changed_factors.csv", FEW.partition("|")[2]):
        cell = f"{x['loss at that rate [nats/digit]']} ({x['lowest loss [nats/digit]']})"
        row = found.setdefault(x["method"], {"usual": x["usual loss [nats/digit]"]})
        row[x["dataset"]] = cell
    heads = ("usual", "fall-large-start", "fall-small-start", "fall-bfloat16")
    rows = ([f"`{name}`", *(row[head] for head in heads)] for name, row in found.items())
    return markdown(["method", "usual", "A times 8", "A / 8", "bfloat16"], rows)


TABLES: Final = {
    **SPEED,
    "losses": losses,
    "betas": betas,
    "best losses": best_losses,
    "seconds": seconds,
    "wins": wins,
    "suggested rate": suggested_rate,
    "regret by rate": regret_by_rate,
    "changed factors": changed_factors,
}
"""Name in the marks -> the table."""


def rewritten(text: str) -> str:
    """A page with all tables as they are now."""
    for begin, name in re.findall("(<!-- (.*): made by front_tables.py -->)", text):
        text = between(text, begin, "<!-- end -->", TABLES[name]())
    return text


def check_marks() -> None:
    """ValueError unless every table has its marks on a page."""
    text = "".join(page.read_text("utf-8") for page in PAGES)
    if lost := [x for x in TABLES if f"<!-- {x}: made by front_tables.py -->" not in text]:
        msg = f"expected marks of every table on a page, found none of {', '.join(lost)}"
        raise ValueError(msg)


if __name__ == "__main__":
    check_marks()
    for page in PAGES:
        page.write_text(rewritten(page.read_text("utf-8")), "utf-8")

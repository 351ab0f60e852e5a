"""Write defaults.md: every default of every public function and class, from their signatures.

python docs/reference/defaults.py
"""

import inspect
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Final

import torch

import rlora.torch
from rlora import initializers, methods

PAGE: Final = Path(__file__).with_suffix(".md")

DAMPING: Final = "[damping](../explanation/damping.md)"
DECISION: Final = "[decision 10](../decisions/0010-null-space.md)"
GOOD: Final = "[widest range of good rates](study.md#a-small-language-model-and-digits)"
PRECISION: Final = "[precision](../explanation/precision.md)"

WHY: Final[dict[str, str]] = {
    "adam=False": "the theory's; the authors' large runs use AdamW",
    "adapter=None": "all adapters of the model",
    "amsgrad=False": "torch's",
    "b1=0.7": "[lower loss](study.md#betas) than Adam's",
    "b1=0.9": "Adam's",
    "b1=0.95": "Muon's",
    "b2=0.8": "[lower loss](study.md#betas) than Adam's",
    "b2=0.999": "Adam's",
    "balance=False": "the authors' code",
    "bound=0.01": "1 % of a W0 of unit size; set it to 1 % of yours, over s",
    "bias_correction=True": "Adam's",
    "capturable=False": "torch's",
    "compute_dtype=None": f"the parameters' own, at least float32: {PRECISION}",
    "damping=0.0001": f"the size of a squared step: {DECISION}",
    "damping=0.01": f"bounds A while B is near zero, and the growth of both: {DECISION}",
    "damping=1e-06": "small; not tuned",
    "damping_mode='covariant'": f"keeps every invariance: {DAMPING}",
    "damping_mode='relative'": f"keeps scalings and rotations: {DAMPING}",
    "d0=0.0001": "below the rates that adapters need; at first it grows tenfold in some ten steps",
    "dampening=0.0": "torch's",
    "decay='before'": "torch's AdamW; the authors' code has \"after\"",
    "eps=1e-06": "the authors' code",
    "eps=1e-08": "Adam's",
    "eps_form='torch'": "added to the root of the corrected second moment",
    "escape=False": "the authors' code; the paper's algorithm has it on",
    "first='B'": "from B = 0 only B can move",
    "foreach=None": "torch decides",
    "form='algorithm'": "the paper's algorithm, as its code runs",
    "form='matrix'": "the paper's general form",
    "form='original'": "the paper's; PEFT's differs",
    "frozen='A'": "as LoRA-FA; the paper has both",
    "fused=None": "torch decides",
    "gamma=0.0078125": "1/128, the authors' code",
    "gamma=16.0": "the paper's",
    "gauge='sylvester'": "the authors' older code",
    "inner=None": "see the method's page",
    "lr=0.001": "torch's; for `ScaledAdamW` take `suggest_lr(model)`",
    "lr=1.0": "`ScaledProdigy` finds the rate, which this multiplies",
    "max_norm=None": "off: a guard changes the update; the authors' code has 1.0",
    "max_rms=None": "off: a guard changes the update; the authors' code has 1.0",
    "maximize=False": "torch's",
    "mode='efficient'": 'the state of Adam; "full" keeps 2mn numbers',
    "momentum=0.0": "torch's SGD",
    "momentum=0.9": "the usual heavy ball",
    "nesterov=False": "torch's SGD",
    "nesterov=True": "Muon's",
    "shrink=0.0005": "the example in the authors' code",
    "order='jacobi'": "the paper's algorithm and PEFT; the authors' Adam code has \"gauss_seidel\"",
    "pairs=None": "found by name and shape",
    "placement='both'": f"{GOOD}, two tasks of three",
    "alpha=1.0": "A of unit scale; not tuned",
    "eta=1.0": "the paper's",
    "offset=False": "the paper's",
    "size=0.1": "PEFT's",
    "size=1.0": "A as in PEFT's plain start",
    "ratio=16.0": "the paper's",
    "rho=10.0": "the paper's",
    "scaling=1.0": "s of `W0 + s B A`",
    "scaling=None": "each layer's own s, else 1",
    "seed=0": "the same start every time",
    "oversample=10": "usual",
    "iterations=4": "usual",
    "stochastic_rounding=True": "[bfloat16 drops small steps](../decisions/0015-rounding.md)",
    "weight_decay=0.0": "opt in",
    "weight_decay=0.01": "torch's AdamW",
}
"""The reason for each default, wherever it stands."""

HEAD: Final = """# All defaults, with reasons

Look up what an option is when you do not set it, and why. A class of `rlora.torch` has the defaults
of its method (`b1`, `b2` are `betas`) and its own. "Others": all others that have the option.
"""

Named = Sequence[tuple[str, Callable[..., Any]]]


def defaults(things: Named, known: Named = ()) -> dict[str, dict[str, list[str]]]:
    """By option and default, the names of the things that have it and are not known for it."""
    there = {(plain(name), repr(option)) for name, thing in known for option in options(thing)}
    found: dict[str, dict[str, list[str]]] = {}
    for name, thing in things:
        for option in options(thing):
            if (plain(name), repr(option)) not in there and not (known and option[0] == "betas"):
                found.setdefault(option[0], {}).setdefault(option[1], []).append(name)
    return dict(sorted(found.items()))


def options(thing: Callable[..., Any]) -> list[tuple[str, str]]:
    """Names and defaults of what can be left out."""
    return [
        (option.name, repr(option.default))
        for option in inspect.signature(thing).parameters.values()
        if option.default is not inspect.Parameter.empty
    ]


def table(title: str, things: Named, known: Named = ()) -> list[str]:
    """A section with a row for each reason: the defaults that have it, and of what."""
    rows: dict[str, dict[str, list[str]]] = {}
    for option, values in defaults(things, known).items():
        usual = max(values.values(), key=len)
        for value, names in sorted(values.items()):
            default = f"{option}={value}"
            others = len(values) > 1 and names is usual and len(names) > 2
            of = "others" if others else said(names, [name for name, _ in things])
            rows.setdefault(WHY[default], {}).setdefault(of, []).append(f"`{default}`")
    lines = []
    for why, found in rows.items():
        cell = "; ".join(f"{', '.join(options)}: {of}" for of, options in found.items())
        lines.append(f"| {cell} | {why} |")
    return [f"\n## {title}\n", "| default: of | why |", "| --- | --- |", *lines]


def plain(name: str) -> str:
    """The name that a method and its class have in common."""
    return name.replace("_", "").lower()


def said(names: list[str], every: list[str]) -> str:
    """The names, or those that are missing where these are fewer."""
    missing = [name for name in every if name not in names]
    listed = ", ".join(f"`{name}`" for name in (missing if len(missing) < len(names) else names))
    if not missing:
        return "all"
    return f"all but {listed}" if len(missing) < len(names) else listed


def classes() -> list[tuple[str, Any]]:
    """The torch optimizers, in the order of their names."""
    named = ((name, getattr(rlora.torch, name)) for name in rlora.torch.__all__)
    return [
        (name, kind)
        for name, kind in named
        if isinstance(kind, type) and issubclass(kind, torch.optim.Optimizer)
    ]


def page() -> str:
    """The whole page."""
    starts = [(name, getattr(initializers, name)) for name in initializers.__all__]
    functions = [(name, getattr(methods, name)) for name in methods.__all__]
    tables = [
        table("Methods", functions),
        table("Torch classes", classes(), functions),
        table(
            "Initializers", [(name, thing) for name, thing in starts if inspect.isfunction(thing)]
        ),
    ]
    return "\n".join([HEAD.rstrip(), *(line for lines in tables for line in lines)]) + "\n"


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")

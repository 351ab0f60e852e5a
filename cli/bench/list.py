"""``rlora bench list``: every name that `rlora bench run` takes, a line each."""

import inspect
from collections.abc import Mapping

import click
from rich.table import Table
from rich.text import Text

import rlora.backends
import rlora.methods
from rlora.cli.console import console, counted, one_line, text_table

from .cases import VARIANTS
from .presets import PRESETS

THIRD_PARTY = {
    "torch.adamw": "torch's AdamW, fused; or torch.adamw:foreach",
    "peft": "PEFT's Riemannian wrapper over fused AdamW",
    "optax.adamw": "optax's AdamW, jitted",
    "bitsandbytes": "its 8-bit AdamW, where it is installed",
    "torchao": "its 8-bit AdamW, where it is installed",
    "module:Class": "any torch optimizer, called as Class(params, lr=...)",
}


@click.command("list")
def listing() -> None:
    """List methods, backends, presets and third-party optimizers."""
    out = console()
    out.print(_table("--method", methods()))
    out.print(_table("--backend", backends()))
    out.print(_table("--preset", presets()))
    out.print(_table("--against", THIRD_PARTY))


def methods() -> dict[str, str]:
    """Every method with the first line of its docstring; variants beside it."""
    found = {}
    for name in rlora.methods.__all__:
        method = getattr(rlora.methods, name)
        summary = (inspect.getdoc(method) or "").partition("\n")[0]
        if "placement" in inspect.signature(method).parameters:
            summary += f" Also {', '.join(f'{name}:{variant}' for variant in VARIANTS)}."
        found[name] = summary
    return found


def backends() -> dict[str, str]:
    """Every backend with its devices, or why it cannot be used."""
    return {
        name: ", ".join(info.devices) if info.usable else one_line(info.why_not or "unusable")
        for name, info in rlora.backends.available().items()
    }


def presets() -> dict[str, str]:
    """Every preset with its targets and sizes; then how to say any other."""
    found = {
        name: f"{preset.targets}: {counted(len(preset.pairs()), 'pair')}, "
        + ", ".join(f"{m}x{n}" for m, n in dict.fromkeys(preset.shapes))
        for name, preset in PRESETS.items()
    }
    return {**found, "MxN*K": "any size: K pairs for weights of M x N, as in 1024x1024*24"}


def _table(title: str, lines: Mapping[str, str]) -> Table:
    table = text_table(title, "")
    for name, text in lines.items():
        table.add_row(Text(name), Text(text))
    return table

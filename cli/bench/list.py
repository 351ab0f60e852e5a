"""``rlora bench list``: every name that `rlora bench run` takes, a line each."""

import inspect

import click

import rlora.backends
import rlora.methods
from rlora.cli.console import console, text_table
from rlora.cli.info import usable
from rlora.pairing.report import number_of

from .cases import BASELINES, VARIANTS
from .problem import PRESETS
from .third_party import KNOWN


@click.command("list")
def listing() -> None:
    """List methods, backends, presets and third-party optimizers."""
    out = console()
    backends = {name: usable(found) for name, found in rlora.backends.available().items()}
    found = {"method": methods(), "backend": backends, "preset": presets(), "against": KNOWN}
    for option, lines in found.items():
        out.print(text_table(f"--{option}", "", rows=lines.items()))


def methods() -> dict[str, str]:
    """Every method with the first line of its docstring; variants beside it."""
    found = {name: f"Plain {kind}, a baseline." for name, kind in BASELINES.items()}
    for name in rlora.methods.__all__:
        method = getattr(rlora.methods, name)
        summary = (inspect.getdoc(method) or "").partition("\n")[0].replace("``", "")
        if "placement" in inspect.signature(method).parameters:
            summary += f" Also {', '.join(f'{name}:{variant}' for variant in VARIANTS)}."
        found[name] = summary
    return found


def presets() -> dict[str, str]:
    """Every preset with its targets and sizes; then how to say any other."""
    found = {
        name: f"{preset.targets}: {number_of(len(preset.pairs()), 'pair')}, "
        + ", ".join(f"{m}x{n}" for m, n in dict.fromkeys(preset.shapes))
        for name, preset in PRESETS.items()
    }
    return {**found, "MxN*K": "any size: K pairs for weights of M x N, as in 1024x1024*24"}

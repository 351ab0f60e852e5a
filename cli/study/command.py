"""``rlora study``: optimizers for LoRA on a real model, each at its own best learning rate."""

from itertools import product
from pathlib import Path

import click

from rlora.cli.app import several
from rlora.cli.console import console
from rlora.cli.records import check_folder

from .models import MODELS, check_installed, module_of


@click.command(epilog="Options that take several may be repeated, or use commas.")
@click.option(
    "--model",
    type=click.Choice(list(MODELS)),
    default="smollm2",
    show_default=True,
    help="The last three want a GPU.",
)
@several("--dataset", "datasets", help="The model's first, if not given.")
@click.option("--weights", help="Of a large model: its name on the hub, or a folder.")
@click.option("--data", type=Path, help="Of a large model: a folder; else they come from the hub.")
@click.option("--device", help="cpu; for a large model cuda. Strings and smollm2 run on both.")
@several("--rank", "ranks", kind=click.IntRange(1), help="8, or what the paper has, if not given.")
@several(
    "--steps",
    "lengths",
    kind=click.IntRange(2),
    help="Lengths of a run, instead of the usual ones.",
)
@several("--method", "names", help="Only these.")
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
    check_folder("--output", output)
    if data is not None and MODELS[model].large and not data.is_dir():
        msg = f"--data {data} is no folder; give the one with the dataset's files, or leave it out"
        raise NotADirectoryError(msg)
    check_installed(model, tables=tables)
    from .regret import write_regrets  # torch, and more: not for `rlora --help`
    from .runner import run_study
    from .tables import write_tables
    from .workloads import Place, check_names

    if not tables:
        datasets = datasets or tuple(module_of(model).DATASETS)[:1]
        check_names(model, datasets, names)
        device = device or ("cuda" if MODELS[model].large else "cpu")
        place = Place(model, output / "kept", quick, device, weights, data)
        place.check()
        settings = list(product(datasets, ranks or (None,), lengths or (None,)))
        run_study(place, settings, names, processes, output)
    (write_regrets if MODELS[model].stacked else write_tables)(output)
    console().print(f"records, tables and plots: {output}")

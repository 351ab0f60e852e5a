"""``rlora study``: optimizers for LoRA on a real model, each at its own best learning rate."""

from itertools import product
from pathlib import Path

import click
from click.core import ParameterSource

from rlora.cli.app import several
from rlora.cli.records import check_folder

from .models import MODELS, check_installed, module_of


@click.command(epilog="Options that take several may be repeated, or use commas.")
@click.option(
    "--model",
    type=click.Choice(list(MODELS)),
    default="smollm2",
    show_default=True,
    help="gpt2, mistral and diffusion need a GPU.",
)
@several(
    "--dataset",
    "datasets",
    help="Dataset; default the model's first. May be repeated.",
)
@click.option(
    "--weights",
    help="Model name on the hub or a folder (gpt2, mistral, diffusion only).",
)
@click.option(
    "--data",
    type=Path,
    help="Folder with the dataset; without it, it is downloaded (the same models).",
)
@click.option(
    "--device",
    help="Default cpu; for gpt2, mistral and diffusion cuda. strings and smollm2 run on both.",
)
@several(
    "--rank",
    "ranks",
    kind=click.IntRange(1),
    help="LoRA rank, at least 1; default 8, or the paper's. May be repeated.",
)
@several(
    "--steps",
    "lengths",
    kind=click.IntRange(2),
    help="Training steps of a run, at least 2; default by model. May be repeated.",
)
@several("--method", "names", help="Run only this method. May be repeated.")
@click.option(
    "--processes",
    type=click.IntRange(1),
    default=2,
    show_default=True,
    help="Processes side by side (strings, digits, smollm2).",
)
@click.option(
    "--output",
    type=Path,
    default=Path("build/study"),
    show_default=True,
    help="Folder of records, tables and plots.",
)
@click.option("--quick", is_flag=True, help="Two methods, few steps: to see that it runs.")
@click.option("--tables", is_flag=True, help="Only write tables and plots of the records there.")
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
    check_given(model, tables=tables)
    check_folder("--output", output)
    if data is not None and MODELS[model].large and not data.is_dir():
        msg = f"--data {data} is no folder; give the one with the dataset's files, or leave it out"
        raise NotADirectoryError(msg)
    check_installed(model, tables=tables)
    from .runner import run_study  # torch, and more: not for `rlora --help`
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
    write_tables(output)
    click.echo(f"records, tables and plots: {output}")


def check_given(model: str, *, tables: bool) -> None:
    """UsageError for an option that would have no effect."""
    context = click.get_current_context()
    given = [
        option.opts[0]
        for option in context.command.params
        if context.get_parameter_source(str(option.name)) is not ParameterSource.DEFAULT
    ]
    if tables and (idle := [x for x in given if x not in ("--tables", "--output")]):
        msg = f"--tables trains nothing and reads all records: leave {', '.join(idle)} out"
        raise click.UsageError(msg)
    if MODELS[model].large and "--processes" in given:
        msg = f"{model} runs in one process, as it fills a GPU: leave --processes out"
        raise click.UsageError(msg)

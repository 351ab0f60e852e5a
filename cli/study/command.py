"""``rlora study``: optimizers for LoRA on a real model, each at its own best learning rate."""

from pathlib import Path

import click


@click.command()
@click.option("--model", default="smollm2", show_default=True, help="digits, smollm2, ...")
@click.option("--dataset", default="chain_sum", show_default=True, help="One that the model has.")
@click.option("--rank", type=click.IntRange(1), default=8, show_default=True)
@click.option("--contender", "names", multiple=True, help="Only this one; may be repeated.")
@click.option("--processes", type=click.IntRange(1), default=2, show_default=True)
@click.option("--output", type=Path, default=Path("build/study"), show_default=True)
@click.option("--quick", is_flag=True, help="Two contenders, few steps: to see that it runs.")
@click.option("--tables", is_flag=True, help="Train nothing: tables and plots of all records.")
def study(
    model: str,
    dataset: str,
    rank: int,
    names: tuple[str, ...],
    processes: int,
    output: Path,
    quick: bool,
    tables: bool,
) -> None:
    """Fine-tune a model with every contender, and write down what came out.

    Each contender has its own sweep of learning rates, which grows while the best lies at an end;
    the best by validation loss is then run on other seeds, and only those read the test part.
    Every run is written down when it is done: started again, the study goes on where it was.
    """
    from .conduct import conduct  # torch, and more: not for `rlora --help`
    from .tables import write_tables

    if not tables:
        conduct(model, dataset, rank, names, processes, output, quick)
    write_tables(output)

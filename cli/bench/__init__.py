"""``rlora bench``: what a step costs here, beside plain AdamW's, on shapes of real models."""

import click

from rlora.cli.app import LazyGroup

HELP = """Time optimizer steps beside plain AdamW's, on LoRA shapes of models.

`rlora bench` with options and no command is `rlora bench run`: it prints a table, and --output
keeps the record with every sample and the environment. The other commands read records.
"""


class Bench(LazyGroup):
    """The commands; without one, `run`."""

    modules = {  # noqa: RUF012
        "compare": "rlora.cli.bench.compare",
        "export": "rlora.cli.bench.export",
        "list": "rlora.cli.bench.list",
        "report": "rlora.cli.bench.report",
        "run": "rlora.cli.bench.run",
        "show": "rlora.cli.bench.table",
    }

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        if not args or (args[0].startswith("-") and args[0] != "--help"):
            args = ["run", *args]
        return super().parse_args(ctx, args)


@click.group(cls=Bench, help=HELP, epilog="`rlora bench run --help` has the options.")
def bench() -> None:
    pass

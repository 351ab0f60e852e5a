"""The command group, and the one door through which errors become messages and exit codes."""

import sys
from typing import Any, Final, NoReturn

import click

import rlora
from rlora import RLoraError

from .console import escape_unencodable, one_line
from .lazy import Lazy

COMMANDS: Final = {
    "bench": "rlora.cli.bench",
    "info": "rlora.cli.info",
    "reproduce": "rlora.cli.claims.reproduce",
    "study": "rlora.cli.study",
}
"""Command -> the module that has it under its name."""

USAGE, INTERRUPTED = 2, 130

REFUSALS = (RLoraError, ValueError, ImportError, MemoryError)
"""Errors of a wrong name, number or machine. Files apart, all else is a bug, with its trace."""


class App(Lazy):
    """The commands, whose errors are one line each."""

    where = COMMANDS

    def main(self, *args: Any, **kwargs: Any) -> NoReturn:
        """Run a command line, then exit with 0, 2 after an error, or 130 after an interrupt."""
        escape_unencodable()
        try:
            code = super().main(*args, **{**kwargs, "standalone_mode": False})
        except click.ClickException as error:
            _refuse(error.format_message(), USAGE)
        except (click.Abort, KeyboardInterrupt):
            _refuse("interrupted", INTERRUPTED)
        except OSError as error:
            _refuse(f"{error.filename}: {error.strerror}" if error.filename else str(error), USAGE)
        except REFUSALS as error:
            _refuse(str(error) or type(error).__name__, USAGE)
        sys.exit(code if isinstance(code, int) else 0)


def _refuse(message: str, code: int) -> NoReturn:
    click.echo(f"rlora: error: {one_line(message)}", err=True)
    sys.exit(code)


@click.group(cls=App, invoke_without_command=True)
@click.version_option(rlora.__version__, prog_name="rlora")
@click.pass_context
def app(ctx: click.Context) -> None:
    """Optimizers for LoRA factors: what they cost here, and what is true of them."""
    if ctx.invoked_subcommand is None:
        click.echo(ctx.get_help())

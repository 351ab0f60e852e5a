"""The command group, and the one door through which errors become messages and exit codes."""

import importlib
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from typing import Any, NoReturn

import click
from click.decorators import FC

import rlora
from rlora import RLoraError

from .console import escape_unencodable, one_line

USAGE, INTERRUPTED, PIPE = 2, 130, 141

REFUSALS = (RLoraError, ValueError, ImportError, MemoryError)
"""Errors of a wrong name, number or machine. Files apart, all else is a bug, with its trace."""

LONGEST = 500
"""Letters of a first sentence, more than any has."""


class LazyGroup(click.Group):
    """A group that imports a command's module when it is asked for."""

    modules: Mapping[str, str] = {}
    """Command -> the module that has it under its name."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return sorted(self.modules)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in self.modules:
            return None
        module = importlib.import_module(self.modules[cmd_name])
        found = (x for x in vars(module).values() if isinstance(x, click.Command))
        return next(command for command in found if command.name == cmd_name)

    def resolve_command(self, ctx: click.Context, args: list[str]) -> Any:
        if args[0] not in self.modules and not ctx.resilient_parsing:
            ctx.fail(
                f"No such command {args[0]!r}; there are {', '.join(self.list_commands(ctx))}."
            )
        return super().resolve_command(ctx, args)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """List the commands with their first sentences, wrapped where click would cut them."""
        found = [(name, self.get_command(ctx, name)) for name in self.list_commands(ctx)]
        with formatter.section("Commands"):
            formatter.write_dl(
                [(name, command.get_short_help_str(LONGEST)) for name, command in found if command]
            )


class App(LazyGroup):
    """The commands, whose errors are one line each."""

    modules = {  # noqa: RUF012
        "bench": "rlora.cli.bench",
        "info": "rlora.cli.info",
        "reproduce": "rlora.cli.claims.reproduce",
        "study": "rlora.cli.study",
    }

    def make_context(self, *args: Any, **kwargs: Any) -> click.Context:
        with _reader_may_go():
            return super().make_context(*args, **kwargs)

    def invoke(self, ctx: click.Context) -> Any:
        with _reader_may_go():
            return super().invoke(ctx)

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


def several(*names: str, kind: Any = click.STRING, **options: Any) -> Callable[[FC], FC]:
    """Make an option that may be repeated, or hold several values with commas; each counts once.

    `kind` is a type of click.
    """

    def split(
        context: click.Context, option: click.Parameter, words: Sequence[str]
    ) -> tuple[Any, ...]:
        parts = [part.strip() for word in words for part in word.split(",")]
        if words and not any(parts):
            msg = f"{option.opts[0]} was given without a value; name one or leave it out"
            raise ValueError(msg)
        return tuple(dict.fromkeys(kind(part, option, context) for part in parts if part))

    metavar = kind.name.upper()
    return click.option(*names, multiple=True, callback=split, metavar=metavar, **options)


@contextmanager
def _reader_may_go() -> Iterator[None]:
    """Exit with 141 when the reader of the output has gone, as `head` goes.

    So a command ends that does not catch the signal; the 1 of click and of rich says of a claim or
    of a timing that it is not as it should be.
    """
    try:
        yield
    except BrokenPipeError:
        pass
    except SystemExit as end:
        if not isinstance(end.__context__, BrokenPipeError):
            raise
    else:
        return
    with suppress(OSError):  # what is left would be written at the end
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    sys.exit(PIPE)


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

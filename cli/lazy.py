"""A group whose commands are imported when they are asked for."""

import importlib
from collections.abc import Mapping
from typing import Any

import click

LONGEST = 500
"""Letters of a first sentence, more than any has."""


class Lazy(click.Group):
    """A click group that knows the module of each command, where it has the module's name."""

    where: Mapping[str, str] = {}

    def list_commands(self, ctx: click.Context) -> list[str]:
        return sorted(self.where)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in self.where:
            return None
        module: Any = importlib.import_module(self.where[cmd_name])
        found = (x for x in vars(module).values() if isinstance(x, click.Command))
        return next(command for command in found if command.name == cmd_name)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """List the commands with their first sentences, wrapped where click would cut them."""
        found = [(name, self.get_command(ctx, name)) for name in self.list_commands(ctx)]
        with formatter.section("Commands"):
            formatter.write_dl(
                [(name, command.get_short_help_str(LONGEST)) for name, command in found if command]
            )

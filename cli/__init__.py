"""The command line: ``rlora bench`` and ``rlora info``."""

__all__ = ["main"]


def main() -> None:
    """Run the command line; what the console script calls."""
    from .app import app

    app(prog_name="rlora")

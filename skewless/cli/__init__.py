"""The command `skewless`. What a command needs is imported when it runs, so that help and completion answer at once."""

from __future__ import annotations

import sys
from collections.abc import Sequence

import typer

# Imported for the commands that they add to `app`.
from skewless.cli import model, package, retraining, serving  # noqa: F401
from skewless.cli.frame import FAILED, MISUSED, NAME, app

__all__ = ["app", "main"]


def main(arguments: Sequence[str] | None = None) -> None:
    """Run a command line, this process's own if None, and exit with its code."""
    line = list(sys.argv[1:] if arguments is None else arguments)
    try:
        code = app(line or ["--help"], prog_name=NAME, standalone_mode=False)
    except typer.TyperException as error:
        context = getattr(error, "ctx", None)
        where = context.command_path if context else NAME
        # pydantic's words around its message.
        message = error.format_message().replace("Value error, ", "")
        print(f"{where}: {message} See `{where} --help`", file=sys.stderr)
        sys.exit(MISUSED)
    except typer.Abort:
        sys.exit(FAILED)
    sys.exit(code or 0)

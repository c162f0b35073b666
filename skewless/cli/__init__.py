"""The command `skewless`. What a command needs is imported when it runs, so that help and completion answer at once."""

from __future__ import annotations

import sys
from collections.abc import Sequence

import typer
from pydantic import ValidationError

# Imported for the commands that they add to `app`.
from skewless.cli import (  # noqa: F401
    adopting,
    health,
    model,
    package,
    programs,
    retraining,
    rollout,
    score,
    serving,
    tuning,
    versions,
)
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
        print(f"{where}: {_explained(error).rstrip('.')}; see `{where} --help`", file=sys.stderr)
        sys.exit(MISUSED)
    except typer.Abort:
        sys.exit(FAILED)
    sys.exit(code or 0)


def _explained(error: typer.TyperException) -> str:
    """What is wrong with a command line, with the value."""
    if not (isinstance(error, typer.BadParameter) and isinstance(error.__cause__, ValidationError) and error.param):
        return error.format_message()
    found = error.__cause__.errors()[0]
    expected = found["msg"].removeprefix("Value error, ").replace("Input should be", "expected")
    return f"{error.param.get_error_hint()} is {found['input']!r}: {expected}"

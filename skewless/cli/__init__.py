"""The command `skewless`. What a command needs is imported when it runs, so that help and completion answer at once."""

from __future__ import annotations

import sys
from collections.abc import Sequence

import typer

from skewless.cli import define, model, package, retraining, serving
from skewless.cli.frame import MISUSED, app

__all__ = ["app", "define", "main", "model", "package", "retraining", "serving"]


def main(arguments: Sequence[str] | None = None) -> None:
    """Run a command line, or this process's own, and exit with its code."""
    try:
        code = app(arguments, prog_name=app.info.name, standalone_mode=False)
    except typer.TyperException as error:
        # Plain lines: a frame around them breaks the paths that they name.
        error.show()
        sys.exit(MISUSED)
    except typer.Abort:
        sys.exit(1)
    sys.exit(code or 0)

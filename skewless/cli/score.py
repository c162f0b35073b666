"""The command that scores folders of files without a server: score."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from skewless.cli.frame import SERVE, Result, app, command


@command(app, "score", panel=SERVE)
def score(
    archive: Annotated[Path, typer.Argument(metavar="MAR", help="A built archive (.mar).")],
    input: Annotated[
        Path,
        typer.Option(
            metavar="DIR|FILE", help="A folder, with its subfolders; a CSV with a column file_path; a list of paths."
        ),
    ],
    out: Annotated[Path, typer.Option(metavar="FILE", help="The Parquet file to write: a row for each file.")],
    root: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="What a list's paths are relative to.", show_default="the list's folder"),
    ] = None,
    threshold: Annotated[
        float | None, typer.Option(min=0.0, max=1.0, help="Decide by this.", show_default="the archive's own")
    ] = None,
    workers: Annotated[
        int | None,
        typer.Option(min=1, help="Processes, each with the model.", show_default="one for the cores that it takes"),
    ] = None,
    address: Annotated[
        str | None,
        typer.Option(
            metavar="HOST:PORT", help="A Ray cluster, whose machines see the same paths.", show_default="this machine"
        ),
    ] = None,
) -> Result:
    """Score every file of a folder or a list with an archive, without a server: the numbers are the server's.

    Interrupted, it goes on where it was when run again with the same arguments. What cannot be read is a row with the
    server's status and reason. Exits with 0 when every file has an answer, with 1 when some could not be read (the rows are
    written all the same) or the workers failed, with 2 for wrong use.
    """
    from skewless.scoring.run import score as run

    summary = run(archive, input, out, root=root, workers=workers, threshold=threshold, address=address)
    return Result(summary, summary.text(), failed=bool(summary.unreadable))

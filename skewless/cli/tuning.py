"""The command that chooses runtime, micro-batch, workers and threads by measuring them: tune."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from skewless.cli.frame import PACKAGE, Archive, Checkpoint, Result, app, command


@command(app, "tune", panel=PACKAGE)
def tune(
    archive: Archive,
    checkpoint: Checkpoint,
    evaluation: Annotated[Path, typer.Option(metavar="DIR", help="What `skewless evaluate` wrote for it.")],
    workers: Annotated[
        int | None, typer.Option(min=1, help="Only this many workers.", show_default="1, and one per core, at most 8")
    ] = None,
    rounds: Annotated[int, typer.Option(min=1, help="How often every candidate is measured in turn.")] = 5,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Measure and print, and write nothing.")] = False,
) -> Result:
    """Measure the runtimes on this machine's CPU, and write the best one into the model's folder.

    Every runtime that can execute the network in fp32 is measured with micro-batches of 1 to 32 rows and with as many
    threads as the workers leave each other, on the evaluation's references. model.yaml gets `runtime` and `threads`,
    model-config.yaml the number of workers, tuning.json the figures. Run it where the model will be served, with nothing else
    running.
    """
    from skewless.tuning.run import tune as run

    tuning = run(archive, checkpoint, evaluation, workers=workers, rounds=rounds, dry_run=dry_run)
    return Result({**tuning.document(), "written": tuning.written}, tuning.text())

"""The command that takes over a model from another service: adopt."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from skewless.cli.frame import PACKAGE, Archive, Device, Result, Root, app, command, device_of
from skewless.cli.package import AcceptUntrained, Classes, Replaced, Scaler, classes_of, references_of


@command(app, "adopt", panel=PACKAGE)
def adopt(
    archive: Archive,
    checkpoint: Annotated[Path, typer.Argument(metavar="FILE", help="What the other framework saved.")],
    predictions: Annotated[
        Path,
        typer.Option(
            metavar="CSV",
            help="What your service answered: file_path and a number of the answer, such as probability; with start_s, a row "
            "for each window.",
        ),
    ],
    out: Annotated[Path, typer.Option(metavar="DIR", help="Folder for all of it. Run again, it goes on from there.")],
    files: Annotated[
        Path | None, typer.Option(metavar="DIR", help="The labelled files: a folder for each class.")
    ] = None,
    manifest: Annotated[
        Path | None, typer.Option(metavar="CSV", help="The labelled files: file_path, label. In place of --files.")
    ] = None,
    root: Root = None,
    tried: Annotated[
        list[Path] | None,
        typer.Option("--try", metavar="YAML", help="A further pipeline to try. May be given several times."),
    ] = None,
    instead: Annotated[
        Path | None,
        typer.Option(
            metavar="YAML", help="Tell what serving this pipeline would change.", show_default="ARCHIVE/pipeline.yaml"
        ),
    ] = None,
    threshold: Annotated[
        float | None,
        typer.Option(min=0.0, max=1.0, help="What your service decides by.", show_default="model.yaml's"),
    ] = None,
    version: Annotated[str, typer.Option(help="The archive's version, such as 1.0.")] = "1.0",
    accept_closest: Annotated[
        bool, typer.Option("--accept-closest", help="Build although no pipeline reproduces the answers.")
    ] = False,
    classes: Classes = None,
    scaler: Scaler = None,
    runtime: Annotated[str | None, typer.Option(help="What executes the network.", show_default="model.yaml's")] = None,
    references: Annotated[
        list[str] | None,
        typer.Option(
            metavar="none|synthetic|FILE",
            help="Recordings that travel in the archive.",
            show_default="some of the labelled files",
        ),
    ] = None,
    replaced: Replaced = None,
    accept_untrained: AcceptUntrained = None,
    device: Device = "cpu",
) -> Result:
    """Take over a model as it is served elsewhere: find its pipeline by what it answered, and package it.

    Every pipeline of the archive is tried; where none gives the recorded numbers, single changes of the closest. The
    one that does goes into the archive, and a page tells what serving it otherwise would change. Exit code 1 where none does.
    """
    from skewless.adoption.adopt import PAGE, AdoptRequest
    from skewless.adoption.adopt import adopt as take_over
    from skewless.adoption.report import as_text, write_html

    report = take_over(
        AdoptRequest(
            archive=archive,
            checkpoint=checkpoint,
            predictions=predictions,
            out=out,
            files=files,
            manifest=manifest,
            root=root,
            pipelines=tried or (),
            instead=instead,
            threshold=threshold,
            version=version,
            accept_closest=accept_closest,
            device=str(device_of(device)),
            runtime=runtime,
            references=references_of(references or ["evaluation"]),
            imported={
                "classes": classes_of(classes),
                "scaler": scaler,
                "replaced": replaced or (),
                "accept_untrained": accept_untrained or (),
            },
        )
    )
    write_html(report, out / PAGE)
    text = f"{as_text(report)}\n\n{out / PAGE}: open it in a browser; all numbers are in {out / 'adoption.json'}"
    return Result(report, text, failed=not report.get("adopted", {}).get("reproduced"))

"""Commands for programs that are not ours, line by line: trace, diff."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from skewless.cli.frame import PACKAGE, Result, app, command
from skewless.errors import UsageError

Program = "FILE.py:function, a recorded *.trace, a pipeline.yaml, a model's folder, or a .mar archive."
Code = Annotated[
    list[Path] | None,
    typer.Option(
        metavar="DIR",
        help="A further folder whose modules are yours. May be given several times.",
        show_default="the folder of FILE.py",
    ),
]
Memory = Annotated[int, typer.Option(metavar="MIB", min=1, help="Arrays of one run are kept whole up to so many MiB.")]


@command(app, "trace", panel=PACKAGE)
def trace(
    function: Annotated[
        str, typer.Argument(metavar="FILE.py:function", help="What to run; its argument is the file's path.")
    ],
    file: Annotated[Path, typer.Argument(metavar="FILE", help="A recording or a picture.")],
    out: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Write the trace, such as run.trace, to compare it elsewhere.")
    ] = None,
    as_pipeline: Annotated[
        Path | None,
        typer.Option(
            "--as-pipeline", metavar="YAML", help="Write a stage list that does the same, as far as it is recognised."
        ),
    ] = None,
    code: Code = None,
    memory: Memory = 256,
) -> Result:
    """Run a function of yours and note every array that its lines compute. Nothing of yours is changed."""
    from skewless.core.files import atomic
    from skewless.programs.draft import draft
    from skewless.programs.program import TracedFunction, function_of
    from skewless.programs.recorder import MIB
    from skewless.programs.report import trace_text

    if out is not None and out.suffix != ".trace":
        raise UsageError(f"--out is {out}, expected a name that ends in .trace")
    if not file.is_file():
        raise UsageError(f"there is no file {file}")
    with TracedFunction(function_of(function, code or ()), memory * MIB) as program:
        traced, plain = program.run(file), program.run(file, plain=True)
    data = {
        "program": traced.program,
        "file": traced.file,
        "events": len(traced.events),
        "seconds": {"traced": traced.seconds, "plain": plain.seconds},
        "outputs": [{"path": o.path, "kind": o.kind, "shape": o.shape, "dtype": o.dtype} for o in traced.outputs],
        "versions": dict(traced.versions),
        "notes": traced.notes,
    }
    text = trace_text(traced, plain.seconds)
    if out is not None:
        traced.write(out)
        text += f"\n\n{out}: {out.stat().st_size / 1e6:.1f} MB"
    if as_pipeline is not None:
        drafted = draft(traced, file)
        with atomic(as_pipeline) as unfinished:
            unfinished.write_text(drafted.text, encoding="utf-8")
        data["draft"] = {"file": as_pipeline, "coverage": drafted.coverage, "closeness": drafted.closeness}
        text += f"\n\n{as_pipeline}: {drafted.as_text()}"
    return Result(data, text)


@command(app, "diff", panel=PACKAGE)
def diff(
    train: Annotated[str, typer.Argument(metavar="TRAIN", help=f"What is right: {Program}")],
    serve: Annotated[str, typer.Argument(metavar="SERVE", help="What is held against it; likewise.")],
    files: Annotated[list[Path], typer.Argument(metavar="FILES...", help="Recordings or pictures.")],
    archive: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR", help="With --checkpoint: the model's folder, to tell what each line does to its probability."
        ),
    ] = None,
    checkpoint: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE", help="best.pth of a training or an import; also for a pipeline with fitted stages."
        ),
    ] = None,
    threshold: Annotated[
        float | None, typer.Option(min=0.0, max=1.0, help="Decide by this probability.", show_default="the model's own")
    ] = None,
    out: Annotated[Path | None, typer.Option(metavar="DIR", help="Folder for index.html and diff.json.")] = None,
    rtol: Annotated[
        float, typer.Option(min=0.0, max=1.0, help="Values closer than this share of the largest number are the same.")
    ] = 1e-5,
    code: Code = None,
    memory: Memory = 256,
) -> Result:
    """Name the first line of a service that computes something its training never has, what it costs, and then the next one.

    Both functions are called with each file's path and return the network's input. Exit code 1 when they part.
    """
    import json

    from skewless.core.files import atomic
    from skewless.programs.diff import diff as compare
    from skewless.programs.page import write_html
    from skewless.programs.pipeline_side import sides_of
    from skewless.programs.recorder import MIB
    from skewless.programs.report import as_text

    if archive is not None and checkpoint is None:
        raise UsageError("--archive needs the weights as well: give --checkpoint")
    if missing := [str(file) for file in files if not file.is_file()]:
        raise UsageError(f"there is no file {missing[0]}")
    score = None
    if archive is not None and checkpoint is not None:
        from skewless.programs.score import network_score

        score, own = network_score(archive, checkpoint, files[0])
        threshold = own if threshold is None else threshold
    reference, candidate = sides_of(train, serve, code or (), checkpoint, memory * MIB)
    try:
        report = compare(reference, candidate, files, rtol=rtol, score=score, threshold=threshold)
    finally:
        reference.close()
        candidate.close()
    text = as_text(report)
    if out is not None:
        out.mkdir(parents=True, exist_ok=True)
        with atomic(out / "diff.json") as unfinished:
            unfinished.write_text(
                json.dumps(report, indent=1, ensure_ascii=False, default=float) + "\n", encoding="utf-8"
            )
        write_html(report, out / "index.html")
        text += f"\n\n{out / 'index.html'}: open it in a browser; all numbers are in {out / 'diff.json'}"
    same = report["files_same"] == report["files_compared"] and not report["unreadable"]
    return Result(report, text, failed=not same)

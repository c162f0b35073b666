"""Commands between a checkpoint and an archive: import, build, export, skew; and its signature: sign, verify."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from skewless.cli.frame import (
    PACKAGE,
    Archive,
    Checkpoint,
    Device,
    Result,
    Root,
    TrustedKeys,
    app,
    command,
    device_of,
)
from skewless.errors import SignatureError, UsageError

if TYPE_CHECKING:
    from skewless.packaging.references import Choice
    from skewless.training.manifest import Recording


AcceptUntrained = Annotated[
    list[str] | None,
    typer.Option(
        metavar="LAYER",
        help="A layer that looks untrained, and rightly so, or 'outputs' where they hardly vary. May be given several times.",
    ),
]


Classes = Annotated[
    str | None,
    typer.Option(
        metavar="A,B,...",
        help="The classes in the order of the file's outputs; to be given where the file does not say it. Of two with one output, "
        "it speaks for the second.",
    ),
]
Replaced = Annotated[
    list[str] | None,
    typer.Option(
        metavar="LAYER",
        help="A layer before a Keras network, such as a Lambda with preprocess_input, of which you know that the "
        "pipeline does the same. May be given several times.",
    ),
]
Scaler = Annotated[
    Path | None,
    typer.Option(
        metavar="FILE",
        help="scikit-learn's fitted StandardScaler, as pickle or joblib saved it, for a pipeline with standard_scaler.",
    ),
]


def classes_of(given: str | None) -> list[str]:
    """The names that an option lists, separated by commas; none where it is not given."""
    return [] if given is None else [name.strip() for name in given.split(",")]


def _runtimes() -> list[str]:
    from skewless.core.runtimes import RUNTIMES

    return list(RUNTIMES)


def _precisions() -> list[str]:
    from skewless.core.numerics import TIERS

    return list(TIERS)


@command(app, "import", panel=PACKAGE)
def import_(
    archive: Archive,
    file: Annotated[Path, typer.Argument(metavar="FILE", help="What another framework saved.")],
    out: Annotated[Path, typer.Option(metavar="FILE", help="The checkpoint to write, such as runs/NAME/best.pth.")],
    pipeline: Annotated[
        Path | None,
        typer.Option(
            metavar="YAML",
            help="What the weights were trained behind; to be given for a PyTorch file, which does not say it.",
            show_default="ARCHIVE/pipeline.yaml",
        ),
    ] = None,
    classes: Classes = None,
    replaced: Replaced = None,
    scaler: Scaler = None,
    accept_untrained: AcceptUntrained = None,
    manifest: Annotated[
        Path | None,
        typer.Option(
            metavar="CSV",
            help="Labelled files: compare the pipelines that there are on them, and the orders of the classes.",
        ),
    ] = None,
    root: Root = None,
    split: Annotated[Literal["val", "test"], typer.Option(help="The part of the manifest.")] = "val",
    predictions: Annotated[
        Path | None, typer.Option(metavar="CSV", help="file_path, probability, as recorded after training.")
    ] = None,
    variants: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Pipelines to compare with.", show_default="ARCHIVE/variants")
    ] = None,
    device: Device = "cpu",
) -> Result:
    """Turn another framework's file into a checkpoint, without running its code.

    Takes PyTorch checkpoints and state dicts, what fastai's learn.save writes, .safetensors, Keras' .keras and .h5, and
    networks saved by torch.export; beside them, a scaler of scikit-learn's. With --manifest, what the file records is held
    against every pipeline.
    """
    from skewless.importers.run import ImportRequest, import_file

    result = import_file(
        ImportRequest(
            archive=archive,
            file=file,
            out=out,
            pipeline=pipeline,
            classes=classes_of(classes),
            replaced=replaced or (),
            scaler=scaler,
            accept_untrained=accept_untrained or (),
            manifest=manifest,
            root=root,
            split=split,
            predictions=predictions,
            variants=variants,
            device=str(device_of(device)),
        )
    )
    if warning := result.warning():
        print(warning)
    return Result(result.to_dict(), result.text())


@command(app, "build", panel=PACKAGE)
def build(
    archive: Archive,
    checkpoint: Checkpoint,
    evaluation: Annotated[Path, typer.Option(metavar="DIR", help="What `skewless evaluate` wrote for it.")],
    version: Annotated[str, typer.Option(help="The archive's version, such as 1.0.")],
    out: Annotated[Path, typer.Option(metavar="DIR", help="The model store.")] = Path("model_store"),
    force: Annotated[bool, typer.Option("--force", help="Replace a different archive of the same version.")] = False,
    accept_untrained: AcceptUntrained = None,
    runtime: Annotated[
        str | None,
        typer.Option(help="What executes the network.", autocompletion=_runtimes, show_default="model.yaml's"),
    ] = None,
    precision: Annotated[
        str | None, typer.Option(help="The runtime's arithmetic.", autocompletion=_precisions, show_default="fp32")
    ] = None,
    manifest: Annotated[
        Path | None,
        typer.Option(metavar="CSV", help="The manifest of --evaluation: bf16, fp16 and int8 are proved on it."),
    ] = None,
    split: Annotated[Literal["train", "val", "test"], typer.Option(help="The split to prove them on.")] = "test",
    decision_exact: Annotated[
        str | None,
        typer.Option(
            metavar="PRECISION",
            help="Ask a fast network in this precision first, such as int8, and the exact one where its decision could be another.",
            autocompletion=_precisions,
        ),
    ] = None,
    fast_runtime: Annotated[
        str, typer.Option(help="What executes that fast network.", autocompletion=_runtimes)
    ] = "openvino",
    confidence: Annotated[
        float, typer.Option(help="Of its margin, from the val split of --manifest: more needs more recordings.")
    ] = 0.999,
    safety_factor: Annotated[
        float, typer.Option(help="What the margin is multiplied by, for recordings unlike the val split's.")
    ] = 2.0,
    calibration_manifest: Annotated[
        Path | None, typer.Option(metavar="CSV", help="Its train split gives int8 its value ranges.")
    ] = None,
    references: Annotated[
        list[str] | None,
        typer.Option(
            metavar="none|synthetic|FILE",
            help="Recordings that travel in the archive: none, only computed ones, or a file, which may be given several times.",
            show_default="those that evaluation kept",
        ),
    ] = None,
    root: Root = None,
    sign: Annotated[
        Path | None,
        typer.Option(metavar="KEY", help="Sign the archive with this private key, as `skewless sign` does."),
    ] = None,
) -> Result:
    """Package a checkpoint as NAME-VERSION.mar, if it gives the numbers that evaluation recorded."""
    from skewless.core.definition import Definition
    from skewless.packaging.build import build_archive
    from skewless.packaging.decision_exact import DecisionExact
    from skewless.packaging.execution import Execution
    from skewless.packaging.signing import ready_to_sign
    from skewless.training.manifest import read_manifest

    if runtime is None and (precision or (decision_exact is None and (manifest or calibration_manifest))):
        raise UsageError(
            "--precision, --manifest and --calibration-manifest go with --runtime, the manifests also with --decision-exact"
        )

    # Before the long work: what is wrong with a key is known now.
    key = None if sign is None else ready_to_sign(sign)

    def recordings(path: Path | None) -> list[Recording]:
        return read_manifest(path, root or path.parent, Definition.read(archive).classes) if path else []

    measured, training = recordings(manifest), recordings(calibration_manifest)
    execution = None if runtime is None else Execution(runtime, precision or "fp32", measured, split, training)
    both = None
    if decision_exact is not None:
        fast = Execution(fast_runtime, decision_exact, measured, split, training)
        both = DecisionExact(fast, confidence, safety_factor)
    built = build_archive(
        archive,
        checkpoint,
        evaluation,
        version,
        out,
        force=force,
        execution=execution,
        decision_exact=both,
        references=references_of(references or ["evaluation"]),
        accept_untrained=accept_untrained or (),
        key=key,
    )
    size = built.path.stat().st_size
    for warning in built.warnings:
        print(f"note: {warning}")
    data = {"archive": built.path, "bytes": size, "warnings": built.warnings, "signed": key and key.fingerprint}
    by = f", signed with the key {key.fingerprint:.16}" if key else ""
    return Result(data, f"{built.path}: {size / 1e6:.1f} MB{by}")


@command(app, "sign", panel=PACKAGE)
def sign(
    archive: Annotated[
        Path | None, typer.Argument(metavar="MAR", help="An archive (.mar).", show_default=False)
    ] = None,
    key: Annotated[
        Path | None, typer.Option(metavar="FILE", help="A private key on the curve P-256, in PEM.", show_default=False)
    ] = None,
    new_key: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Make a key: FILE, and FILE.pub for others.", show_default=False)
    ] = None,
) -> Result:
    """Sign an archive: all of its files, for its name and version. Nothing else in it changes.

    A key's password is read from the environment variable SKEWLESS_SIGN_PASSWORD.
    """
    from skewless.packaging import signing

    if new_key is not None and archive is None and key is None:
        public = signing.new_key(new_key)
        fingerprint = signing.SigningKey.read(new_key).fingerprint
        data = {"key": new_key, "public": public, "fingerprint": fingerprint}
        return Result(
            data, f"{new_key}: keep it to yourself\n{public}: give it to those who run servers\nkey {fingerprint}"
        )
    if archive is None or key is None or new_key is not None:
        raise UsageError("give an archive and --key, or --new-key alone")
    signed = signing.sign_archive(archive, signing.ready_to_sign(key))
    text = f"{archive}: {signed.name} {signed.version}, {signed.files} files, signed with the key {signed.key:.16}"
    return Result({"archive": archive, "signed": signed}, text)


@command(app, "verify", panel=PACKAGE)
def verify(
    archive: Annotated[Path, typer.Argument(metavar="MAR", help="An archive (.mar).")],
    trusted: TrustedKeys,
) -> Result:
    """Tell whether an archive is signed with a trusted key, complete, unaltered, and called what it is.

    Exits with 1 when it is not, and says why.
    """
    from skewless.packaging import signing

    keys = signing.TrustedKeys.read(trusted)
    try:
        signed = signing.verify_archive(archive, keys)
    except SignatureError as error:
        return Result({"archive": archive, "verified": False, "reason": str(error)}, str(error), failed=True)
    lines = [
        f"{archive}: {signed.name} {signed.version}, {signed.files} files, as signed",
        f"key     {signed.key}",
        f"content {signed.digest}",
    ]
    return Result({"archive": archive, "verified": True, "signed": signed}, "\n".join(lines))


def references_of(given: list[str]) -> Choice:
    """One of the words, or files."""
    match given:
        case ["evaluation"]:
            return "evaluation"
        case ["synthetic"]:
            return "synthetic"
        case ["none"]:
            return "none"
    return [Path(each) for each in given]


@command(app, "skew", panel=PACKAGE)
def skew(
    archive: Archive,
    candidate: Annotated[Path, typer.Option(metavar="YAML", help="The pipeline to compare.")],
    checkpoint: Checkpoint,
    out: Annotated[Path, typer.Option(metavar="DIR", help="Folder for index.html and skew.json.")],
    reference: Annotated[
        Path | None,
        typer.Option(metavar="YAML", help="The pipeline to compare it with.", show_default="ARCHIVE/pipeline.yaml"),
    ] = None,
    manifest: Annotated[Path | None, typer.Option(metavar="CSV", help="Labelled files to compare on.")] = None,
    files: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Or files without labels: a folder, with its subfolders.")
    ] = None,
    root: Root = None,
    split: Annotated[Literal["train", "val", "test"], typer.Option(help="The part of the manifest.")] = "test",
    limit: Annotated[
        int | None, typer.Option(min=1, help="Only so many files, evenly spread over the list.", show_default="all")
    ] = None,
    examples: Annotated[int, typer.Option(min=0, help="How many of the most changed recordings to picture.")] = 5,
    threshold: Annotated[
        float | None, typer.Option(min=0.0, max=1.0, help="Decide by this probability.", show_default="the model's own")
    ] = None,
    device: Device = "cpu",
) -> Result:
    """Compare two pipelines: where they part, how much, and what that does to the decisions of a checkpoint."""
    from skewless.core.definition import Definition
    from skewless.skew.compare import skew_report
    from skewless.skew.report import as_text

    report = skew_report(
        Definition.read(archive),
        checkpoint,
        candidate,
        out,
        reference=reference,
        manifest=manifest,
        root=root,
        split=split,
        files=files,
        limit=limit,
        examples=examples,
        threshold=threshold,
        device=device_of(device),
    )
    where = f"{out / 'index.html'}: open it in a browser; all numbers are in {out / 'skew.json'}"
    return Result(report, f"{as_text(report)}\n\n{where}")


@command(app, "export", panel=PACKAGE)
def export(
    archive: Archive,
    checkpoint: Checkpoint,
    out: Annotated[Path, typer.Option(metavar="FILE", help="File to write, such as model.onnx.")],
    format: Annotated[
        Literal["onnx", "pt2"] | None, typer.Option(help="The file's format.", show_default="by the name of --out")
    ] = None,
    whole_path: Annotated[
        bool, typer.Option("--whole-path", help="From the waveform's segments on, with every stage that follows.")
    ] = False,
) -> Result:
    """Write a checkpoint's network as a file for use without this project."""
    from skewless.core.definition import Definition
    from skewless.packaging.export import export_checkpoint
    from skewless.training.checkpoint import load_checkpoint

    chosen = format or out.suffix.removeprefix(".")
    if chosen not in ("onnx", "pt2"):
        raise UsageError(f"--out is {out}, expected a name that ends in .onnx or .pt2, or --format")
    export_checkpoint(Definition.read(archive), load_checkpoint(checkpoint), out, format=chosen, whole_path=whole_path)
    size = out.stat().st_size
    return Result({"file": out, "format": chosen, "bytes": size}, f"{out}: {size / 1e6:.1f} MB")

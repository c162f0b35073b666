"""The whole way from somebody's checkpoint, labelled files and recorded answers to an archive that answers the same."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from skewless import __version__
from skewless.adoption.folder import write_folder
from skewless.adoption.labelled import SPLIT, labelled_files
from skewless.adoption.recorded import Recorded, read_recorded
from skewless.adoption.search import candidates_of, search, servable_of
from skewless.adoption.trials import Candidate, Gap, Laboratory, Trial, closest
from skewless.core.definition import PIPELINE, Definition
from skewless.core.files import atomic
from skewless.core.pipeline import Pipeline
from skewless.core.stages import PipelineError
from skewless.errors import BuildError, UsageError
from skewless.evaluation.evaluate import evaluate
from skewless.evaluation.scores import service_of
from skewless.importers.errors import ImportFileError
from skewless.importers.run import ImportRequest, ImportResult, import_file
from skewless.packaging.build import build_archive
from skewless.packaging.execution import Execution
from skewless.packaging.references import Choice
from skewless.skew.compare import skew_report
from skewless.training.checkpoint import load_checkpoint, save_checkpoint
from skewless.training.manifest import Recording

REPORT, PAGE, CHECKPOINT = "adoption.json", "index.html", "best.pth"
# The skew report runs every edit on every file: some hundred show what changes.
_MOST_SKEWED = 200


@dataclass(frozen=True)
class AdoptRequest:
    """What to take over.

    archive: the folder of the model that is nearest, such as archive/orca. checkpoint: what another framework saved.
    predictions: the CSV with what the service answered (`skewless.adoption.recorded`). out: the folder to write.
    files, or manifest and root: the labelled files; of `files` each folder below has a class's name.
    pipelines: further pipeline files to try. instead: the pipeline to compare serving with; None is the archive's own.
    threshold: that the service decides by, None for the archive's. accept_closest: build even if no pipeline reproduces the
        record.
    runtime: what executes the network, None for the archive's. references: which recordings travel in the archive.
    imported: further fields of ImportRequest, such as `classes`.
    """

    archive: Path
    checkpoint: Path
    predictions: Path
    out: Path
    files: Path | None = None
    manifest: Path | None = None
    root: Path | None = None
    pipelines: Sequence[Path] = ()
    instead: Path | None = None
    threshold: float | None = None
    version: str = "1.0"
    accept_closest: bool = False
    runtime: str | None = None
    references: Choice = "evaluation"
    device: str = "cpu"
    imported: Mapping[str, Any] = dataclasses.field(default_factory=dict)


def adopt(request: AdoptRequest) -> dict[str, Any]:
    """Find the pipeline of the old service, and package the weights behind it. Returns what adoption.json holds.

    Every candidate's answers are kept in `out/trials`: an interrupted run goes on from there. A trial is a pipeline of the
    archive or of `pipelines` first; where none of them reproduces the record, single edits of the closest.
    Raises ValueError (UsageError, ImportFileError, ManifestError, BuildError, ...) or OSError for what cannot be used.
    """
    for given in (request.checkpoint, request.predictions):
        if not given.is_file():
            raise UsageError(f"there is no file {given}")
    # What is wrong with what was given is known before the first long work, and then nothing is left behind.
    with _taken_back_if_refused(request.out):
        definition, changed = _own_folder(request)
        rows, root = labelled_files(
            request.files, request.manifest, request.root, definition.classes, request.out / "manifest.csv"
        )
        candidates = candidates_of(request.archive, definition.folder, request.pipelines)
        imported, checkpoint = _first_import(request, definition, candidates)
        behind = Pipeline.from_dict(checkpoint["pipeline"], definition.folder)
        service = service_of(replace(definition, pipeline=behind), checkpoint, torch.device(request.device))
        threshold = service.postprocessor.threshold
        decided_by = [definition.network, definition.postprocess, definition.code, __version__]
        key = json.dumps([imported.sha256, *decided_by], default=str)
        laboratory = Laboratory(service, threshold, _trials(request), key)
        names = laboratory.names(rows, candidates)
        recorded = read_recorded(request.predictions, [row.file_path for row in rows], names)
    known = [row for row in rows if row.file_path in recorded.values]
    trials, edited = search(laboratory, candidates, known, recorded, definition.folder)
    ranked = closest(trials, recorded)
    if not ranked:
        listed = "\n".join(f"  {trial.candidate.name}: {trial.failure}" for trial in trials)
        raise ImportFileError(f"behind none of the pipelines these weights give an answer:\n{listed}")
    best_gap, best = ranked[0]
    servable = servable_of(trials, recorded)
    report = _described(request, imported, rows, recorded, trials, best, best_gap)
    report |= {"changed": changed, "threshold": threshold, "edits_tried": edited, "not_packaged": {}}
    for gap, chosen in servable:
        if gap.reproduced or request.accept_closest:
            try:
                report |= _package(request, definition, chosen, gap, recorded, rows, root)
                break
            except (BuildError, PipelineError) as error:
                report["not_packaged"][chosen.candidate.name] = str(error)
                (request.out / CHECKPOINT).unlink(missing_ok=True)
    with atomic(request.out / REPORT) as unfinished:
        unfinished.write_text(json.dumps(report, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    return report


@contextlib.contextmanager
def _taken_back_if_refused(folder: Path) -> Iterator[None]:
    """Remove a folder that the block makes, where it raises."""
    existed = folder.exists()
    try:
        yield
    except BaseException:
        if not existed:
            shutil.rmtree(folder, ignore_errors=True)
        raise


def _own_folder(request: AdoptRequest) -> tuple[Definition, dict[str, Any]]:
    """The adopted model's folder in `out`; raises UsageError for an `out` that holds something else."""
    if request.out.exists() and (
        not request.out.is_dir() or (any(request.out.iterdir()) and not _trials(request).is_dir())
    ):
        raise UsageError(
            f"--out is {request.out}, which holds something else; choose a new folder, or that of an earlier run"
        )
    folder = request.out / request.archive.resolve().name
    classes = request.imported.get("classes", ())
    written = write_folder(request.archive, folder, request.checkpoint, classes, request.threshold)
    _trials(request).mkdir(exist_ok=True)
    return written


def _trials(request: AdoptRequest) -> Path:
    return request.out / "trials"


def _first_import(
    request: AdoptRequest, definition: Definition, candidates: Sequence[Candidate]
) -> tuple[ImportResult, dict[str, Any]]:
    """The weights, imported behind the first pipeline that the file does not contradict; raises ImportFileError with what
    the first one raised."""
    first: Exception | None = None
    path = _trials(request) / "weights.pth"
    for candidate in candidates:
        if not candidate.servable or candidate.file is None:
            continue
        try:
            imported = _import(request, definition.folder, candidate.file, path)
        except ImportFileError as error:
            first = first or error
            continue
        return imported, load_checkpoint(path)
    if first is None:
        raise ImportFileError(f"{request.archive} has no pipeline that can be served")
    # The folder of its own is taken back: what can be changed is the one that it was copied from.
    raise ImportFileError(str(first).replace(str(definition.folder), str(request.archive))) from first


def _import(request: AdoptRequest, folder: Path, pipeline: Path, out: Path) -> ImportResult:
    out.unlink(missing_ok=True)
    return import_file(
        ImportRequest(
            archive=folder,
            file=request.checkpoint,
            out=out,
            pipeline=pipeline,
            device=request.device,
            **request.imported,
        )
    )


def _described(
    request: AdoptRequest,
    imported: ImportResult,
    rows: Sequence[Recording],
    recorded: Recorded,
    trials: Sequence[Trial],
    best: Trial,
    gap: Gap,
) -> dict[str, Any]:
    """What was found, in plain JSON types; without what packaging adds."""
    return {
        "archive": request.archive.name,
        "checkpoint": {"file": request.checkpoint.name, "sha256": imported.sha256, "format": imported.format},
        "notes": list(imported.notes),
        "record": {
            "file": request.predictions.name,
            "sha256": recorded.sha256,
            "files": len(recorded.values),
            "labelled": len(rows),
            "numbers": gap.compared,
            "columns": {
                name: {"scale": field.scale, "decimals": field.decimals, "allowed": field.allowed}
                for name, field in recorded.fields.items()
            },
            "unused": list(recorded.unused),
        },
        "trials": [_entry(trial, recorded) for trial in trials],
        "best": {
            **_entry(best, recorded),
            "pairs": [
                {
                    "file": file,
                    "name": name,
                    "recorded": value / recorded.field(name).scale,
                    "ours": best.answers[file][name] / recorded.field(name).scale,
                }
                for file, values in recorded.values.items()
                for name, value in values.items()
                if name in best.answers.get(file, {})
            ],
        },
    }


def _entry(trial: Trial, recorded: Recorded) -> dict[str, Any]:
    gap = trial.gap(recorded)
    return {
        "name": trial.candidate.name,
        "servable": trial.candidate.servable,
        "fingerprint": trial.candidate.pipeline.fingerprint,
        "failure": trial.failure,
        "gap": None if gap is None else dataclasses.asdict(gap),
    }


def _package(
    request: AdoptRequest,
    definition: Definition,
    chosen: Trial,
    gap: Gap,
    recorded: Recorded,
    rows: list[Recording],
    root: Path,
) -> dict[str, Any]:
    """Write the pipeline into the adopted folder, import behind it, evaluate, build, and compare with serving it `instead`."""
    folder, out = definition.folder, request.out
    instead = folder / "variants" / "instead.yaml"
    instead.parent.mkdir(exist_ok=True)
    shutil.copyfile(request.instead or request.archive / PIPELINE, instead)
    reproduces = {
        "files": len(recorded.values),
        "numbers": gap.compared,
        "mean": gap.mean,
        "largest": gap.largest,
        "reproduced": gap.reproduced,
        "record_sha256": recorded.sha256,
    }
    given = chosen.candidate.file
    text = chosen.candidate.pipeline.to_yaml() if given is None else given.read_text(encoding="utf-8")
    told = "reproduces" if gap.reproduced else "comes closest to"
    (folder / PIPELINE).write_text(
        f"# {chosen.candidate.name}: {told} what the service answered for {len(recorded.values)} files, largest difference "
        f"{gap.largest:.1e}.\n{text}",
        encoding="utf-8",
    )
    checkpoint_path = out / CHECKPOINT
    _import(request, folder, folder / PIPELINE, checkpoint_path)
    checkpoint = load_checkpoint(checkpoint_path)
    checkpoint["imported_from"] = {**checkpoint["imported_from"], "reproduces": reproduces}
    save_checkpoint(checkpoint_path, checkpoint)
    adopted = Definition.read(folder)
    device = torch.device(request.device)
    # The threshold is the old service's: a better one by these labels would be another service.
    metrics = evaluate(
        adopted,
        checkpoint,
        checkpoint_path,
        rows,
        SPLIT,
        out / "evaluation",
        device,
        tune=False,
    )
    built = build_archive(
        folder,
        checkpoint_path,
        out / "evaluation",
        request.version,
        out / "model_store",
        force=True,
        execution=None if request.runtime is None else Execution(request.runtime),
        references=request.references,
    )
    found: dict[str, Any] = {
        "adopted": {
            "pipeline": chosen.candidate.name,
            "folder": folder.as_posix(),
            "checkpoint": checkpoint_path.as_posix(),
            "archive": built.path.as_posix(),
            "warnings": list(built.warnings),
            "auc": metrics["auc"],
            **reproduces,
        },
        "instead": None,
    }
    other = Pipeline.from_yaml(instead, folder).with_fitted_stages_of(
        Pipeline.from_dict(checkpoint["pipeline"], folder)
    )
    if other.fingerprint == checkpoint["pipeline_fingerprint"]:
        instead.unlink()
        return found
    skew = skew_report(
        adopted,
        checkpoint_path,
        instead,
        out / "instead",
        manifest=out / "manifest.csv",
        root=root,
        split=SPLIT,
        limit=_MOST_SKEWED,
        threshold=adopted.postprocessor.threshold,
        device=device,
    )
    found["instead"] = {
        "pipeline": f"{request.archive.name}/{PIPELINE}" if request.instead is None else request.instead.as_posix(),
        "files": skew["recordings_compared"],
        "mean": skew["together"]["mean_abs"],
        "largest": skew["together"]["max_abs"],
        "flips": skew["together"]["flips"],
        "edits": [edit["edit"] for edit in skew["edits"]],
        "auc": {side: skew["metrics"][side]["auc"] for side in ("reference", "candidate")} if skew["metrics"] else None,
        "accuracy": {side: skew["metrics"][side].get("accuracy") for side in ("reference", "candidate")}
        if skew["metrics"]
        else None,
        "page": (out / "instead" / "index.html").as_posix(),
    }
    return found

"""The skew report: two pipelines on the same recordings, and what their difference does to a checkpoint's answers."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from tqdm import tqdm

from skewless.core.definition import PIPELINE, Definition
from skewless.core.pipeline import Pipeline
from skewless.core.stages import InputError
from skewless.core.versions import library_versions
from skewless.evaluation.scores import service_of
from skewless.skew.aggregate import summarize
from skewless.skew.measure import Comparator
from skewless.skew.page import write_html
from skewless.skew.pictures import Example
from skewless.skew.report import most_changed, write_json
from skewless.training.checkpoint import file_digest, load_checkpoint
from skewless.training.manifest import SPLITS, read_manifest

REPORT, PAGE = "skew.json", "index.html"


class Sample(NamedTuple):
    """One file to compare on: its name in the report, where it is, and its label, or None where it has none."""

    name: str
    path: Path
    label: int | None


def skew_report(
    definition: Definition,
    checkpoint_path: Path,
    candidate: Path,
    out: Path,
    *,
    reference: Path | None = None,
    manifest: Path | None = None,
    root: Path | None = None,
    split: str = "test",
    files: Path | None = None,
    limit: int | None = None,
    examples: int = 5,
    threshold: float | None = None,
    device: torch.device | None = None,
) -> dict[str, Any]:
    """Compare two pipelines and write `out/skew.json` and `out/index.html`. Returns what skew.json holds, which
    `skewless.skew.report.as_text` turns into text.

    definition, checkpoint_path: the model whose answers are compared.
    candidate: the pipeline file to compare. reference: the one to compare it with; the definition's pipeline if None.
        Where training fitted a stage of either, as a scaler, the checkpoint's stage takes its place.
    manifest: a CSV with file_path, label and split, whose rows of `split` are compared. root: the folder that file_path
        is relative to; the manifest's own if None.
    files: in place of a manifest, a folder; every file in it and in its subfolders is compared, without labels.
    limit: compare only so many, evenly spread over the list.
    examples: of how many recordings, the most changed ones, the page shows pictures.
    threshold: of the decisions, in [0, 1]; the postprocessor's if None. device: where the network runs; the CPU if None.

    A recording that one of the pipelines cannot read is left out and listed in the report, with the reason.
    Raises ValueError, saying what to give instead, for a file or a folder that is not there, for arguments outside their
    range, for a checkpoint that is not the definition's, for a pipeline that cannot run, and when there is nothing to
    compare.
    """
    if threshold is not None and not 0 <= threshold <= 1:
        raise ValueError(f"threshold is {threshold}, expected a number in [0, 1]")
    if examples < 0:
        raise ValueError(f"examples is {examples}, expected 0 or more")
    service = service_of(definition, checkpoint := load_checkpoint(checkpoint_path), device or torch.device("cpu"))
    samples, source = samples_of(service.postprocessor.classes, manifest, root, split, files, limit)
    ours = service.pipeline if reference is None else _read(reference, service.pipeline)
    theirs = _read(candidate, service.pipeline)
    comparator = Comparator(ours, theirs, service.runtime, service.postprocessor, **service.input_limits)
    measurements, unreadable = [], []
    for name, path, label in tqdm(samples, desc="comparing", unit="file"):
        try:
            measurements.append(comparator.measure(name, path.read_bytes(), label))
        except InputError as error:
            unreadable.append({"name": name, "reason": str(error)})
    if not measurements:
        reasons = "\n".join(f"  {u['name']}: {u['reason']}" for u in unreadable)
        raise ValueError(f"none of the {len(samples)} files can be read:\n{reasons}")
    packages = definition.packages | ours.packages | theirs.packages
    report = {
        "reference": _described(ours, reference or definition.folder / PIPELINE),
        "candidate": _described(theirs, candidate),
        "checkpoint": {
            "file": checkpoint_path.name,
            "sha256": file_digest(checkpoint_path),
            "epoch": checkpoint["epoch"],
            "pipeline_fingerprint": checkpoint["pipeline_fingerprint"],
            "trained_with_reference": checkpoint["pipeline_fingerprint"] == ours.fingerprint,
        },
        "source": source,
        "precision": service.policy.report(service.runtime.device),
        "library_versions": library_versions(packages),
        "unreadable": unreadable,
        **summarize(
            comparator.alignment,
            measurements,
            service.threshold if threshold is None else threshold,
            service.postprocessor.classes,
        ),
    }
    paths = {sample.name: sample.path for sample in samples}
    shown = [
        Example(entry, *comparator.traces(paths[entry["name"]].read_bytes()))
        for entry in most_changed(report, examples)
    ]
    out.mkdir(parents=True, exist_ok=True)
    write_json(report, out / REPORT)
    write_html(report, shown, out / PAGE)
    return report


def samples_of(
    classes: Sequence[str],
    manifest: Path | None,
    root: Path | None,
    split: str,
    files: Path | None,
    limit: int | None,
) -> tuple[list[Sample], str]:
    """The files to compare on, of a manifest or of a folder, as `skew_report` has them, and where they are from, in words.

    Raises ValueError when there is none.
    """
    if limit is not None and limit < 1:
        raise ValueError(f"limit is {limit}, expected at least 1")
    if manifest is not None and files is None:
        found = _samples_of_manifest(classes, manifest, root or manifest.parent, split)
        source, empty = f"split '{split}' of {manifest.name}", f"{manifest} has no recordings in split '{split}'"
    elif files is not None and manifest is None:
        if root is not None:
            raise ValueError("a root belongs to a manifest; a folder of files needs none")
        if not files.is_dir():
            raise ValueError(f"files is {files}, expected a folder of recordings or images")
        inside = sorted(path for path in files.rglob("*") if path.is_file())
        found = [Sample(path.relative_to(files).as_posix(), path, None) for path in inside]
        source, empty = f"folder {files.resolve().name}", f"the folder {files} has no files"
    else:
        raise ValueError("give either a manifest or a folder of files, and not both")
    if not found:
        raise ValueError(empty)
    if limit is not None and limit < len(found):
        found = [found[k] for k in np.linspace(0, len(found) - 1, limit).round().astype(int)]
    return found, source


def _samples_of_manifest(classes: Sequence[str], manifest: Path, root: Path, split: str) -> list[Sample]:
    if split not in SPLITS:
        raise ValueError(f"split is {split!r}, expected one of {', '.join(SPLITS)}")
    if not manifest.is_file():
        raise ValueError(f"there is no manifest {manifest}")
    # A manifest may have absolute paths, which would say where on this machine the recordings are.
    return [
        Sample(f"{n}-{r.path.name}" if Path(r.file_path).is_absolute() else r.file_path, r.path, r.label)
        for n, r in enumerate(read_manifest(manifest, root, classes), start=1)
        if r.split == split
    ]


def _read(path: Path, trained: Pipeline) -> Pipeline:
    if not path.is_file():
        raise ValueError(f"there is no pipeline file {path}")
    return Pipeline.from_yaml(path).with_fitted_stages_of(trained)


def _described(pipeline: Pipeline, path: Path) -> dict[str, Any]:
    return {"file": path.name, "fingerprint": pipeline.fingerprint, **pipeline.to_dict()}

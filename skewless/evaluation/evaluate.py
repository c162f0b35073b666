"""Measure a checkpoint through the service that will serve it, and write down what it answered."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch

from skewless.core.definition import Definition
from skewless.core.files import atomic
from skewless.core.selftest.record import REFERENCES
from skewless.core.service import METRICS
from skewless.core.versions import library_versions
from skewless.evaluation.metrics import best_threshold, measure_classes, measure_two_classes
from skewless.evaluation.pictures import draw_evaluation, draw_training
from skewless.evaluation.references import write_references
from skewless.evaluation.reproduction import reproduce
from skewless.evaluation.scores import PREDICTIONS, arrays, dataset_digest, predict, service_of, write_predictions
from skewless.training.checkpoint import file_digest
from skewless.training.manifest import Recording, check_contents, manifest_digest, require_every_class, select


def evaluate(
    definition: Definition,
    checkpoint: dict[str, Any],
    checkpoint_path: Path,
    recordings: list[Recording],
    split: str,
    out: Path,
    device: torch.device,
    references: int = 8,
    skip_unreadable: bool = False,
    tune: bool = True,
) -> dict[str, Any]:
    """Measure on `split` with the threshold chosen on `val`, or without `tune` with the definition's; write metrics.json,
    predictions.csv, pictures and a few reference recordings with their probabilities to `out`. Returns what metrics.json
    holds.

    First the scores that training computed for the `val` split are reproduced; how many and how closely is in
    `training_reproduced`, which is None for an imported checkpoint, of which nothing is recorded.
    Raises NotReproducedError where they are not, ManifestError, UnreadableRecordings.
    """
    check_contents(recordings)
    service = service_of(definition, checkpoint, device)
    postprocessor, classes = service.postprocessor, service.postprocessor.classes
    val_rows, rows = select(recordings, "val", classes), select(recordings, split, classes)
    validation = predict(service, val_rows, "val", skip_unreadable=skip_unreadable)
    reproduced = reproduce(service, checkpoint, validation)
    if note := _missing_proof(reproduced, checkpoint):
        print(f"note: {note}", file=sys.stderr)
    predictions = validation
    if split != "val":
        predictions = predict(service, rows, split, skip_unreadable=skip_unreadable)
    for read in (validation, predictions):
        require_every_class([p.recording for p in read], "what could be read", classes)
    tuned = tune and postprocessor.tuned
    threshold = best_threshold(*arrays(validation)) if tuned else postprocessor.threshold
    labels, scores = arrays(predictions)
    if len(classes) == 2:
        figures = measure_two_classes(labels, scores, threshold)
    else:
        figures = measure_classes(labels, scores, classes, threshold)
    metrics = {
        "split": split,
        "recordings": len(predictions),
        "skipped": len(rows) - len(predictions),
        "classes": list(classes),
        "threshold": threshold,
        "threshold_chosen_on": "val" if tuned else "the definition",
        **figures,
        "val_auc": checkpoint["val_auc"],
        "val_ap": checkpoint["val_ap"],
        "epoch": checkpoint["epoch"],
        "training_reproduced": reproduced,
        **{key: checkpoint[key] for key in ("imported_from",) if key in checkpoint},
        "manifest_sha256": manifest_digest(recordings),
        "dataset_sha256": dataset_digest(validation + predictions),
        "checkpoint_sha256": file_digest(checkpoint_path),
        "pipeline_fingerprint": service.pipeline.fingerprint,
        "device": str(device),
        "library_versions": library_versions(service.definition.packages),
    }
    out.mkdir(parents=True, exist_ok=True)
    (out / METRICS).unlink(missing_ok=True)
    write_predictions(out / PREDICTIONS, classes, validation if split == "val" else validation + predictions)
    write_references(out / REFERENCES, predictions, references)
    draw_evaluation(out, labels, scores, metrics)
    if checkpoint["history"]:  # an imported checkpoint has none
        draw_training(out / "training.png", checkpoint["history"], checkpoint["epoch"])
    # Last, so that a folder with metrics.json is complete.
    with atomic(out / METRICS) as unfinished:
        unfinished.write_text(json.dumps(metrics, indent=2) + "\n", encoding="utf-8")
    return metrics


def _missing_proof(reproduced: dict[str, Any] | None, checkpoint: dict[str, Any]) -> str:
    """What there is to say where neither training nor an adopted service was reproduced; empty where one was."""
    if reproduced is None and "reproduces" in checkpoint.get("imported_from", {}):
        return ""
    if reproduced is None:
        return (
            "the checkpoint was imported and records no scores of its training, so nothing proves that evaluation computes "
            "what training computed"
        )
    if not reproduced["recordings"]:
        return (
            "none of the recordings that training validated on is in the val split of this manifest, so nothing proves that "
            "evaluation computes what training computed; `skewless build` will ask for that"
        )
    return ""

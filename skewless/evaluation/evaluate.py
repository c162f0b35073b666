"""Measure a checkpoint through the service that will serve it, and write down what it answered."""

from __future__ import annotations

import csv
import hashlib
import json
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from sklearn.calibration import calibration_curve
from sklearn.metrics import (
    average_precision_score,
    brier_score_loss,
    confusion_matrix,
    f1_score,
    precision_recall_fscore_support,
    precision_score,
    recall_score,
    roc_auc_score,
)
from tqdm import tqdm

from skewless.core.definition import Definition
from skewless.core.postprocess import Part, Postprocessor
from skewless.core.runtimes import runtime_settings
from skewless.core.runtimes.eager import EagerRuntime
from skewless.core.runtimes.runtime import RuntimeSettings
from skewless.core.service import ModelService
from skewless.core.stages import InputError
from skewless.core.versions import library_versions
from skewless.evaluation.pictures import draw_evaluation, draw_training
from skewless.training.cache import report_unreadable
from skewless.training.checkpoint import file_digest, network_of, trained
from skewless.training.manifest import Recording, manifest_digest, require_every_class, select

THRESHOLDS = (0.3, 0.4, 0.5, 0.6, 0.7)
_CANDIDATES = np.linspace(0.01, 0.99, 99)

# References travel in every archive: larger recordings become one only where there are not enough smaller ones.
_MAX_REFERENCE_BYTES = 2_000_000

# Probabilities of an untrained network hardly depend on the recording: an archive's references must span this much.
MIN_REFERENCE_SPREAD = 0.05


@dataclass(frozen=True)
class Prediction:
    """What the service computed for one recording, float32 exactly."""

    recording: Recording
    sha256: str
    scores: tuple[float, ...]
    parts: tuple[Part, ...]


def service_of(definition: Definition, checkpoint: dict[str, Any], device: torch.device) -> ModelService:
    """The service of a checkpoint that is not packaged yet: pipeline, limits, precision, micro-batch and post-processing
    are the definition's, as when served; the network runs in eager mode, which other runtimes are compared with.

    Raises CheckpointError for a checkpoint that was trained with something else than the definition says.
    """
    definition = trained(definition, checkpoint)
    definition.precision.apply()
    _, settings = runtime_settings(definition.runtime)
    runtime = EagerRuntime(
        network_of(checkpoint, definition), device, RuntimeSettings(micro_batch=settings.micro_batch)
    )
    return ModelService(definition, runtime, metrics={})


def predict(
    service: ModelService, recordings: list[Recording], label: str, *, skip_unreadable: bool = False
) -> list[Prediction]:
    """Score recordings one by one, with a progress bar.

    Raises UnreadableRecordings listing those it cannot read, unless `skip_unreadable`, which prints the list.
    """
    predictions, failures = [], {}
    for recording in tqdm(recordings, desc=label, unit="file"):
        payload = recording.path.read_bytes()
        try:
            (scored,) = service.score([payload])
        except InputError as error:
            failures[recording.file_path] = str(error)
            continue
        digest = hashlib.sha256(payload).hexdigest()
        predictions.append(Prediction(recording, digest, scored.scores, scored.parts))
    report_unreadable(failures, skip_unreadable)
    return predictions


def best_threshold(labels: np.ndarray, probabilities: np.ndarray) -> float:
    """The F1-optimal one of linspace(0.01, 0.99, 99); of equals, the middle one, farthest from either class."""
    scores = np.array([f1_score(labels, probabilities > t, zero_division=0.0) for t in _CANDIDATES])
    best = np.flatnonzero(scores == scores.max())
    return float(_CANDIDATES[best[len(best) // 2]].round(2))


def at_threshold(labels: np.ndarray, probabilities: np.ndarray, threshold: float) -> dict[str, Any]:
    """Accuracy, precision, recall, F1 and the confusion counts of `probability > threshold`."""
    decided = probabilities > threshold
    tn, fp, fn, tp = confusion_matrix(labels, decided, labels=[0, 1]).ravel().tolist()
    return {
        "threshold": threshold,
        "accuracy": (tp + tn) / len(labels),
        "precision": float(precision_score(labels, decided, zero_division=0.0)),
        "recall": float(recall_score(labels, decided, zero_division=0.0)),
        "f1": float(f1_score(labels, decided, zero_division=0.0)),
        "confusion": {"true_negative": tn, "false_positive": fp, "false_negative": fn, "true_positive": tp},
    }


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
) -> dict[str, Any]:
    """Measure on `split` with the threshold chosen on `val`; write metrics.json, predictions.csv, pictures and a few
    reference recordings with their probabilities to `out`. Returns what metrics.json holds.

    Raises ManifestError, UnreadableRecordings.
    """
    service = service_of(definition, checkpoint, device)
    postprocessor, classes = service.postprocessor, service.postprocessor.classes
    val_rows, rows = select(recordings, "val", classes), select(recordings, split, classes)
    validation = predict(service, val_rows, "val", skip_unreadable=skip_unreadable)
    predictions = validation
    if split != "val":
        predictions = predict(service, rows, split, skip_unreadable=skip_unreadable)
    for read in (validation, predictions):
        require_every_class([p.recording for p in read], "what could be read", classes)
    threshold = best_threshold(*_arrays(validation)) if postprocessor.tuned else postprocessor.threshold
    labels, scores = _arrays(predictions)
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
        "threshold_chosen_on": "val" if postprocessor.tuned else "the definition",
        **figures,
        "val_auc": checkpoint["val_auc"],
        "val_ap": checkpoint["val_ap"],
        "epoch": checkpoint["epoch"],
        **{key: checkpoint[key] for key in ("imported_from",) if key in checkpoint},
        "manifest_sha256": manifest_digest(recordings),
        "dataset_sha256": _dataset_digest(validation + predictions),
        "checkpoint_sha256": file_digest(checkpoint_path),
        "pipeline_fingerprint": service.pipeline.fingerprint,
        "device": str(device),
        "library_versions": library_versions(service.definition.packages),
    }
    out.mkdir(parents=True, exist_ok=True)
    (out / "metrics.json").unlink(missing_ok=True)
    _write_predictions(out / "predictions.csv", classes, validation if split == "val" else validation + predictions)
    _write_references(out / "references", predictions, references)
    draw_evaluation(out, labels, scores, metrics)
    if checkpoint["history"]:  # an imported checkpoint has none
        draw_training(out / "training.png", checkpoint["history"], checkpoint["epoch"])
    # Last, so that a folder with metrics.json is complete.
    (out / "metrics.json").write_text(json.dumps(metrics, indent=2) + "\n", encoding="utf-8")
    return metrics


def measure_two_classes(labels: np.ndarray, probabilities: np.ndarray, threshold: float) -> dict[str, Any]:
    """Figures of labels `(N,)` in {0, 1} and probabilities `(N,)`, at every threshold and at the chosen one."""
    fraction, mean = calibration_curve(labels, probabilities, n_bins=10)
    return {
        "positives": int(labels.sum()),
        "auc": float(roc_auc_score(labels, probabilities)),
        "average_precision": float(average_precision_score(labels, probabilities)),
        "brier": float(brier_score_loss(labels, probabilities)),
        "calibration": {"mean_probability": mean.tolist(), "fraction_positive": fraction.tolist()},
        "at_best_threshold": at_threshold(labels, probabilities, threshold),
        "at_thresholds": [at_threshold(labels, probabilities, t) for t in THRESHOLDS],
    }


def measure_classes(
    labels: np.ndarray, probabilities: np.ndarray, classes: Sequence[str], threshold: float
) -> dict[str, Any]:
    """Figures of labels `(N,)` and one probability per class `(N, C)`: AUC and average precision are means over the
    classes, each against the rest; the Brier score is Brier's own, a sum over the classes."""
    one_hot = np.eye(len(classes))[labels]
    chosen = np.array([Postprocessor.choose(tuple(p), threshold) for p in probabilities])
    correct, confidence = chosen == labels, probabilities.max(axis=1)
    fraction, mean = calibration_curve(correct, confidence, n_bins=10)
    per_class = precision_recall_fscore_support(labels, chosen, labels=range(len(classes)), zero_division=0.0)
    return {
        "auc": float(roc_auc_score(one_hot, probabilities, average="macro")),
        "average_precision": float(average_precision_score(one_hot, probabilities, average="macro")),
        "brier": float(((probabilities - one_hot) ** 2).sum(axis=1).mean()),
        "accuracy": float(correct.mean()),
        "macro_f1": float(np.mean(per_class[2])),
        "per_class": {
            name: dict(zip(("precision", "recall", "f1", "support"), map(float, figures), strict=True))
            for name, *figures in zip(classes, *per_class, strict=True)
        },
        # Rows are the labels, columns the choices.
        "confusion": confusion_matrix(labels, chosen, labels=range(len(classes))).tolist(),
        "confident": float((confidence >= threshold).mean()),
        "calibration": {"mean_probability": mean.tolist(), "fraction_positive": fraction.tolist()},
    }


def _arrays(predictions: list[Prediction]) -> tuple[np.ndarray, np.ndarray]:
    """Labels `(N,)`, and scores `(N,)` or, with more than two classes, `(N, C)`."""
    labels, scores = np.array([p.recording.label for p in predictions]), np.array([p.scores for p in predictions])
    return labels, scores[:, 0] if scores.shape[1] == 1 else scores


def _dataset_digest(predictions: list[Prediction]) -> str:
    """SHA-256 over the recordings' own digests and labels: the same data under other file names is the same data."""
    rows = sorted({f"{p.sha256} {p.recording.label} {p.recording.split}" for p in predictions})
    return hashlib.sha256("\n".join(rows).encode()).hexdigest()


def score_columns(classes: Sequence[str]) -> list[str]:
    """What predictions.csv calls the scores."""
    return ["probability"] if len(classes) == 2 else [f"probability_{name}" for name in classes]


def _write_predictions(path: Path, classes: Sequence[str], predictions: list[Prediction]) -> None:
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["file_path", "label", "split", *score_columns(classes), "sha256"])
        for p in predictions:
            # repr gives the shortest text that reads back as the same number.
            scores = map(repr, p.scores)
            writer.writerow([p.recording.file_path, p.recording.label, p.recording.split, *scores, p.sha256])


def _write_references(folder: Path, predictions: list[Prediction], count: int) -> None:
    """Copy inputs evenly spread over the range of probabilities (with several classes: over one after the other, each by
    its own probability), with what the service computed for them."""
    by_size = sorted(predictions, key=lambda p: p.recording.path.stat().st_size)
    small = [p for p in by_size if p.recording.path.stat().st_size <= _MAX_REFERENCE_BYTES]
    if len(small) < count:
        small = by_size[:count]
    ranked = sorted(small, key=lambda p: (int(np.argmax(p.scores)), max(p.scores), p.sha256))
    places = np.linspace(0, len(ranked) - 1, min(count, len(ranked))).round().astype(int)
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    entries = []
    for number, place in enumerate(dict.fromkeys(places.tolist()), start=1):
        p = ranked[place]
        name = f"{number:02d}{p.recording.path.suffix.lower()}"
        shutil.copyfile(p.recording.path, folder / name)
        entries.append(
            {
                "file": name,
                "source": p.recording.file_path,
                "sha256": p.sha256,
                "label": p.recording.label,
                "scores": list(p.scores),
                "parts": [list(part) for part in p.parts],
            }
        )
    (folder / "references.json").write_text(json.dumps(entries, indent=2) + "\n", encoding="utf-8")

"""Measure a checkpoint through the service that will serve it, and write down what it answered."""

from __future__ import annotations

import csv
import hashlib
import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import torch
from sklearn.calibration import calibration_curve
from sklearn.metrics import (
    average_precision_score,
    brier_score_loss,
    confusion_matrix,
    f1_score,
    precision_recall_curve,
    precision_score,
    recall_score,
    roc_auc_score,
    roc_curve,
)
from tqdm import tqdm

from handler.decisions import build_decision
from handler.pipeline import Pipeline
from handler.precision import NumericPolicy
from handler.references import library_versions
from handler.runtimes.eager import EagerRuntime
from handler.service import ModelService
from handler.stages import InputError
from training.cache import report_unreadable
from training.checkpoint import file_digest, network_of
from training.manifest import Recording, manifest_digest, require_both_labels, select

matplotlib.use("Agg")
import matplotlib.pyplot as plt

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
    probability: float
    segment_probabilities: list[float]


def service_of(checkpoint: dict[str, Any], device: torch.device) -> ModelService:
    """The service of a checkpoint that is not packaged yet: same pipeline, runtime and decision as when served."""
    policy = NumericPolicy()
    policy.apply()
    return ModelService(
        pipeline=Pipeline.from_dict(checkpoint["pipeline"]),
        runtime=EagerRuntime(network_of(checkpoint), device),
        decision=build_decision(checkpoint["decision"]),
        metrics={},
        policy=policy,
    )


def predict(
    service: ModelService, recordings: list[Recording], label: str, *, skip_unreadable: bool = False
) -> list[Prediction]:
    """Score recordings one by one, with a progress bar.

    Raises UnreadableRecordings listing those it cannot read, unless `skip_unreadable`, which prints the list.
    """
    predictions, failures = [], {}
    for recording in tqdm(recordings, desc=label, unit="clip"):
        audio = recording.path.read_bytes()
        try:
            ((probability, _, outputs),) = service.score([audio])
        except InputError as error:
            failures[recording.file_path] = str(error)
            continue
        digest = hashlib.sha256(audio).hexdigest()
        predictions.append(Prediction(recording, digest, probability, outputs["segment_probabilities"].tolist()))
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
    service = service_of(checkpoint, device)
    val_rows, rows = select(recordings, "val"), select(recordings, split)
    validation = predict(service, val_rows, "val", skip_unreadable=skip_unreadable)
    predictions = validation
    if split != "val":
        predictions = predict(service, rows, split, skip_unreadable=skip_unreadable)
    for read in (validation, predictions):
        require_both_labels([p.recording for p in read], "what could be read")
    threshold = best_threshold(*_arrays(validation))
    labels, probabilities = _arrays(predictions)
    fraction, mean = calibration_curve(labels, probabilities, n_bins=10)
    metrics = {
        "split": split,
        "recordings": len(labels),
        "skipped": len(rows) - len(labels),
        "positives": int(labels.sum()),
        "threshold": threshold,
        "threshold_chosen_on": "val",
        "auc": float(roc_auc_score(labels, probabilities)),
        "average_precision": float(average_precision_score(labels, probabilities)),
        "brier": float(brier_score_loss(labels, probabilities)),
        "calibration": {"mean_probability": mean.tolist(), "fraction_positive": fraction.tolist()},
        "at_best_threshold": at_threshold(labels, probabilities, threshold),
        "at_thresholds": [at_threshold(labels, probabilities, t) for t in THRESHOLDS],
        "val_auc": checkpoint["val_auc"],
        "val_ap": checkpoint["val_ap"],
        "epoch": checkpoint["epoch"],
        **{key: checkpoint[key] for key in ("imported_from",) if key in checkpoint},
        "manifest_sha256": manifest_digest(recordings),
        "dataset_sha256": _dataset_digest(validation + predictions),
        "checkpoint_sha256": file_digest(checkpoint_path),
        "pipeline_fingerprint": service.pipeline.fingerprint,
        "device": str(device),
        "library_versions": library_versions(),
    }
    out.mkdir(parents=True, exist_ok=True)
    (out / "metrics.json").unlink(missing_ok=True)
    _write_predictions(out / "predictions.csv", validation if split == "val" else validation + predictions)
    _write_references(out / "references", predictions, references)
    _write_pictures(out, labels, probabilities, metrics)
    if checkpoint["history"]:  # an imported checkpoint has none
        _write_training_curve(out / "training.png", checkpoint["history"], checkpoint["epoch"])
    # Last, so that a folder with metrics.json is complete.
    (out / "metrics.json").write_text(json.dumps(metrics, indent=2) + "\n", encoding="utf-8")
    return metrics


def _arrays(predictions: list[Prediction]) -> tuple[np.ndarray, np.ndarray]:
    labels = np.array([p.recording.label for p in predictions])
    return labels, np.array([p.probability for p in predictions])


def _dataset_digest(predictions: list[Prediction]) -> str:
    """SHA-256 over the recordings' own digests and labels: the same data under other file names is the same data."""
    rows = sorted({f"{p.sha256} {p.recording.label} {p.recording.split}" for p in predictions})
    return hashlib.sha256("\n".join(rows).encode()).hexdigest()


def _write_predictions(path: Path, predictions: list[Prediction]) -> None:
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["file_path", "cough_label", "split", "probability", "sha256"])
        for p in predictions:
            # repr gives the shortest text that reads back as the same number.
            writer.writerow(
                [p.recording.file_path, p.recording.label, p.recording.split, repr(p.probability), p.sha256]
            )


def _write_references(folder: Path, predictions: list[Prediction], count: int) -> None:
    """Copy recordings evenly spread over the range of probabilities, with what the service computed for them."""
    by_size = sorted(predictions, key=lambda p: p.recording.path.stat().st_size)
    small = [p for p in by_size if p.recording.path.stat().st_size <= _MAX_REFERENCE_BYTES]
    if len(small) < count:
        small = by_size[:count]
    ranked = sorted(small, key=lambda p: (p.probability, p.sha256))
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
                "probability": p.probability,
                "segment_probabilities": p.segment_probabilities,
            }
        )
    (folder / "references.json").write_text(json.dumps(entries, indent=2) + "\n", encoding="utf-8")


def _write_pictures(out: Path, labels: np.ndarray, probabilities: np.ndarray, metrics: dict[str, Any]) -> None:
    point = metrics["at_best_threshold"]
    name = f"threshold {point['threshold']:.2f}"

    figure, axes = plt.subplots(figsize=(5, 5))
    fpr, tpr, _ = roc_curve(labels, probabilities)
    negatives = point["confusion"]["false_positive"] + point["confusion"]["true_negative"]
    axes.plot(fpr, tpr, drawstyle="steps-post", label=f"AUC {metrics['auc']:.3f}")
    axes.plot([0, 1], [0, 1], ":", color="grey", label="chance")
    axes.plot(point["confusion"]["false_positive"] / negatives, point["recall"], "o", label=name)
    axes.set(xlabel="false positive rate", ylabel="true positive rate", title=f"ROC, {metrics['split']} split")
    _save(figure, axes, out / "roc.png")

    figure, axes = plt.subplots(figsize=(5, 5))
    precision, recall, _ = precision_recall_curve(labels, probabilities)
    axes.plot(recall, precision, drawstyle="steps-post", label=f"average precision {metrics['average_precision']:.3f}")
    axes.axhline(labels.mean(), linestyle=":", color="grey", label="chance")
    axes.plot(point["recall"], point["precision"], "o", label=name)
    axes.set(
        xlabel="recall", ylabel="precision", ylim=(0, 1.05), title=f"Precision and recall, {metrics['split']} split"
    )
    _save(figure, axes, out / "pr.png")

    figure, axes = plt.subplots(figsize=(5, 5))
    calibration = metrics["calibration"]
    axes.plot(
        calibration["mean_probability"], calibration["fraction_positive"], "o-", label=f"Brier {metrics['brier']:.3f}"
    )
    axes.plot([0, 1], [0, 1], ":", color="grey", label="perfect")
    axes.hist(
        probabilities,
        bins=10,
        range=(0, 1),
        weights=np.full(len(labels), 1 / len(labels)),
        alpha=0.2,
        label="share of clips",
    )
    axes.set(xlabel="mean probability", ylabel="fraction positive", title=f"Calibration, {metrics['split']} split")
    _save(figure, axes, out / "calibration.png")


def _write_training_curve(path: Path, history: list[dict[str, float]], chosen: int) -> None:
    figure, axes = plt.subplots(figsize=(7, 4))
    epochs = [h["epoch"] for h in history]
    axes.plot(epochs, [h["train_loss"] for h in history], label="training loss")
    axes.plot(epochs, [h["val_loss"] for h in history], label="validation loss")
    axes.plot(epochs, [h["val_auc"] for h in history], label="validation AUC")
    axes.axvline(chosen, linestyle=":", color="grey", label="chosen epoch")
    axes.set(xlabel="epoch", title="Training")
    axes.xaxis.get_major_locator().set_params(integer=True)
    _save(figure, axes, path)


def _save(figure: Any, axes: Any, path: Path) -> None:
    axes.grid(alpha=0.3)
    axes.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=110, metadata={"Software": None})
    plt.close(figure)

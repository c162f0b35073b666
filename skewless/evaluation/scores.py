"""What the service computes for labelled recordings, float32 exactly."""

from __future__ import annotations

import csv
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from skewless.core.definition import Definition
from skewless.core.git_lfs import pointer
from skewless.core.postprocess import Part
from skewless.core.runtimes import RuntimeSettings, runtime_settings
from skewless.core.runtimes.eager import EagerRuntime
from skewless.core.service import ModelService
from skewless.core.stages import InputError
from skewless.core.telemetry import EDGES
from skewless.training.cache import report_unreadable
from skewless.training.checkpoint import network_of, trained
from skewless.training.manifest import Recording

PREDICTIONS = "predictions.csv"


@dataclass(frozen=True)
class Prediction:
    """What the service computed for one recording, float32 exactly."""

    recording: Recording
    sha256: str
    scores: tuple[float, ...]
    parts: tuple[Part, ...]


def service_of(definition: Definition, checkpoint: dict[str, Any], device: torch.device) -> ModelService:
    """The service of a checkpoint that is not packaged yet: pipeline, limits, precision and post-processing are the
    definition's, as when served; the network runs in eager mode behind every stage, which other runtimes are compared with.

    Raises CheckpointError for a checkpoint that was trained with something else than the definition says.
    """
    definition = trained(definition, checkpoint)
    definition.precision.apply()
    found, settings = runtime_settings(definition.runtime)
    # Another runtime's micro-batch is not eager mode's.
    micro_batch = settings.micro_batch if found is EagerRuntime else RuntimeSettings.micro_batch
    definition = replace(definition, runtime={EagerRuntime.name: {"micro_batch": micro_batch}}, fast_runtime=None)
    runtime = EagerRuntime(network_of(checkpoint, definition), device, RuntimeSettings(micro_batch=micro_batch))
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
            failures[recording.file_path] = pointer(payload) or str(error)
            continue
        digest = hashlib.sha256(payload).hexdigest()
        predictions.append(Prediction(recording, digest, scored.scores, scored.parts))
    report_unreadable(failures, skip_unreadable)
    return predictions


def arrays(predictions: list[Prediction]) -> tuple[np.ndarray, np.ndarray]:
    """Labels `(N,)`, and scores `(N,)` or, with more than two classes, `(N, C)`."""
    labels, scores = np.array([p.recording.label for p in predictions]), np.array([p.scores for p in predictions])
    return labels, scores[:, 0] if scores.shape[1] == 1 else scores


def dataset_digest(predictions: list[Prediction]) -> str:
    """SHA-256 over the recordings' own digests and labels: the same data under other file names is the same data."""
    rows = sorted({f"{p.sha256} {p.recording.label} {p.recording.split}" for p in predictions})
    return hashlib.sha256("\n".join(rows).encode()).hexdigest()


def score_columns(classes: Sequence[str]) -> list[str]:
    """What predictions.csv calls the scores."""
    return ["probability"] if len(classes) == 2 else [f"probability_{name}" for name in classes]


def write_predictions(path: Path, classes: Sequence[str], predictions: list[Prediction]) -> None:
    """predictions.csv: a row per recording, with every score to its last digit."""
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["file_path", "label", "split", *score_columns(classes), "sha256"])
        for p in predictions:
            # repr gives the shortest text that reads back as the same number.
            scores = map(repr, p.scores)
            writer.writerow([p.recording.file_path, p.recording.label, p.recording.split, *scores, p.sha256])


def score_histogram(path: Path, split: str, classes: Sequence[str]) -> dict[str, list[float] | list[int]]:
    """How the evaluation's scores are distributed, to compare live ones with: the edges of bins in [0, 1], and how many
    recordings of `split` are in each. A score on an edge is in the bin below.

    path: what `write_predictions` wrote. Of two classes, the score is the probability of the second; of more, the highest.
    """
    with open(path, newline="", encoding="utf-8") as file:
        rows = [row for row in csv.DictReader(file) if row["split"] == split]
    scores = np.array([max(float(row[name]) for name in score_columns(classes)) for row in rows])
    # np.histogram's bins have their lower edge in them.
    counts = np.bincount(np.searchsorted(EDGES[1:-1], scores), minlength=len(EDGES) - 1)
    return {"edges": list(EDGES), "counts": counts.tolist()}

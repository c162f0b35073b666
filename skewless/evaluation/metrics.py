"""The figures of an evaluation."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
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

from skewless.core.postprocess import Postprocessor

THRESHOLDS = (0.3, 0.4, 0.5, 0.6, 0.7)
_CANDIDATES = np.linspace(0.01, 0.99, 99)


def check_scores(labels: np.ndarray, scores: np.ndarray) -> None:
    """Raise ValueError unless scores `(N,)`, `(N, 1)` or `(N, C)` are numbers that tell the labels' `(N,)` classes apart.

    One score tells two classes apart, and C scores C classes, from three on.
    """
    columns = scores.reshape(len(labels), -1)
    if bad := int((~np.isfinite(columns).all(axis=1)).sum()):
        raise ValueError(
            f"{bad} of {len(labels)} recordings have a score that is NaN or infinite, expected numbers: the training diverged, "
            "or the network does not belong to this pipeline"
        )
    count = columns.shape[1]
    if count == 2:
        raise ValueError("there are two scores per recording; of two classes there is one, the second's probability")
    classes = max(2, count)
    if (found := int(labels.max()) + 1) > classes:
        raise ValueError(
            f"the labels are of {found} classes, and {count} score{'s' * (count > 1)} per recording tell{'s' * (count == 1)} "
            f"{classes} apart; give model.yaml's post-processing the manifest's classes, and a network with an output for each"
        )


def one_against_rest(labels: np.ndarray, scores: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Labels `(N,)` and scores as ranking figures take them: `(N,)` and `(N,)` for scores `(N, 1)`, and for `(N, C)` each
    class against the rest, `(N, C)` and `(N, C)`, of which the figures are means over the classes. Raises what
    `check_scores` raises."""
    check_scores(labels, scores)
    if scores.shape[1] == 1:
        return labels, scores[:, 0]
    return np.eye(scores.shape[1])[labels], scores


def auc(labels: np.ndarray, scores: np.ndarray) -> float:
    """The area under the ROC curve of labels `(N,)` and scores `(N, 1)` or `(N, C)`, in [0, 1]."""
    return float(roc_auc_score(*one_against_rest(labels, scores)))


def best_threshold(labels: np.ndarray, probabilities: np.ndarray) -> float:
    """The F1-optimal one of linspace(0.01, 0.99, 99); of equals, the middle one, farthest from either class."""
    check_scores(labels, probabilities)
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


def measure_two_classes(labels: np.ndarray, probabilities: np.ndarray, threshold: float) -> dict[str, Any]:
    """Figures of labels `(N,)` in {0, 1} and probabilities `(N,)`, at every threshold and at the chosen one."""
    check_scores(labels, probabilities)
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
    check_scores(labels, probabilities)
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

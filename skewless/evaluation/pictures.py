"""Pictures of an evaluation and of a training run."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import matplotlib
import numpy as np
from sklearn.metrics import precision_recall_curve, roc_curve

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.ticker import MaxNLocator


def draw_evaluation(out: Path, labels: np.ndarray, scores: np.ndarray, metrics: dict[str, Any]) -> None:
    """Write roc.png, pr.png, calibration.png and confusion.png.

    labels `(N,)`; scores `(N,)`, or `(N, C)` with a column per class, which are then drawn each against the rest.
    metrics: what skewless.evaluation.evaluate measured of them.
    """
    marks: tuple[tuple[float, float], ...] = ()
    if scores.ndim == 1:
        curves = [("", labels, scores)]
        point, name = metrics["at_best_threshold"], f"threshold {metrics['threshold']:.2f}"
        counts = point["confusion"]
        table = np.array(
            [
                [counts["true_negative"], counts["false_positive"]],
                [counts["false_negative"], counts["true_positive"]],
            ]
        )
        marks = ((table[0, 1] / table[0].sum(), point["recall"]), (point["recall"], point["precision"]))
    else:
        curves = [(f"{c}, ", labels == k, scores[:, k]) for k, c in enumerate(metrics["classes"])]
        table = np.array(metrics["confusion"])

    figure, axes = plt.subplots(figsize=(5, 5))
    for prefix, positive, probability in curves:
        fpr, tpr, _ = roc_curve(positive, probability)
        label = prefix.rstrip(", ") or f"AUC {metrics['auc']:.3f}"
        axes.plot(fpr, tpr, drawstyle="steps-post", label=label)
    axes.plot([0, 1], [0, 1], ":", color="grey", label="chance")
    if marks:
        axes.plot(*marks[0], "o", label=name)
    axes.set(xlabel="false positive rate", ylabel="true positive rate", title=f"ROC, {metrics['split']} split")
    save(figure, axes, out / "roc.png")

    figure, axes = plt.subplots(figsize=(5, 5))
    for prefix, positive, probability in curves:
        precision, recall, _ = precision_recall_curve(positive, probability)
        label = prefix.rstrip(", ") or f"average precision {metrics['average_precision']:.3f}"
        axes.plot(recall, precision, drawstyle="steps-post", label=label)
    if marks:
        axes.axhline(labels.mean(), linestyle=":", color="grey", label="chance")
        axes.plot(*marks[1], "o", label=name)
    axes.set(
        xlabel="recall", ylabel="precision", ylim=(0, 1.05), title=f"Precision and recall, {metrics['split']} split"
    )
    save(figure, axes, out / "pr.png")

    figure, axes = plt.subplots(figsize=(5, 5))
    calibration = metrics["calibration"]
    axes.plot(
        calibration["mean_probability"], calibration["fraction_positive"], "o-", label=f"Brier {metrics['brier']:.3f}"
    )
    axes.plot([0, 1], [0, 1], ":", color="grey", label="perfect")
    confidence = scores if scores.ndim == 1 else scores.max(axis=1)
    share = np.full(len(labels), 1 / len(labels))
    axes.hist(confidence, bins=10, range=(0, 1), weights=share, alpha=0.2, label="share of files")
    fraction = "fraction positive" if scores.ndim == 1 else "fraction right"
    axes.set(xlabel="mean probability", ylabel=fraction, title=f"Calibration, {metrics['split']} split")
    save(figure, axes, out / "calibration.png")

    _draw_confusion(out / "confusion.png", table, metrics)


def _draw_confusion(path: Path, table: np.ndarray, metrics: dict[str, Any]) -> None:
    figure, axes = plt.subplots(figsize=(5, 5))
    axes.imshow(table / table.sum(axis=1, keepdims=True), cmap="Blues", vmin=0, vmax=1)
    for (row, column), count in np.ndenumerate(table):
        shade = "white" if count > 0.5 * table[row].sum() else "black"
        axes.text(column, row, str(count), ha="center", va="center", color=shade)
    names = metrics["classes"]
    axes.set(xlabel="decided", ylabel="label", title=f"Decisions, {metrics['split']} split")
    axes.set_xticks(range(len(names)), names)
    axes.set_yticks(range(len(names)), names)
    save(figure, axes, path, grid=False)


def draw_training(path: Path, history: list[dict[str, float]], chosen: int) -> None:
    """The losses and the validation AUC over the epochs, and the epoch that was `chosen`."""
    figure, axes = plt.subplots(figsize=(7, 4))
    epochs = [h["epoch"] for h in history]
    axes.plot(epochs, [h["train_loss"] for h in history], label="training loss")
    axes.plot(epochs, [h["val_loss"] for h in history], label="validation loss")
    axes.plot(epochs, [h["val_auc"] for h in history], label="validation AUC")
    axes.axvline(chosen, linestyle=":", color="grey", label="chosen epoch")
    axes.set(xlabel="epoch", title="Training")
    cast(MaxNLocator, axes.xaxis.get_major_locator()).set_params(integer=True)
    save(figure, axes, path)


def save(figure: Any, axes: Any, path: Path, *, grid: bool = True) -> None:
    """Write a figure without what says which program made it."""
    if grid:
        axes.grid(alpha=0.3)
        axes.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=110, metadata={"Software": None})
    plt.close(figure)

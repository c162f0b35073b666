"""What a file records of its training, held against what its weights answer behind each pipeline.

Weights do not say which preprocessing they were trained behind, but often a validation AUC or probabilities were kept.
The pipeline that reproduces them is the one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from skewless.core.definition import Definition
from skewless.core.numerics import TOLERANCES
from skewless.core.pipeline import Pipeline
from skewless.csv_file import csv_rows
from skewless.evaluation.metrics import auc
from skewless.evaluation.references import MIN_REFERENCE_SPREAD
from skewless.evaluation.scores import predict, score_columns, service_of
from skewless.importers.class_order import Orders, orders
from skewless.importers.errors import ImportFileError
from skewless.training.cache import UnreadableRecordings
from skewless.training.manifest import BINARY, Recording

# AUCs closer than this are not told apart: records are rounded to four digits, and a GPU's arithmetic reorders pairs.
_AUC_NOISE = 5e-4


def read_predictions(path: str | Path, classes: Sequence[str] = BINARY) -> dict[str, tuple[float, ...]]:
    """Recorded scores by file_path: of two classes the column `probability`, of more one `probability_CLASS` for each.

    Raises ImportFileError naming the row and the column that is wrong.
    """
    columns = score_columns(classes)
    with csv_rows(path, ImportFileError) as reader:
        needed = ["file_path", *columns]
        absent = [column for column in needed if column not in (reader.fieldnames or [])]
        if absent:
            raise ImportFileError(f"{path}: no column {', '.join(absent)}; it needs {', '.join(needed)}")
        predictions: dict[str, tuple[float, ...]] = {}
        for row, record in enumerate(reader, start=2):
            where, name = f"{path}, row {row}", record["file_path"] or ""
            scores = tuple(_probability(record[column], f"{where}: {column}") for column in columns)
            if predictions.setdefault(name, scores) != scores:
                raise ImportFileError(f"{where}: {name!r} has another probability in an earlier row")
    return predictions


def _probability(text: str | None, where: str) -> float:
    try:
        probability = float(text or "")
    except ValueError:
        probability = float("nan")
    if not 0 <= probability <= 1:
        raise ImportFileError(f"{where} is {text!r}, expected a number in [0, 1]")
    return probability


@dataclass(frozen=True)
class Trial:
    """What the weights answer behind one pipeline, held against the record.

    auc_gap is |AUC - recorded AUC|; mean_dp and max_dp are over the recordings with a recorded probability; orders is how well
    each order of the classes fits the labels. None where nothing is recorded, and everywhere when the pipeline could not be
    run, for the reason in `failure`.
    """

    name: str
    auc: float | None = None
    auc_gap: float | None = None
    mean_dp: float | None = None
    max_dp: float | None = None
    failure: str = ""
    orders: Orders | None = None


def compare(
    definition: Definition,
    checkpoint: dict[str, Any],
    candidates: Mapping[str, Pipeline],
    rows: Sequence[Recording],
    device: torch.device,
    *,
    recorded_auc: float | None,
    recorded: Mapping[str, Sequence[float]],
) -> list[Trial]:
    """One trial per candidate, in order, with a progress bar each; the first is the chosen one, which has to work.

    recorded_auc: of these very rows, or None. recorded: scores by file_path, for as many of the rows as there are.
    Raises ImportFileError when the chosen pipeline cannot be run, or gives all recordings nearly the same probability;
    UnreadableRecordings when it cannot read some of them.
    """
    service = service_of(definition, checkpoint, device)
    labels = np.array([r.label for r in rows])
    trials: list[Trial] = []
    for name, pipeline in candidates.items():
        behind = replace(service, definition=replace(service.definition, pipeline=pipeline))
        try:
            predictions = predict(behind, list(rows), name)
            scores = np.array([p.scores for p in predictions])
            found = auc(labels, scores)
        except UnreadableRecordings as error:
            if not trials:
                raise
            trials.append(Trial(name, failure=f"cannot read {len(error.failures)} recording(s)"))
            continue
        except (RuntimeError, ValueError) as error:
            reason = str(error).splitlines()[0]
            if not trials:
                raise ImportFileError(f"{name} does not give what the network takes: {reason}") from error
            trials.append(Trial(name, failure=reason))
            continue
        if not trials:
            _check_spread(name, scores)
        known = [p for p in predictions if p.recording.file_path in recorded]
        dp = [float(np.abs(np.subtract(p.scores, recorded[p.recording.file_path])).max()) for p in known]
        trials.append(
            Trial(
                name,
                found,
                None if recorded_auc is None else abs(found - recorded_auc),
                float(np.mean(dp)) if dp else None,
                max(dp) if dp else None,
                orders=orders(scores, labels, definition.classes) if definition.classes else None,
            )
        )
    return trials


def _check_spread(name: str, scores: np.ndarray) -> None:
    """Raises ImportFileError when no column of the scores `(N, 1)` or `(N, C)` spans enough."""
    low, high = scores.min(axis=0), scores.max(axis=0)
    widest = int(np.argmax(high - low))
    if not high[widest] - low[widest] >= MIN_REFERENCE_SPREAD:
        raise ImportFileError(
            f"behind {name} all {len(scores)} recordings get a probability between {low[widest]:.4f} and {high[widest]:.4f}, "
            f"expected a range of at least {MIN_REFERENCE_SPREAD}: the network looks untrained, or the pipeline is not its own"
        )


@dataclass(frozen=True)
class Verdict:
    """A sentence for the terminal, and whether the chosen pipeline is in doubt."""

    text: str
    doubtful: bool


def judge(trials: Sequence[Trial], rows: Sequence[Recording]) -> Verdict:
    """Which pipeline reproduces the record best, and whether the chosen one (the first) is as good.

    By recorded probabilities where there are any: as good is within the exact tier's tolerance everywhere, or within twice
    the best one's mean difference. Else by the AUC, the share of pairs of recordings in the right order: as good is within half
    a pair, or _AUC_NOISE, of the best one's gap.
    """
    chosen = trials[0]
    if chosen.mean_dp is not None:
        by_dp = sorted(
            ((t.mean_dp, t.max_dp, t) for t in trials if t.mean_dp is not None and t.max_dp is not None),
            key=lambda measured: measured[0],
        )
        least_mean, least_max, best = by_dp[0]
        alike = [t for mean, largest, t in by_dp if largest <= TOLERANCES["exact"] or mean <= 2 * least_mean]
        reproduced = least_max <= TOLERANCES["exact"]
        what, more = "the recorded probabilities", ""
        shown = {t.name: f"mean |dp| {mean:.1e}, largest {largest:.1e}" for mean, largest, t in by_dp}
    elif chosen.auc_gap is not None:
        by_gap = sorted(((t.auc_gap, t) for t in trials if t.auc_gap is not None), key=lambda measured: measured[0])
        least, best = by_gap[0]
        counts = np.bincount([r.label for r in rows])
        noise = max(0.5 / min(n * (len(rows) - n) for n in counts), _AUC_NOISE)
        alike = [t for gap, t in by_gap if gap - least <= noise]
        reproduced = least <= noise
        what, more = (
            "the recorded validation AUC",
            " Recorded probabilities (--predictions) tell pipelines apart far better.",
        )
        shown = {t.name: f"off by {gap:.4f}" for gap, t in by_gap}
    else:
        return Verdict("Nothing recorded to compare with: neither a val_auc of this split nor --predictions.", False)
    if not reproduced:
        return Verdict(
            f"None of these pipelines reproduces {what}; the closest is {best.name} ({shown[best.name]}), chosen is "
            f"{chosen.name} ({shown[chosen.name]}). Either the recordings, the weights or the preprocessing are not those of "
            f"the record, or it was computed in lower precision (TF32 on a GPU: some 1e-3).{more}",
            True,
        )
    if chosen not in alike:
        return Verdict(
            f"{best.name} reproduces {what} ({shown[best.name]}); the chosen {chosen.name} does not "
            f"({shown[chosen.name]}). The checkpoint was most likely trained behind {best.name}.",
            True,
        )
    others = [t.name for t in alike if t != chosen]
    too = f" So do, as far as {len(rows)} recordings can tell: {', '.join(others)}.{more}" if others else ""
    return Verdict(f"{chosen.name} reproduces {what} ({shown[chosen.name]}).{too}", False)


@dataclass(frozen=True)
class Comparison:
    """All trials on the recordings of one split.

    known: how many of the recordings have a recorded probability. recorded_auc: of this split, None where there is none.
    """

    split: str
    recordings: int
    known: int
    recorded_auc: float | None
    trials: tuple[Trial, ...]
    verdict: Verdict

    def text(self) -> str:
        """What was compared, and a Markdown table with one row per pipeline."""
        lines = [
            f"{self.recordings} recordings of split '{self.split}', {self.known} with a recorded probability",
            *([] if self.recorded_auc is None else [f"recorded validation AUC: {self.recorded_auc:.4f}"]),
            *_table(self.trials),
            *(f"{t.name} could not be run: {t.failure}" for t in self.trials if t.failure),
        ]
        return "\n".join(lines)


def _table(trials: Sequence[Trial]) -> list[str]:
    rows = [["pipeline", "AUC", "|AUC - recorded|", "max |dp|", "mean |dp|"]]
    for t in trials:
        numbers = [(t.auc, ".4f"), (t.auc_gap, ".4f"), (t.max_dp, ".1e"), (t.mean_dp, ".1e")]
        rows.append([t.name, *("-" if value is None else format(value, form) for value, form in numbers)])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["| " + " | ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)) + " |" for row in rows]
    lines.insert(1, "|" + "|".join("-" * (w + 2) for w in widths) + "|")
    return lines

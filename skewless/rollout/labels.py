"""Labels that are known later: how well each arm's answers rank and decide the files that they are of."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from scipy.stats import binomtest, norm, rankdata

from skewless.core.telemetry import Answered
from skewless.csv_file import csv_rows
from skewless.errors import UsageError
from skewless.rollout.evidence import Arm, Evidence
from skewless.rollout.sequential import Interval

KEYS = ("request_id", "sha256", "file")
CONFIDENCE = 0.95
_SHOWN = 5


@dataclass(frozen=True)
class Labelled:
    """One arm's answers to labelled files.

    files: how many. accuracy: of the decisions, with its interval (Clopper and Pearson). auc: of two classes' probabilities, with
    its interval (DeLong); None for more classes, and while the files are all of one class. Both intervals are for one look.
    """

    arm: Arm
    version: str
    files: int
    accuracy: float | None
    accuracy_interval: Interval | None
    auc: float | None
    auc_interval: Interval | None


@dataclass(frozen=True)
class Labels:
    """What labels say of the arms.

    unknown: keys of the labels' file that no arm answered. ambiguous: ids of requests with several files, whose labels say nothing
    of one.
    """

    arms: tuple[Labelled, ...]
    unknown: tuple[str, ...]
    ambiguous: tuple[str, ...]


def read_labels(path: str | Path, classes: Sequence[str]) -> tuple[str, dict[str, int]]:
    """What identifies a file, one of KEYS, and each one's class by its number.

    path: a CSV with a column `label`, a class's name or number, and one of request_id, sha256, and file, a path relative to the
    CSV's folder, of which the SHA-256 is taken. Raises UsageError, naming the row.
    """
    path = Path(path)
    labels: dict[str, int] = {}
    try:
        with csv_rows(path, ValueError) as rows:
            columns = rows.fieldnames or []
            keys = [key for key in KEYS if key in columns]
            if len(keys) != 1 or "label" not in columns:
                raise UsageError(
                    f"{path} has the columns {', '.join(columns) or 'none'}; expected label and one of {', '.join(KEYS)}"
                )
            for number, row in enumerate(rows, start=2):
                key = _key(path, number, keys[0], row[keys[0]])
                label = _class(path, number, row["label"], classes)
                if labels.setdefault(key, label) != label:
                    raise UsageError(f"{path}, line {number}: {key} has another label above; give each file one")
    except OSError as error:
        raise UsageError(f"{path} cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise UsageError(str(error)) from error
    if not labels:
        raise UsageError(f"{path} has no rows")
    return keys[0], labels


def by_labels(evidence: Evidence, path: str | Path) -> Labels:
    """Join labels with what the arms answered. Raises UsageError for a wrong file, and where no arm answered anything."""
    if not evidence.classes:
        raise UsageError(
            f"neither version of {evidence.model} has answered a file yet; there is nothing to join labels with"
        )
    key, labels = read_labels(path, evidence.classes)
    known: set[str] = set()
    ambiguous: set[str] = set()
    found = []
    for arm, answered in evidence.answered.items():
        groups: dict[str, list[Answered]] = {}
        for each in answered:
            name = each.id if key == "request_id" else each.sha256
            if name in labels:
                groups.setdefault(name, []).append(each)
        known |= groups.keys()
        several = {name for name, group in groups.items() if len({each.sha256 for each in group}) > 1}
        ambiguous |= several
        # The same bytes get the same answer: they count once.
        first = {name: group[0] for name, group in groups.items() if name not in several}
        scored = {name: each for name, each in first.items() if each.score is not None}
        if answered:
            found.append(_labelled(evidence, arm, scored, labels))
    unknown = tuple(name for name in labels if name not in known)
    return Labels(tuple(found), unknown, tuple(sorted(ambiguous)))


def auc_interval(labels: np.ndarray, scores: np.ndarray, confidence: float = CONFIDENCE) -> tuple[float, Interval]:
    """The area under the ROC curve of labels `(N,)` in {0, 1} and scores `(N,)`, both classes among them, and its interval.

    DeLong et al. 1988, "Comparing the areas under two or more correlated receiver operating characteristic curves", by midranks
    (Sun and Xu 2014). With one file of a class, the interval is [0, 1].
    """
    positive, negative = scores[labels == 1], scores[labels == 0]
    m, n = len(positive), len(negative)
    ranks = rankdata(np.concatenate([positive, negative]))
    above = (ranks[:m] - rankdata(positive)) / n
    below = 1 - (ranks[m:] - rankdata(negative)) / m
    area = float(above.mean())
    if m < 2 or n < 2:
        return area, Interval(0.0, 1.0)
    error = math.sqrt(above.var(ddof=1) / m + below.var(ddof=1) / n)
    half = float(norm.isf((1 - confidence) / 2)) * error
    return area, Interval(max(0.0, area - half), min(1.0, area + half))


def as_text(labels: Labels) -> str:
    """For a terminal."""
    lines = []
    for each in labels.arms:
        said = f"{each.arm} ({each.version}): {each.files:,} labelled files"
        if each.accuracy is not None and each.accuracy_interval is not None:
            low, high = each.accuracy_interval
            said += f", accuracy {each.accuracy:.4f} ({low:.4f} to {high:.4f})"
        if each.auc is not None and each.auc_interval is not None:
            low, high = each.auc_interval
            said += f", AUC {each.auc:.4f} ({low:.4f} to {high:.4f})"
        lines.append(said)
    for names, what in (
        (labels.unknown, "are of no file that an arm answered"),
        (labels.ambiguous, "are of requests with several files, whose label says nothing of one; use sha256"),
    ):
        if names:
            more = f" and {len(names) - _SHOWN:,} more" if len(names) > _SHOWN else ""
            lines.append(f"{len(names):,} labels {what}: {', '.join(names[:_SHOWN])}{more}")
    return "\n".join(lines)


def _labelled(evidence: Evidence, arm: Arm, answered: Mapping[str, Answered], labels: Mapping[str, int]) -> Labelled:
    version = evidence.baseline if arm == "baseline" else evidence.candidate
    count = len(answered)
    if not count:
        return Labelled(arm, version, 0, None, None, None, None)
    truth = np.array([labels[name] for name in answered])
    right = sum(evidence.classes[label] == each.choice for label, each in zip(truth, answered.values(), strict=True))
    interval = binomtest(right, count).proportion_ci(CONFIDENCE)
    auc = area = None
    if len(evidence.classes) == 2 and len(set(truth.tolist())) == 2:
        auc, area = auc_interval(truth, np.array([each.score for each in answered.values()]))
    return Labelled(arm, version, count, right / count, Interval(float(interval.low), float(interval.high)), auc, area)


def _key(path: Path, number: int, column: str, value: str | None) -> str:
    if not value:
        raise UsageError(f"{path}, line {number}: {column} is empty")
    if column != "file":
        return value
    try:
        return hashlib.sha256((path.parent / value).read_bytes()).hexdigest()
    except OSError as error:
        raise UsageError(f"{path}, line {number}: {value} cannot be read: {error.strerror}") from error


def _class(path: Path, number: int, value: str | None, classes: Sequence[str]) -> int:
    if value in classes:
        return classes.index(value)
    if value and value.isdecimal() and int(value) < len(classes):
        return int(value)
    raise UsageError(
        f"{path}, line {number}: label is {value!r}, expected one of {', '.join(classes)}, or its number from 0"
    )

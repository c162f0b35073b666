"""Whether evaluation computes what training computed: the scores that the checkpoint records, again."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from skewless.core.numerics import TOLERANCES
from skewless.core.selftest.compare import StageDiffersError, compare_stages
from skewless.core.service import ModelService
from skewless.core.versions import changed_versions, library_versions
from skewless.errors import CheckFailedError
from skewless.evaluation.scores import Prediction
from skewless.training.record import stage_sources

ALLOWED = TOLERANCES["exact"]


class NotReproducedError(CheckFailedError):
    """Evaluation gets other scores than training did; the message says by how much, and what has changed in between."""


def reproduce(
    service: ModelService, checkpoint: Mapping[str, Any], predictions: Sequence[Prediction]
) -> dict[str, Any] | None:
    """Hold predictions against the scores that training computed for the same bytes at the epoch of the checkpoint.

    Returns how many `recordings` were compared and the largest difference `max_dp` (None without any), or None for a
    checkpoint that records no scores, as imported ones do. Raises NotReproducedError for a difference above ALLOWED.
    """
    recorded = checkpoint["validation_scores"]
    if not recorded:
        return None
    compared = [p for p in predictions if p.sha256 in recorded]
    if not compared:
        return {"recordings": 0, "max_dp": None}
    differences = np.array([_difference(p.scores, recorded[p.sha256]) for p in compared])
    # Written so that a NaN is one, too.
    off = ~(differences <= ALLOWED)
    if off.any():
        worst = int(np.argmax(np.nan_to_num(differences, nan=np.inf)))
        p = compared[worst]
        raise NotReproducedError(
            f"evaluation does not get the scores that training got: {p.recording.file_path} has {_shown(p.scores)}, and had "
            f"{_shown(recorded[p.sha256])} in training, {differences[worst]:.1e} apart (allowed {ALLOWED:g}; {int(off.sum())} "
            f"of {len(compared)} validation recordings are off). {_what_changed(service, checkpoint)} "
            f"{_first_stage(service, checkpoint, compared)} Evaluate with what it was trained with, or train again"
        )
    return {"recordings": len(compared), "max_dp": float(differences.max())}


def _difference(now: Sequence[float], then: Sequence[float]) -> float:
    return float(np.abs(np.subtract(now, then)).max())


def _shown(scores: Sequence[float]) -> str:
    return ", ".join(f"{score:.6f}" for score in scores)


def _what_changed(service: ModelService, checkpoint: Mapping[str, Any]) -> str:
    versions = changed_versions(checkpoint["library_versions"], library_versions(service.definition.packages))
    then, now = checkpoint["stage_sources"], stage_sources(service.definition)
    sources = [f"'{name}'" for name in {**now, **then} if now.get(name) != then.get(name)]
    changed = f"changed since for {', '.join(sources)}" if sources else "as in training"
    return f"Versions: {versions or 'as in training'}. Source code: {changed}."


def _first_stage(service: ModelService, checkpoint: Mapping[str, Any], predictions: Sequence[Prediction]) -> str:
    """The first stage, in the pipeline's order, that gives something else than in training, in words."""
    recorded = checkpoint["stage_outputs"]
    order = list(service.pipeline.stages)
    found, replayed = [], 0
    for p in predictions:
        if p.sha256 in recorded:
            replayed += 1
            try:
                deque(compare_stages(service.pipeline, p.recording.path.read_bytes(), **recorded[p.sha256]), maxlen=0)
            except StageDiffersError as error:
                found.append((order.index(error.stage), p.recording.file_path, error))
    if found:
        _, file, first = min(found, key=lambda each: each[0])
        return f"The first stage that differs: stage '{first.stage}' on {file}: {first.difference}."
    if replayed:
        return f"No stage differs on the {replayed} recordings whose stages were recorded: what differs is behind them."
    return "Of the recordings whose stages were recorded, none is among these."

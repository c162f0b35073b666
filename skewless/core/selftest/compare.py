"""Holding what a pipeline's stages give now against a record of what they gave."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch

from skewless.core.pipeline import Pipeline
from skewless.core.selftest.record import kind, summary
from skewless.core.stages import Tolerance


class StageDiffersError(ValueError):
    """A stage does not give what its record says. stage: its name; difference: what was found, and what is allowed."""

    def __init__(self, stage: str, difference: str):
        super().__init__(f"stage '{stage}': {difference}")
        self.stage, self.difference = stage, difference


def compare_stages(
    pipeline: Pipeline, payload: bytes, kinds: Mapping[str, str], values: Mapping[str, torch.Tensor]
) -> Iterator[tuple[str, torch.Tensor]]:
    """Every stage's name and output for one recording, compared with its record before it is handed on.

    kinds: the `kind` of every stage's output, by the stages' names, in order. values: their `summary`, by the same names.
    Raises StageDiffersError for the first stage that is further from its record than its tolerance, or in another place,
    and for a first stage that has no tolerance.
    """
    expected = iter(kinds.items())
    unit = ""
    tolerance: Tolerance | None = None
    for name, signal in pipeline.steps(payload):
        recorded_name, recorded_kind = next(expected, (None, None))
        if name != recorded_name:
            raise StageDiffersError(name, f"recorded with '{recorded_name}' in this place")
        if kind(signal.data) != recorded_kind:
            raise StageDiffersError(name, f"{kind(signal.data)}, recorded with {recorded_kind}")
        stage = pipeline.stages[name]
        tolerance, unit = stage.tolerance or tolerance, stage.unit or unit
        if tolerance is None:
            raise StageDiffersError(name, "no unit, and no stage before it to take the tolerance of; give it a unit")
        _compare(name, summary(signal.data), values[name], tolerance, unit)
        yield name, signal.data
    if (missing := next(expected, None)) is not None:
        raise StageDiffersError(missing[0], "recorded with this stage, which is missing now")


def _compare(name: str, now: torch.Tensor, then: torch.Tensor, tolerance: Tolerance, unit: str) -> None:
    if not len(then):
        # Of no values, and so are those of now: they have the same shape.
        return
    scale = float(then.abs().max()) or 1.0 if tolerance.relative else 1.0
    difference = (now - then).abs() / scale
    mean, largest = float(difference.mean()), float(difference.max())
    if not (mean <= tolerance.mean and largest <= tolerance.largest):
        measure = f"of the largest {unit}" if tolerance.relative else unit
        raise StageDiffersError(
            name,
            f"mean difference {mean:.1e} and largest {largest:.1e} {measure}, allowed {tolerance.mean:g} and "
            f"{tolerance.largest:g} ({tolerance.why})",
        )

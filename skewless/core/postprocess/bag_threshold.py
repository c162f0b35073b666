"""One probability for a recording, compared with a threshold."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from skewless.core.postprocess.postprocessor import Part, Postprocessor


@dataclass(frozen=True)
class BagThreshold(Postprocessor):
    """Positive when the bag probability is strictly above the threshold.

    threshold: used where neither the request nor the archive's metrics give one; in [0, 1].
    positive_field: the name of the response's yes/no field.
    classes: the names of the two classes.
    """

    threshold: float
    positive_field: str
    classes: tuple[str, ...]

    def __post_init__(self):
        self._check_threshold()
        self._check_two_classes()

    def scores(self, outputs: Mapping[str, torch.Tensor]) -> tuple[float, ...]:
        """The bag probability."""
        return (float(outputs["bag_probability"]),)

    def parts(self, outputs: Mapping[str, torch.Tensor], metadata: Mapping[str, Any]) -> list[Part]:
        """The segments."""
        segments = outputs["segment_probabilities"].tolist()
        return [Part(start, end, p) for (start, end), p in zip(metadata["segment_times_s"], segments, strict=True)]

    def read(self, body: Mapping[str, Any]) -> tuple[tuple[float, ...], int]:
        return (body["file_probability"],), int(body[self.positive_field])

    def __call__(
        self, outputs: Mapping[str, torch.Tensor], metadata: Mapping[str, Any], threshold: float
    ) -> dict[str, Any]:
        """The response's fields, in plain JSON types; times in seconds, probabilities in [0, 1]."""
        (probability,) = self.scores(outputs)
        segments = outputs["segment_probabilities"].tolist()
        return {
            "file_probability": probability,
            self.positive_field: probability > threshold,
            "threshold_used": threshold,
            "segment_probabilities": segments,
            "segment_timestamps": [list(times) for times in metadata["segment_times_s"]],
            "segment_attention": outputs["segment_attention"].tolist(),
            "num_segments": len(segments),
            "max_segment_probability": max(segments),
            "mean_segment_probability": sum(segments) / len(segments),
            "duration_s": metadata["duration_s"],
            "analyzed_s": metadata["analyzed_s"],
            "truncated": metadata["truncated"],
        }

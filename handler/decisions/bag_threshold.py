"""One probability for a recording, compared with a threshold."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch


@dataclass(frozen=True)
class BagThreshold:
    """Positive when the bag probability is strictly above the threshold.

    threshold: used where neither the request nor the archive's metrics give one; in [0, 1].
    positive_field: the name of the response's yes/no field.
    """

    # The response's field that holds the score, for whoever compares responses with references.
    score_field: ClassVar[str] = "file_probability"

    threshold: float
    positive_field: str

    def __post_init__(self):
        if not 0.0 <= self.threshold <= 1.0:
            raise ValueError(f"threshold is {self.threshold}, expected a number in [0, 1]")

    def score(self, outputs: Mapping[str, torch.Tensor]) -> float:
        """The probability that the decision compares, in [0, 1]."""
        return float(outputs["bag_probability"])

    def __call__(
        self, outputs: Mapping[str, torch.Tensor], facts: Mapping[str, Any], threshold: float
    ) -> dict[str, Any]:
        """The response's fields, in plain JSON types; times in seconds, probabilities in [0, 1]."""
        probability = self.score(outputs)
        segments = outputs["segment_probabilities"].tolist()
        return {
            self.score_field: probability,
            self.positive_field: probability > threshold,
            "threshold_used": threshold,
            "segment_probabilities": segments,
            "segment_timestamps": [list(times) for times in facts["segment_times_s"]],
            "segment_attention": outputs["segment_attention"].tolist(),
            "num_segments": len(segments),
            "max_segment_probability": max(segments),
            "mean_segment_probability": sum(segments) / len(segments),
            "duration_s": facts["duration_s"],
            "analyzed_s": facts["analyzed_s"],
            "truncated": facts["truncated"],
        }

"""A recording is positive when enough of its seconds are."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from skewless.core.postprocess.postprocessor import Part, Postprocessor


@dataclass(frozen=True)
class SecondsVote(Postprocessor):
    """Positive when at least `min_positive_s` seconds have a confidence strictly above the threshold.

    For windows of 2 s, one every second: a second's confidence is the mean probability of the second class in the two
    windows that cover it; only one covers the first second, and one the last.

    The score is the `min_positive_s`-th highest confidence, 0 where there are fewer seconds: it exceeds a threshold
    exactly when that many seconds do. So a recording of fewer than `min_positive_s` - 1 windows is never positive.

    threshold: of a second's confidence, where neither the request nor the archive's metrics give one; in [0, 1].
    positive_field: the name of the response's yes/no field.
    classes: the names of the two classes.
    """

    tuned: ClassVar[bool] = False

    threshold: float
    min_positive_s: int
    positive_field: str
    classes: tuple[str, ...]

    def __post_init__(self):
        self._check_threshold()
        if type(self.min_positive_s) is not int or self.min_positive_s < 1:
            raise ValueError(f"min_positive_s is {self.min_positive_s!r}, expected a whole number of at least 1")
        self._check_two_classes()

    def scores(self, outputs: Mapping[str, torch.Tensor]) -> tuple[float, ...]:
        """The `min_positive_s`-th highest confidence of a second, or 0."""
        ranked = sorted(_confidences(outputs), reverse=True)
        return (ranked[self.min_positive_s - 1] if len(ranked) >= self.min_positive_s else 0.0,)

    def parts(self, outputs: Mapping[str, torch.Tensor], metadata: Mapping[str, Any]) -> list[Part]:
        """The seconds. Raises ValueError where the windows are not of 2 s, one every second."""
        confidences = _confidences(outputs)
        times = [tuple(window) for window in metadata["segment_times_s"]]
        if times != [(start, start + 2.0) for start in range(len(confidences) - 1)]:
            raise ValueError(
                f"{len(confidences) - 1} windows at {times[:3]} s and so on: seconds_vote takes windows of 2 s, one every "
                "second; set duration_s 2.0 and hop_s 1.0 in the pipeline's 'segment', or choose other post-processing"
            )
        return [Part(float(start), start + 1.0, value) for start, value in enumerate(confidences)]

    def read(self, body: Mapping[str, Any]) -> tuple[tuple[float, ...], int]:
        return (body["global_confidence"],), int(body[self.positive_field])

    def __call__(
        self, outputs: Mapping[str, torch.Tensor], metadata: Mapping[str, Any], threshold: float
    ) -> dict[str, Any]:
        """The response's fields, in plain JSON types; times in seconds, probabilities in [0, 1].

        Raises ValueError where the windows are not of 2 s, one every second.
        """
        (score,) = self.scores(outputs)
        seconds = [
            {"start_s": s.start_s, "end_s": s.end_s, "confidence": s.probability, "positive": s.probability > threshold}
            for s in self.parts(outputs, metadata)
        ]
        return {
            "global_confidence": score,
            self.positive_field: score > threshold,
            "threshold_used": threshold,
            "min_positive_seconds": self.min_positive_s,
            "positive_seconds": [s["start_s"] for s in seconds if s["positive"]],
            "seconds": seconds,
            "duration_s": metadata["duration_s"],
            "analyzed_s": metadata["analyzed_s"],
            "truncated": metadata["truncated"],
        }


def _confidences(outputs: Mapping[str, torch.Tensor]) -> list[float]:
    """Of each second, from the windows' class_probabilities `(S, 2)`: S + 1 numbers."""
    windows = outputs["class_probabilities"][:, 1].tolist()
    # The first and the last second lie in one window: taken twice, its mean is itself.
    return [(a + b) / 2 for a, b in zip([windows[0], *windows], [*windows, windows[-1]], strict=True)]

"""One of two labels: the second where its probability is above a threshold."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from skewless.core.postprocess.postprocessor import Postprocessor


@dataclass(frozen=True)
class LabelThreshold(Postprocessor):
    """The second label when its probability is strictly above the threshold, else the first.

    threshold: used where neither the request nor the archive's metrics give one; in [0, 1].
    classes: the two classes' names, by the labels' numbers.
    positive_field: the name of the response's yes/no field: whether the second label was chosen.
    """

    threshold: float
    classes: tuple[str, ...]
    positive_field: str

    def __post_init__(self):
        self._check_threshold()
        self._check_two_classes()

    def scores(self, outputs: Mapping[str, torch.Tensor]) -> tuple[float, ...]:
        """The probability of the second label."""
        return (float(outputs["probability"]),)

    def read(self, body: Mapping[str, Any]) -> tuple[tuple[float, ...], int]:
        return (body["probability"],), int(body[self.positive_field])

    def __call__(
        self, outputs: Mapping[str, torch.Tensor], metadata: Mapping[str, Any], threshold: float
    ) -> dict[str, Any]:
        """The response's fields, in plain JSON types; confidence is the probability of the label that is given."""
        scores = self.scores(outputs)
        (probability,) = scores
        chosen = self.choose(scores, threshold)
        return {
            "label": self.classes[chosen],
            "confidence": probability if chosen else 1.0 - probability,
            "probability": probability,
            self.positive_field: bool(chosen),
            "threshold_used": threshold,
            **self._of_the_file(metadata),
        }

"""One of two labels: the second where its probability is above a threshold."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from handler.decisions.decision import Decision


@dataclass(frozen=True)
class LabelThreshold(Decision):
    """The second label when its probability is strictly above the threshold, else the first.

    threshold: used where neither the request nor the archive's metrics give one; in [0, 1].
    labels: the two classes' names, by the labels' numbers.
    positive_field: the name of the response's yes/no field: whether the second label was chosen.
    """

    threshold: float
    labels: tuple[str, ...]
    positive_field: str

    def __post_init__(self):
        self._check_threshold()
        if not isinstance(self.labels, list | tuple):
            raise ValueError(f"labels is {self.labels!r}, expected a list of two different names")
        # A list from a file; a tuple cannot be changed behind a frozen decision's back.
        object.__setattr__(self, "labels", tuple(self.labels))
        if len(set(self.labels)) != 2 or len(self.labels) != 2:
            raise ValueError(f"labels is {list(self.labels)}, expected two different names")

    @property
    def classes(self) -> tuple[str, ...]:
        return self.labels

    def scores(self, outputs: Mapping[str, torch.Tensor]) -> tuple[float, ...]:
        """The probability of the second label."""
        return (float(outputs["probability"]),)

    def read(self, body: Mapping[str, Any]) -> tuple[tuple[float, ...], int]:
        return (body["probability"],), int(body[self.positive_field])

    def __call__(
        self, outputs: Mapping[str, torch.Tensor], facts: Mapping[str, Any], threshold: float
    ) -> dict[str, Any]:
        """The response's fields, in plain JSON types; confidence is the probability of the label that is given."""
        scores = self.scores(outputs)
        (probability,) = scores
        chosen = self.choose(scores, threshold)
        return {
            "label": self.labels[chosen],
            "confidence": probability if chosen else 1.0 - probability,
            "probability": probability,
            self.positive_field: bool(chosen),
            "threshold_used": threshold,
            "duration_s": facts["duration_s"],
        }

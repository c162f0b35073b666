"""One probability per class; the highest is the answer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch

from handler.decisions.decision import Decision


class ClassProbabilities(Decision):
    """The most probable of three or more classes, which exclude one another.

    classes: their names, in the order of the network's outputs.
    threshold: an answer is confident when its probability is at least this. It never changes which class is chosen, so
        evaluation does not tune it.
    """

    tuned: ClassVar[bool] = False

    def __init__(self, classes: Sequence[str], threshold: float):
        named = isinstance(classes, list | tuple) and all(isinstance(name, str) for name in classes)
        if not named or len(set(classes)) != len(classes) or len(classes) < 3:
            # With two, a decision compares one score with its threshold.
            raise ValueError(f"classes is {classes!r}, expected a list of three or more different names")
        self._classes = tuple(classes)
        self.threshold = threshold
        self._check_threshold()

    @property
    def classes(self) -> tuple[str, ...]:
        return self._classes

    def scores(self, outputs: Mapping[str, torch.Tensor]) -> tuple[float, ...]:
        """The classes' probabilities, in order; raises ValueError when the network has another number of outputs."""
        scores = tuple(outputs["class_probabilities"].tolist())
        if len(scores) != len(self.classes):
            raise ValueError(f"the network gives {len(scores)} probabilities, for {len(self.classes)} classes")
        return scores

    def __call__(
        self, outputs: Mapping[str, torch.Tensor], facts: Mapping[str, Any], threshold: float
    ) -> dict[str, Any]:
        """The response's fields, in plain JSON types: probabilities in [0, 1], width and height in pixels."""
        scores = self.scores(outputs)
        chosen = self.choose(scores, threshold)
        return {
            "label": self.classes[chosen],
            "confidence": scores[chosen],
            "confident": scores[chosen] >= threshold,
            "probabilities": dict(zip(self.classes, scores, strict=True)),
            "threshold_used": threshold,
            "width": facts["width"],
            "height": facts["height"],
        }

    def read(self, body: Mapping[str, Any]) -> tuple[tuple[float, ...], int]:
        return tuple(body["probabilities"][name] for name in self.classes), self.classes.index(body["label"])

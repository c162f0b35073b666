"""One probability per class; the highest is the answer."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch

from skewless.core.postprocess.postprocessor import Postprocessor


class ClassProbabilities(Postprocessor):
    """The most probable of three or more classes, which exclude one another.

    classes: their names, in the order of the network's outputs.
    threshold: an answer is confident when its probability is at least this. It never changes which class is chosen, so
        evaluation does not tune it.
    """

    tuned: ClassVar[bool] = False

    def __init__(self, classes: tuple[str, ...], threshold: float):
        if len(set(classes)) != len(classes) or len(classes) < 3:
            # With two, there is one score, compared with the threshold.
            raise ValueError(f"classes is {list(classes)}, expected a list of three or more different names")
        self.classes = tuple(classes)
        self.threshold = threshold
        self._check_threshold()

    def scores(self, outputs: Mapping[str, torch.Tensor]) -> tuple[float, ...]:
        """The classes' probabilities, in order, of class_probabilities `(C,)`, or the mean over the rows of `(S, C)`.

        Raises ValueError when the network has another number of outputs.
        """
        probabilities = outputs["class_probabilities"]
        # One row stays as it is, to the last bit.
        if probabilities.ndim == 2:
            probabilities = probabilities[0] if len(probabilities) == 1 else probabilities.mean(dim=0)
        scores = tuple(probabilities.tolist())
        if len(scores) != len(self.classes):
            raise ValueError(f"the network gives {len(scores)} probabilities, for {len(self.classes)} classes")
        return scores

    def settled(self, scores: tuple[float, ...], threshold: float, margin: float) -> bool:
        """As for any postprocessor, and whether the answer is confident must not change either."""
        highest = max(scores)
        confident = highest - margin >= threshold or highest + margin < threshold
        return confident and super().settled(scores, threshold, margin)

    def __call__(
        self, outputs: Mapping[str, torch.Tensor], metadata: Mapping[str, Any], threshold: float
    ) -> dict[str, Any]:
        """The response's fields, in plain JSON types: probabilities in [0, 1]; of a picture width and height in pixels, of a
        recording its duration in seconds."""
        scores = self.scores(outputs)
        chosen = self.choose(scores, threshold)
        return {
            "label": self.classes[chosen],
            "confidence": scores[chosen],
            "confident": scores[chosen] >= threshold,
            "probabilities": dict(zip(self.classes, scores, strict=True)),
            "threshold_used": threshold,
            **self._of_the_file(metadata),
        }

    def read(self, body: Mapping[str, Any]) -> tuple[tuple[float, ...], int]:
        return tuple(body["probabilities"][name] for name in self.classes), self.classes.index(body["label"])

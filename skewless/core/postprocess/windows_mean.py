"""A recording is positive when the mean of some of its windows reaches a threshold."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from skewless.core.postprocess.postprocessor import Part, Postprocessor
from skewless.core.postprocess.windows import described, mean_above, window_parts, window_probabilities


class WindowsMean(Postprocessor):
    """Positive when the mean confidence of some windows is at least the threshold: at equality, too.

    A window's confidence is its probability of the second class. A recording without windows is negative, at any threshold.

    Other post-processing is positive strictly above the threshold, and so is every score. So the score is the next float64
    above the mean: it is strictly above a threshold exactly when the mean is at least as high. Without windows it is 0.

    window_threshold: above it the response calls a window positive; in [0, 1]. A request does not change it.
    """

    tuned: ClassVar[bool] = False
    without_windows: ClassVar[bool] = True

    window_threshold: float
    positive_field: str

    @abstractmethod
    def mean(self, windows: list[float]) -> float:
        """The mean that decides, by the probabilities of at least one window."""

    def scores(self, outputs: Mapping[str, torch.Tensor]) -> tuple[float, ...]:
        """The next float64 above the mean, or 0 without windows."""
        windows = window_probabilities(outputs)
        return (math.nextafter(self.mean(windows), math.inf) if windows else 0.0,)

    def parts(self, outputs: Mapping[str, torch.Tensor], metadata: Mapping[str, Any]) -> list[Part]:
        return window_parts(outputs, metadata)

    def read(self, body: Mapping[str, Any]) -> tuple[tuple[float, ...], int]:
        score = math.nextafter(body["global_confidence"], math.inf) if body["windows"] else 0.0
        return (score,), int(body[self.positive_field])

    def __call__(
        self, outputs: Mapping[str, torch.Tensor], metadata: Mapping[str, Any], threshold: float
    ) -> dict[str, Any]:
        """The response's fields, in plain JSON types; times in seconds, probabilities in [0, 1].

        global_confidence: the mean that decides, 0 without windows.
        """
        scores, windows = self.scores(outputs), window_probabilities(outputs)
        return {
            "global_confidence": self.mean(windows) if windows else 0.0,
            self.positive_field: bool(self.choose(scores, threshold)),
            "threshold_used": threshold,
            "window_threshold": self.window_threshold,
            **described("windows", self.parts(outputs, metadata), self.window_threshold),
            "duration_s": metadata["duration_s"],
            "analyzed_s": metadata["analyzed_s"],
            "truncated": metadata["truncated"],
        }

    def _check(self) -> None:
        self._check_threshold()
        if not 0.0 <= self.window_threshold <= 1.0:
            raise ValueError(f"window_threshold is {self.window_threshold}, expected a number in [0, 1]")
        self._check_two_classes()


@dataclass(frozen=True)
class TopWindowsMean(WindowsMean):
    """Positive when the mean confidence of the `top` highest windows, or of all where there are fewer, is at least the threshold:
    at equality, too.

    threshold: of that mean, where neither the request nor the archive's metrics give one; in [0, 1].
    window_threshold: strictly above it the response calls a window positive, which decides nothing; in [0, 1].
    positive_field: the name of the response's yes/no field.
    classes: the names of the two classes.
    """

    threshold: float
    top: int
    window_threshold: float
    positive_field: str
    classes: tuple[str, ...]

    def __post_init__(self):
        self._check()
        if type(self.top) is not int or self.top < 1:
            raise ValueError(f"top is {self.top!r}, expected a whole number of at least 1")

    def mean(self, windows: list[float]) -> float:
        highest = sorted(windows, reverse=True)[: self.top]
        return sum(highest) / len(highest)


@dataclass(frozen=True)
class PositiveWindowsMean(WindowsMean):
    """Positive when the mean confidence of the positive windows, 0 where there is none, is at least the threshold: at equality,
    too.

    threshold: of that mean, where neither the request nor the archive's metrics give one; in [0, 1].
    window_threshold: a window is positive when its confidence is strictly above it; in [0, 1].
    positive_field: the name of the response's yes/no field.
    classes: the names of the two classes.
    """

    threshold: float
    window_threshold: float
    positive_field: str
    classes: tuple[str, ...]

    def __post_init__(self):
        self._check()

    def mean(self, windows: list[float]) -> float:
        return mean_above(windows, self.window_threshold)

"""A recording is positive when enough of its seconds, or of its windows, are."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from skewless.core.postprocess.postprocessor import Part, Postprocessor
from skewless.core.postprocess.windows import described, mean_above, window_parts, window_probabilities


class Vote(Postprocessor):
    """Positive when at least so many pieces of the recording have a confidence strictly above the threshold.

    The score is the confidence that decides: of the highest ones the last that is needed, 0 where there are fewer pieces. It
    exceeds a threshold exactly when that many pieces do. A recording without windows is negative.

    pieces: what the response calls them. needed: how many of them have to be positive.
    """

    tuned: ClassVar[bool] = False
    without_windows: ClassVar[bool] = True
    pieces: ClassVar[str]

    positive_field: str

    @property
    @abstractmethod
    def needed(self) -> int: ...

    @abstractmethod
    def confidences(self, windows: list[float]) -> list[float]:
        """The pieces' confidences, by the windows' probabilities of the second class; none of no windows."""

    def scores(self, outputs: Mapping[str, torch.Tensor]) -> tuple[float, ...]:
        """The `needed`-th highest confidence, or 0."""
        ranked = sorted(self.confidences(window_probabilities(outputs)), reverse=True)
        return (ranked[self.needed - 1] if len(ranked) >= self.needed else 0.0,)

    def read(self, body: Mapping[str, Any]) -> tuple[tuple[float, ...], int]:
        return (body["deciding_confidence"],), int(body[self.positive_field])

    def __call__(
        self, outputs: Mapping[str, torch.Tensor], metadata: Mapping[str, Any], threshold: float
    ) -> dict[str, Any]:
        """The response's fields, in plain JSON types; times in seconds, probabilities in [0, 1].

        deciding_confidence: the score. global_confidence: in percent, the mean confidence of the positive pieces, 0 without any.
        """
        (score,) = self.scores(outputs)
        parts = self.parts(outputs, metadata)
        return {
            "global_confidence": 100 * mean_above([part.probability for part in parts], threshold),
            "deciding_confidence": score,
            self.positive_field: score > threshold,
            "threshold_used": threshold,
            f"min_positive_{self.pieces}": self.needed,
            **described(self.pieces, parts, threshold),
            "duration_s": metadata["duration_s"],
            "analyzed_s": metadata["analyzed_s"],
            "truncated": metadata["truncated"],
        }

    def _check(self, name: str) -> None:
        self._check_threshold()
        if type(self.needed) is not int or self.needed < 1:
            raise ValueError(f"{name} is {self.needed!r}, expected a whole number of at least 1")
        self._check_two_classes()


@dataclass(frozen=True)
class SecondsVote(Vote):
    """Positive when at least `min_positive_s` seconds have a confidence strictly above the threshold.

    For windows of 2 s, one every second: a second's confidence is the mean probability of the second class in the two
    windows that cover it; only one covers the first second, and one the last. So a recording of fewer than
    `min_positive_s` - 1 windows is never positive.

    threshold: of a second's confidence, where neither the request nor the archive's metrics give one; in [0, 1].
    positive_field: the name of the response's yes/no field.
    classes: the names of the two classes.
    """

    pieces: ClassVar[str] = "seconds"

    threshold: float
    min_positive_s: int
    positive_field: str
    classes: tuple[str, ...]

    def __post_init__(self):
        self._check("min_positive_s")

    @property
    def needed(self) -> int:
        return self.min_positive_s

    def confidences(self, windows: list[float]) -> list[float]:
        """Of each second: S + 1 numbers for S windows."""
        if not windows:
            return []
        # The first and the last second lie in one window: taken twice, its mean is itself.
        return [(a + b) / 2 for a, b in zip([windows[0], *windows], [*windows, windows[-1]], strict=True)]

    def parts(self, outputs: Mapping[str, torch.Tensor], metadata: Mapping[str, Any]) -> list[Part]:
        """The seconds. Raises ValueError where the windows are not of 2 s, one every second."""
        windows = window_probabilities(outputs)
        times = [tuple(window) for window in metadata["segment_times_s"]]
        if times != [(start, start + 2.0) for start in range(len(windows))]:
            raise ValueError(
                f"{len(windows)} windows at {times[:3]} s and so on: seconds_vote takes windows of 2 s, one every "
                "second; set duration_s 2.0 and hop_s 1.0 in the pipeline's 'segment', or choose other post-processing"
            )
        return [Part(float(start), start + 1.0, value) for start, value in enumerate(self.confidences(windows))]


@dataclass(frozen=True)
class WindowsVote(Vote):
    """Positive when at least `min_positive_windows` windows have a confidence strictly above the threshold.

    A window's confidence is its own probability of the second class: nothing is averaged.

    threshold: of a window's confidence, where neither the request nor the archive's metrics give one; in [0, 1].
    positive_field: the name of the response's yes/no field.
    classes: the names of the two classes.
    """

    pieces: ClassVar[str] = "windows"

    threshold: float
    min_positive_windows: int
    positive_field: str
    classes: tuple[str, ...]

    def __post_init__(self):
        self._check("min_positive_windows")

    @property
    def needed(self) -> int:
        return self.min_positive_windows

    def confidences(self, windows: list[float]) -> list[float]:
        return windows

    def parts(self, outputs: Mapping[str, torch.Tensor], metadata: Mapping[str, Any]) -> list[Part]:
        return window_parts(outputs, metadata)

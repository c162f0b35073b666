"""What a postprocessor is: from one input's network outputs to what the caller reads."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar, NamedTuple

import torch

from skewless.core.stages import InputError


class Part(NamedTuple):
    """A piece of a recording with a probability of its own; times in seconds from the start."""

    start_s: float
    end_s: float
    probability: float


class Postprocessor(ABC):
    """The answer to one input, and the probabilities by which a served answer is compared with an evaluated one.

    With two classes there is one score, the probability of the second class, and it is chosen when its score is strictly
    above the threshold. With more there is one score per class, and the highest is chosen.

    threshold: where neither the request nor the archive's metrics give one; in [0, 1].
    classes: the labels' names, by the labels' numbers.
    tuned: whether evaluation chooses the threshold; else the one above stays.
    without_windows: whether there is an answer for a recording of which the pipeline gives no window, as `segment` does with
        `short: none`. The network has no outputs for it: they are an empty mapping.
    """

    threshold: float
    classes: tuple[str, ...]
    tuned: ClassVar[bool] = True
    without_windows: ClassVar[bool] = False

    @abstractmethod
    def scores(self, outputs: Mapping[str, torch.Tensor]) -> tuple[float, ...]:
        """The probabilities that `choose` compares, each in [0, 1]."""

    @staticmethod
    def choose(scores: tuple[float, ...], threshold: float) -> int:
        """The number of the chosen class."""
        if len(scores) == 1:
            return int(scores[0] > threshold)
        return max(range(len(scores)), key=scores.__getitem__)

    def settled(self, scores: tuple[float, ...], threshold: float, margin: float) -> bool:
        """Whether no movement of every score by at most `margin` can change what is decided; never of a score that is NaN.

        For two classes, of which the second is chosen when its score exceeds something, and for several, of which the highest is.
        A class of one's own that chooses otherwise, or decides more than that, has one of its own.
        """
        if len(scores) == 1:
            (score,) = scores
            # A choice of one score can only rise with it, so the two ends speak for all between them.
            ends = [self.choose((end,), threshold) for end in (score - margin, score + margin)]
            return math.isfinite(score) and ends[0] == ends[1]
        chosen = self.choose(scores, threshold)
        others = [score for number, score in enumerate(scores) if number != chosen]
        return all(math.isfinite(s) for s in scores) and scores[chosen] - margin > max(others) + margin

    def require_windows(self, windows: int) -> None:
        """Raise InputError for a recording of no windows, unless there is an answer without one."""
        if windows == 0 and not self.without_windows:
            raise InputError(
                "this recording is shorter than one window, and this model has no answer without one; send a longer recording"
            )

    def parts(self, outputs: Mapping[str, torch.Tensor], metadata: Mapping[str, Any]) -> list[Part]:
        """The probabilities of the recording's pieces, in order; empty where an input is judged as a whole."""
        return []

    @abstractmethod
    def __call__(
        self, outputs: Mapping[str, torch.Tensor], metadata: Mapping[str, Any], threshold: float
    ) -> dict[str, Any]:
        """The response's fields, in plain JSON types; times in seconds, probabilities in [0, 1].

        `threshold_used` has to be among them: the threshold that was given, which the smoke test decides by.
        """

    @abstractmethod
    def read(self, body: Mapping[str, Any]) -> tuple[tuple[float, ...], int]:
        """The scores and the number of the chosen class, read back from a response's body that `__call__` made."""

    @staticmethod
    def _of_the_file(metadata: Mapping[str, Any]) -> dict[str, Any]:
        """What is known of the file and means something to whoever sent it: a duration in seconds, a size in pixels."""
        return {name: metadata[name] for name in ("duration_s", "width", "height") if name in metadata}

    def _check_threshold(self) -> None:
        if not 0.0 <= self.threshold <= 1.0:
            raise ValueError(f"threshold is {self.threshold}, expected a number in [0, 1]")

    def _check_two_classes(self) -> None:
        if len(self.classes) != 2 or len(set(self.classes)) != 2:
            raise ValueError(f"classes is {list(self.classes)}, expected a list of two different names")

"""What the post-processing of windows, one answer per window, has in common."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from skewless.core.postprocess.postprocessor import Part


def window_probabilities(outputs: Mapping[str, torch.Tensor]) -> list[float]:
    """The windows' probabilities of the second class, from class_probabilities `(S, 2)`; none where there are no outputs."""
    return outputs["class_probabilities"][:, 1].tolist() if outputs else []


def window_parts(outputs: Mapping[str, torch.Tensor], metadata: Mapping[str, Any]) -> list[Part]:
    """The windows."""
    windows = window_probabilities(outputs)
    return [Part(start, end, p) for (start, end), p in zip(metadata["segment_times_s"], windows, strict=True)]


def described(kind: str, parts: Sequence[Part], threshold: float) -> dict[str, Any]:
    """A response's fields about parts such as "seconds" or "windows": where those above the threshold begin, and all of them."""
    found = [
        {"start_s": p.start_s, "end_s": p.end_s, "confidence": p.probability, "positive": p.probability > threshold}
        for p in parts
    ]
    return {f"positive_{kind}": [each["start_s"] for each in found if each["positive"]], kind: found}


def mean_above(confidences: Sequence[float], threshold: float) -> float:
    """The mean of the confidences strictly above the threshold; 0 where there is none."""
    above = [confidence for confidence in confidences if confidence > threshold]
    return sum(above) / len(above) if above else 0.0

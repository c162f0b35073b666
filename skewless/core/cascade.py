"""Two networks for one archive: a fast one in reduced precision, and the exact one where its decision could be another."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from skewless.core.definition import Definition
from skewless.core.numerics import all_finite
from skewless.core.postprocess import Postprocessor
from skewless.core.runtimes import Runtime

# What an archive with both networks is called, beside the tiers of one network.
DECISION_EXACT = "decision-exact"

_log = logging.getLogger(__name__)


class Given(NamedTuple):
    """One recording's outputs by name, and the runtime whose network gave them."""

    outputs: Mapping[str, torch.Tensor]
    runtime: Runtime


@dataclass(frozen=True)
class Cascade:
    """Runs the fast network on every recording, and the exact one on those that it does not settle.

    A recording is settled when no movement of its scores by at most the margin changes its decision at the threshold that
    counts for it. So its decision is the exact network's wherever the two networks' scores are at most the margin apart.

    margin: proved by calibration when the archive is built; in probability. Raises ValueError for one that is negative or no
        number: beside NaN every score would look settled.
    """

    fast: Runtime
    exact: Runtime
    postprocessor: Postprocessor
    margin: float

    def __post_init__(self):
        if not 0.0 <= self.margin < math.inf:
            raise ValueError(f"the margin is {self.margin}, expected a number of at least 0; build the archive again")

    @classmethod
    def load(
        cls, definition: Definition, exact: Runtime, metrics: Mapping[str, Any], device: torch.device
    ) -> Cascade | None:
        """The cascade of an unpacked archive, None for an archive of one network.

        Raises ValueError for a fast runtime that cannot be loaded, or for which the metrics have no margin.
        """
        fast = definition.load_fast_runtime(device)
        if fast is None:
            return None
        if "fast_runtime" not in metrics:
            raise ValueError(
                "model.yaml names a fast_runtime for which metrics.json has no margin; build the archive with "
                "`skewless build --decision-exact`, or remove the key"
            )
        return cls(fast, exact, definition.postprocessor, metrics["fast_runtime"]["margin"]["value"])

    def __call__(self, inputs: Sequence[torch.Tensor], thresholds: Sequence[float]) -> list[Given]:
        """Recordings, each `(S_i, ...)`, to each one's outputs. thresholds: the one that each is decided by.

        What a recording gets does not depend on the others.
        """
        given = [Given(outputs, self.fast) for outputs in self.fast(inputs)]
        open_ = [k for k, each in enumerate(given) if not self._settled(each.outputs, thresholds[k])]
        for k, outputs in zip(open_, self.exact([inputs[k] for k in open_]), strict=True):
            given[k] = Given(outputs, self.exact)
        return given

    def _settled(self, outputs: Mapping[str, torch.Tensor], threshold: float) -> bool:
        try:
            finite = all(map(all_finite, outputs.values()))
            return finite and self.postprocessor.settled(self.postprocessor.scores(outputs), threshold, self.margin)
        except Exception:
            # A fault of the post-processing: the answer meets it again, by itself and not with the rest of the batch.
            _log.exception("post-processing of the fast network's outputs failed unexpectedly")
            return False


def apart(ours: Sequence[float], theirs: Sequence[float]) -> float:
    """The largest |dp| between two networks' scores of one recording; infinite where one is not a number."""
    differences = [abs(a - b) for a, b in zip(ours, theirs, strict=True)]
    return max(d if d == d else float("inf") for d in differences)

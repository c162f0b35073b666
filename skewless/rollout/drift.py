"""How far two distributions of probabilities are apart: reports, for people and for holding a step.

Unlike skewless.rollout.sequential's, these figures are made for one look at a sample of a fixed size.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.stats import ks_2samp

from skewless.core.telemetry import EDGES

# The customary reading of a population stability index: below the first, nothing; from the second on, another distribution.
# Siddiqi, "Credit Risk Scorecards", 2006, chapter 8.
NOTICEABLE, LARGE = 0.1, 0.25
FEWEST = 10  # in each bin of what live values are compared with


@dataclass(frozen=True)
class Drift:
    """Live probabilities against others.

    between: what is compared, in words. n: how many live ones. psi: the population stability index. ks: the largest distance of
    the two cumulative distributions, and p_value that of the Kolmogorov-Smirnov test; None against a histogram.
    """

    between: str
    n: int
    psi: float
    ks: float | None = None
    p_value: float | None = None

    @property
    def verdict(self) -> str:
        """The index in a word."""
        return "small" if self.psi < NOTICEABLE else "noticeable" if self.psi < LARGE else "large"


def between_samples(between: str, live: Sequence[float], other: Sequence[float]) -> Drift | None:
    """Two samples of live probabilities; None where one of them is too small for an index."""
    if (value := psi(_counts(live, EDGES), _counts(other, EDGES))) is None:
        return None
    test = ks_2samp(live, other)
    return Drift(between, len(live), value, float(test.statistic), float(test.pvalue))


def from_histogram(between: str, live: Sequence[float], histogram: Mapping[str, Any] | None) -> Drift | None:
    """Live probabilities against the histogram of an archive's evaluation; None where it is missing, or too small."""
    if not histogram or (value := psi(_counts(live, histogram["edges"]), np.array(histogram["counts"]))) is None:
        return None
    return Drift(between, len(live), value)


def psi(live: np.ndarray, other: np.ndarray) -> float | None:
    """The population stability index of two histograms `(bins,)` of counts: sum (p - q) log(p / q) over the bins' shares, which is
    the symmetrised Kullback-Leibler divergence, at least 0.

    Neighbouring bins are joined until each has FEWEST of `other`, and None is returned where that leaves one: of equal
    distributions the index is about (bins - 1) (1 / n + 1 / m), for n and m values. Half a count is added to every bin: the
    logarithm of an empty one is infinite.
    """
    starts, left = [0], int(other.sum())
    count = 0
    for place, each in enumerate(other.tolist()):
        if count >= FEWEST and left >= FEWEST:
            starts.append(place)
            count = 0
        count += each
        left -= each
    if len(starts) < 2 or not live.sum():
        return None
    p, q = ((each + 0.5) / (each + 0.5).sum() for each in (np.add.reduceat(counts, starts) for counts in (live, other)))
    return float(((p - q) * np.log(p / q)).sum())


def _counts(scores: Sequence[float], edges: Sequence[float]) -> np.ndarray:
    return np.bincount(np.searchsorted(edges[1:-1], scores), minlength=len(edges) - 1)

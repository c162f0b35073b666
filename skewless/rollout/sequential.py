"""Rates and their differences, with intervals that stay valid however often somebody looks, and whenever they stop.

Every observation is 0 or 1: a request failed, a file was decided positive, an answer was slow. Only counts matter, so an
interval costs the same after a hundred observations and after a million.

Method. For one arm with n observations, s of them 1, the mixture of the likelihood ratios against the rate p,

    M(p) = B(s + 1/2, n - s + 1/2) / B(1/2, 1/2) / (p^s (1 - p)^(n - s)),

is a nonnegative martingale with mean 1 when p is the rate (Robbins 1970, "Statistical methods related to the law of the iterated
logarithm", with a Beta(1/2, 1/2) mixture; Johari et al. 2022, "Always valid inference: continuous monitoring of A/B tests",
call the test mSPRT). By Ville's inequality it ever exceeds 1/alpha with a probability of at most alpha. So the p with
M(p) < 1/alpha are a confidence sequence: all of them hold together, one for each n (Howard et al. 2021, "Time-uniform,
nonparametric, nonasymptotic confidence sequences").

For two arms whose observations are independent, the product M0(p0) M1(p1) is such a martingale, too, in whatever order and
proportion the observations come. The pairs with a product below 1/alpha are a convex set, and the differences p1 - p0 in it
are an interval, narrower than the difference of two intervals of alpha/2 each. Where one file is sent to both arms, the two
answers depend on one another: `paired_difference_interval` takes two intervals of alpha/2, which holds for any dependence.

What has to be true: within an arm, the rate is the same for every observation, whatever came before. Requests of one client
resemble one another; with few clients they are not so many observations.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.special import betaln, xlog1py, xlogy

_HALF = 0.5
_STEPS = 55  # of a bisection: to the last bits of a rate
_GRID, _ROUNDS = 64, 9  # of a search that looks at so many places at once: to the last bits, too


class Interval(NamedTuple):
    """Both ends belong to it."""

    low: float
    high: float


class Count(NamedTuple):
    """n observations, s of them 1."""

    n: int
    s: int

    @property
    def rate(self) -> float:
        """NaN without observations."""
        return self.s / self.n if self.n else math.nan


def log_evidence(n: ArrayLike, s: ArrayLike, p: ArrayLike) -> NDArray[np.float64]:
    """log M(p), elementwise: natural logarithm of the evidence against the rate p."""
    n, s, p = (np.asarray(each, float) for each in (n, s, p))
    return betaln(s + _HALF, n - s + _HALF) - betaln(_HALF, _HALF) - xlogy(s, p) - xlog1py(n - s, -p)


def log_evidence_of_difference(
    n0: ArrayLike, s0: ArrayLike, n1: ArrayLike, s1: ArrayLike, difference: ArrayLike
) -> NDArray[np.float64]:
    """log of the least M0(p0) M1(p1) with p1 - p0 = difference, elementwise: the evidence against the difference, whatever the
    rates are. difference: in (-1, 1)."""
    n0, s0, n1, s1, d = np.broadcast_arrays(*(np.asarray(each, float) for each in (n0, s0, n1, s1, difference)))
    low, high = np.maximum(0.0, -d), np.minimum(1.0, 1.0 - d)

    def falls(p: NDArray[np.float64]) -> NDArray[np.bool_]:
        # The derivative of the log likelihood by p0, which is concave.
        with np.errstate(divide="ignore", invalid="ignore"):
            parts = (_over(s0, p), _over(s1, p + d), -_over(n0 - s0, 1 - p), -_over(n1 - s1, 1 - p - d))
        return sum(parts[1:], parts[0]) < 0

    # The ends are where a rate is 0 or 1; the middle is inside always.
    for _ in range(_STEPS):
        middle = (low + high) / 2
        below = falls(middle)
        low, high = np.where(below, low, middle), np.where(below, middle, high)
    p0 = (low + high) / 2
    # The largest product is where the likelihood is largest; rounding must not take a rate out of [0, 1].
    p1 = np.clip(p0 + d, 0.0, 1.0)
    return log_evidence(n0, s0, p0) + log_evidence(n1, s1, p1)


def rate_interval(count: Count, alpha: float) -> Interval:
    """The confidence sequence of a rate at this count, with a total error of at most alpha over all counts."""
    bound = -math.log(_checked(alpha))
    return _ends(lambda p: log_evidence(*count, p), bound, 0.0, count.rate if count.n else _HALF, 1.0)


def difference_interval(baseline: Count, candidate: Count, alpha: float) -> Interval:
    """The confidence sequence of the candidate's rate minus the baseline's, of independent observations."""
    bound = -math.log(_checked(alpha))
    rates = [count.rate if count.n else _HALF for count in (baseline, candidate)]
    return _ends(
        lambda difference: log_evidence_of_difference(*baseline, *candidate, difference),
        bound,
        -1.0,
        rates[1] - rates[0],
        1.0,
    )


def paired_difference_interval(baseline: Count, candidate: Count, alpha: float) -> Interval:
    """As `difference_interval`, of observations that come in pairs, or depend on one another in any other way."""
    ours, theirs = (rate_interval(count, alpha / 2) for count in (baseline, candidate))
    return Interval(theirs.low - ours.high, theirs.high - ours.low)


def _over(count: NDArray[np.float64], rate: NDArray[np.float64]) -> NDArray[np.float64]:
    # No observation says nothing, even of a rate of 0.
    return np.where(count > 0, count / rate, 0.0)


def _checked(alpha: float) -> float:
    if not 0 < alpha < 1:
        raise ValueError(f"alpha is {alpha}, expected a number between 0 and 1, such as 0.05")
    return alpha


def _ends(
    evidence: Callable[[NDArray[np.float64]], NDArray[np.float64]], bound: float, low: float, middle: float, high: float
) -> Interval:
    """The ends of the convex set, between `low` and `high` and with `middle` in it, where the evidence is below the bound."""
    without, within = np.array([low, high]), np.array([middle, middle])
    fractions = np.arange(1, _GRID + 1) / _GRID
    for _ in range(_ROUNDS):
        grid = without[:, None] + (within - without)[:, None] * fractions
        inside = evidence(grid) < bound
        inside[:, -1] = True
        first = inside.argmax(axis=1)
        ends = np.array([0, 1])
        without = np.where(first > 0, grid[ends, first - 1], without)
        within = grid[ends, first]
    # Outwards, so that rounding never makes the interval too short.
    return Interval(*without.tolist())

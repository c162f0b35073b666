"""Means and differences of rates, with intervals that stay valid however often somebody looks, and whenever they stop.

Method: betting (Waudby-Smith and Ramdas 2024, "Estimating means of bounded random variables by betting", Journal of the Royal
Statistical Society B 86). Whoever holds that values x in [0, 1] have a mean of at most m accepts, before each of them, a bet c on
its being larger. The capital

    K(m) = mean over c of the product over the values of (1 - c + c x / m)

is then a nonnegative supermartingale that starts at 1: by Ville's inequality it ever exceeds 1/alpha with a probability of at most
alpha. The m that no such capital has reached, betting on larger values and, likewise, on smaller ones, with alpha/2 each,
are a confidence sequence: an interval for every number of values, all of them true together with a probability of at least
1 - alpha. The mean over a fixed grid of bets is the paper's diversified Kelly bettor.

What has to be true: before each value, whatever came before, its mean is m. Nothing is asked of how values are distributed, and
what is compared with a tolerance may change, as long as it stays within.

Two arms are compared by differences within short blocks of requests (`differences`), so a rate may change with the time of
day, in both arms alike. Answers of two arms to the same request are such a difference by themselves, however they depend on
one another.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

Floats = NDArray[np.float64]

# The bets: shares of the capital, from small ones for small differences to nearly all.
BETS: Floats = np.array([0.98 * 0.8**number for number in range(24)])
_STEPS = 55  # of a bisection: to the last bits


class Interval(NamedTuple):
    """Both ends belong to it."""

    low: float
    high: float


def differences(candidate: ArrayLike, happened: ArrayLike) -> Floats:
    """The candidate's rate minus the baseline's in each block, in [-1, 1]. A block is as many requests, in their order, as it takes
    to have one of each arm; the last ones, where they are of one arm only, wait for the other.

    candidate: of each request, whether it went there, which must not depend on what happened. happened: whether what is counted
    did.
    """
    arm, happened = np.asarray(candidate, bool), np.asarray(happened, float)
    ends = block_ends(arm)
    if not len(ends):
        return np.empty(0)
    block = np.repeat(np.arange(len(ends)), np.diff(ends, prepend=-1))
    # Requests after the last end would only be a part of a block.
    arm, happened = arm[: len(block)], happened[: len(block)]
    rates = [np.bincount(block, happened * each) / np.bincount(block, each) for each in (~arm, arm)]
    return rates[1] - rates[0]


def block_ends(candidate: ArrayLike) -> NDArray[np.int64]:
    """The place of each block's last request."""
    arm = np.asarray(candidate, bool)
    ends, start = [], 0
    # Where the arm is another than the request's before.
    for end in (np.flatnonzero(arm[1:] != arm[:-1]) + 1).tolist():
        if end > start:
            ends.append(end)
            start = end + 1
    return np.array(ends, np.int64)


def log_capital(values: ArrayLike, mean: float, larger: bool = True) -> Floats:
    """The logarithm of K(mean) after each of the values, in [0, 1]. larger: False for bets on smaller values than `mean`, which
    is in (0, 1)."""
    gains = _gains(np.asarray(values, float), mean, larger)
    return np.logaddexp.reduce(gains.cumsum(axis=1), axis=0) - math.log(len(BETS))


def mean_interval(values: ArrayLike, alpha: float, low: float = 0.0, high: float = 1.0) -> Interval:
    """The confidence sequence of the mean of values in [low, high], after all of them; it has the values' own mean in it.

    alpha: the probability, at most, that the mean is outside at any number of values. Raises ValueError for another alpha than
    one in (0, 1), and for values outside of their range.
    """
    if not 0 < alpha < 1:
        raise ValueError(f"alpha is {alpha}, expected a number between 0 and 1, such as 0.05")
    scaled = (np.asarray(values, float) - low) / (high - low)
    if not len(scaled):
        return Interval(low, high)
    # NaN fails this, too.
    if not (scaled.min() >= 0 and scaled.max() <= 1):
        raise ValueError(f"the values are from {np.min(values)} to {np.max(values)}, expected {low} to {high}")
    # Of the many values few are different, and their order does not matter.
    different, counts = np.unique(scaled, return_counts=True)
    bound = math.log(2 / alpha)
    own = float(scaled.mean())
    ends = [_end(different, counts, bound, own, larger) for larger in (True, False)]
    return Interval(*(low + (high - low) * end for end in ends))


def _gains(values: Floats, mean: float, larger: bool) -> Floats:
    """The logarithm of what each bet makes of the capital `(bets, values)`."""
    share = values / mean if larger else (1 - values) / (1 - mean)
    return np.log1p(BETS[:, None] * (share - 1))


def _end(values: Floats, counts: NDArray[np.int64], bound: float, own: float, larger: bool) -> float:
    """The end of the interval below the values' own mean, or above it."""
    # The capital rises with the distance from the values' own mean, where it is at most 1.
    within, without = own, 0.0 if larger else 1.0
    for _ in range(_STEPS):
        half = (within + without) / 2
        if half in (0.0, 1.0):
            break
        if np.logaddexp.reduce(_gains(values, half, larger) @ counts) - math.log(len(BETS)) < bound:
            within = half
        else:
            without = half
    # Outwards, so that rounding never makes the interval too short.
    return without

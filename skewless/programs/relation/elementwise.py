"""Relations that hold number by number: the same, a scale, an offset, limits, a power or a logarithm."""

from __future__ import annotations

import math

import numpy as np

from skewless.programs.relation.pair import (
    Pair,
    Relation,
    close,
    in_blocks,
    number,
    ratio_numbers,
    sample_first,
    slope_of,
    times_training,
)


def as_same(pair: Pair) -> Relation | None:
    if not close(pair.r, pair.c, pair.tolerance):
        return None
    text = "the service's numbers are training's"
    if pair.largest > 0:
        text += f" within {number(pair.rtol)} of the largest"
    return pair.relation("same", text, {})


def as_constant(pair: Pair) -> Relation | None:
    low, high = pair.low[1], pair.high[1]
    if low != high:
        return None
    if pair.low[0] == pair.high[0]:
        sides = f"training has {number(pair.low[0])}, the service {number(low)}"
        if pair.low[0] == 0:
            return pair.relation("offset", f"{sides}: {number(low)} more", {"offset": low})
        ratio = low / pair.low[0]
        return pair.relation("scale", f"{sides}: {times_training(ratio)}", ratio_numbers(ratio))
    text = f"the service's value is {number(low)} everywhere, whatever training's"
    if low == 0:
        return pair.relation("scale", text, ratio_numbers(0.0))
    return pair.relation("affine", text, {**ratio_numbers(0.0), "offset": low})


def as_scale(pair: Pair) -> Relation | None:
    if not (ratio := slope_of(pair)) or not close(pair.r, pair.c, pair.tolerance_of(ratio), ratio):
        return None
    return pair.relation("scale", f"the service's value is {times_training(ratio)}", ratio_numbers(ratio))


def as_offset(pair: Pair) -> Relation | None:
    offset = pair.means[1] - pair.means[0]
    if not close(pair.r, pair.c, pair.tolerance_of(1), 1, offset):
        return None
    word = "more" if offset > 0 else "less"
    return pair.relation(
        "offset", f"the service's value is {number(abs(offset))} {word} than training's", {"offset": offset}
    )


def as_affine(pair: Pair) -> Relation | None:
    if pair.r.size < 3:  # two numbers lie on a line whatever they are
        return None
    (rr, rc, _), (r, c), n = pair.products, pair.means, pair.r.size
    spread = rr - n * r * r
    if spread <= 1e-12 * rr:
        return None
    ratio = (rc - n * r * c) / spread
    offset = c - ratio * r
    if not ratio or not close(pair.r, pair.c, pair.tolerance_of(ratio), ratio, offset):
        return None
    sign = "plus" if offset > 0 else "minus"
    text = f"the service's value is {number(ratio)} times training's {sign} {number(abs(offset))}"
    return pair.relation("affine", text, {**ratio_numbers(ratio), "offset": offset})


def as_clipped(pair: Pair) -> Relation | None:
    """Both, limited to what both span, are the same: so one side goes further than the other, below or above.

    The ratio of the middle numbers, which no limit touches, finds a scale besides.
    """
    r, c = pair.sample
    loud = np.abs(r) > 0.01 * pair.peak[0]
    median = float(np.median(c[loud] / r[loud])) if loud.any() else 1.0
    for ratio in (1.0, median):
        if not ratio > 0:
            continue
        (low_r, low_c), (high_r, high_c) = pair.low, pair.high
        low, high = max(low_r * ratio, low_c), min(high_r * ratio, high_c)
        tolerance = pair.tolerance_of(ratio) if ratio != 1 else pair.tolerance
        blocks = [(r, c)] + ([] if low >= high else list(in_blocks(pair.r, pair.c)))
        if low >= high or not all(
            np.abs(np.clip(r * ratio, low, high) - np.clip(c, low, high)).max() <= tolerance for r, c in blocks
        ):
            continue
        below = int(((pair.r * ratio < low - tolerance) | (pair.c < low - tolerance)).sum())
        above = int(((pair.r * ratio > high + tolerance) | (pair.c > high + tolerance)).sum())
        if below + above < 2:  # one number is a place, not a limit
            continue
        sides = []
        if below:
            sides.append(
                f"at the bottom, training ends at {number(low_r)} and the service at {number(low_c)} ({below} numbers)"
            )
        if above:
            sides.append(
                f"at the top, training ends at {number(high_r)} and the service at {number(high_c)} ({above} numbers)"
            )
        tighter = {_tighter(low_c - low_r * ratio)} if below else set()
        tighter |= {_tighter(high_r * ratio - high_c)} if above else set()
        who = tighter.pop() if len(tighter) == 1 else "each side at one end"
        times = "" if ratio == 1 else f"the service's value is {times_training(ratio)}, and "
        numbers = {"below": below, "above": above, "low": [low_r, low_c], "high": [high_r, high_c]}
        numbers |= {} if ratio == 1 else ratio_numbers(ratio)
        return pair.relation("clipped", f"{times}clipped by {who}: {'; '.join(sides)}", numbers)
    return None


def _tighter(difference: float) -> str:
    return "the service" if difference > 0 else "training"


def as_function(pair: Pair) -> Relation | None:
    """A power or a logarithm of training's number, such as a power spectrum for an amplitude."""
    if pair.r.size < 8 or pair.low[0] <= 0:
        return None
    tolerance = pair.rtol * pair.peak[1]
    x, y = pair.sample
    log = np.log(x)
    if float(np.ptp(log)) == 0:
        return None
    if pair.low[1] > 0:
        power, constant = np.polyfit(log, np.log(y), 1)
        factor = math.exp(constant)
        if all(np.abs(factor * r**power - c).max() <= tolerance for r, c in sample_first(pair)):
            times = "" if abs(factor - 1) < 1e-4 else f"{number(factor)} times "
            text = f"the service's value is {times}training's to the power of {number(float(power))}"
            return pair.relation("other", text, {"power": float(power), "factor": factor})
    slope, offset = np.polyfit(log, y, 1)
    if all(np.abs(slope * np.log(r) + offset - c).max() <= tolerance for r, c in sample_first(pair)):
        decibels = float(slope) * math.log(10)
        text = f"the service's value is {number(decibels)} times the decadic logarithm of training's"
        if abs(offset) > tolerance:
            text += f" {'plus' if offset > 0 else 'minus'} {number(abs(float(offset)))}"
        return pair.relation("other", text, {"per_decade": decibels, "offset": float(offset)})
    return None

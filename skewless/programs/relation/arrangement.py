"""Relations between places: the order of channels and axes, shifts, margins, edges, a few places, one axis."""

from __future__ import annotations

import itertools
import math
from typing import Any

import numpy as np
from scipy import fft

from skewless.programs.relation.pair import (
    FLOAT32,
    Pair,
    Relation,
    close,
    distances,
    ends,
    joined,
    lines_of,
    number,
    places_in,
    ratio_numbers,
    times_training,
)

SLICES = 256  # the longest axis along which slices are matched by content
SHORTEST = 8  # the shortest axis along which a shift is told, and not a permutation
WINDOW = 1 << 17  # the longest stretch in which a shift is looked for; shifts of up to half of it are found
FEW = 0.05  # share of numbers that are "a few places"


def as_order(pair: Pair) -> Relation | None:
    return _permuted(pair, 1.0, 0.0)


def as_order_scaled(pair: Pair) -> Relation | None:
    """The order of channels or axes, and a scale, or a scale and an offset, which spread and mean tell."""
    if sorted(pair.r.shape) != sorted(pair.c.shape):
        return None
    (rr, _, cc), (r, c), n = pair.products, pair.means, pair.r.size
    if rr <= 0 or cc <= 0:
        return None
    ratio = math.sqrt(cc / rr)
    spread, other = rr / n - r * r, cc / n - c * c
    lines = [(ratio, 0.0)]
    if spread > 1e-12 * rr / n and other > 1e-12 * cc / n and n > 8:
        ratio = math.sqrt(other / spread)
        lines.append((ratio, c - ratio * r))
    return next(filter(None, (_permuted(pair, *line) for line in lines)), None)


def _permuted(pair: Pair, ratio: float, offset: float) -> Relation | None:
    r, c, rank = pair.r, pair.c, pair.r.ndim
    if sorted(r.shape) != sorted(c.shape) or rank > 5 or rank == 0:
        return None
    plain = ratio == 1 and not offset
    tolerance = pair.tolerance if plain else pair.tolerance_of(ratio)
    numbers: dict[str, Any] = {} if plain else {**ratio_numbers(ratio), "offset": offset}
    also = "" if plain else f", and the value is {times_training(ratio)}"
    also += f" {'plus' if offset > 0 else 'minus'} {number(abs(offset))}" if offset and not plain else ""
    views = [
        (axes, r.transpose(axes))
        for axes in itertools.permutations(range(rank))
        if tuple(r.shape[axis] for axis in axes) == c.shape
    ]
    places = places_in(c.shape)
    there = c[places]
    for axes, view in views:
        moved = (
            "" if list(axes) == sorted(axes) else f"its axes are training's axes {joined(pair.axes[a] for a in axes)}"
        )
        for flips in _subsets(range(rank)):
            if not moved and not flips:
                continue
            mirrored = tuple(view.shape[a] - 1 - p if a in flips else p for a, p in enumerate(places))
            if np.abs(view[mirrored] * ratio + offset - there).max() > tolerance:
                continue
            if not close(np.flip(view, flips) if flips else view, c, tolerance, ratio, offset):
                continue
            parts = [moved] if moved else []
            parts += [_reversed(view.shape[axis], pair.axes[axes[axis]], len(axes)) for axis in flips]
            found = {"axes": [pair.axes[a] for a in axes], "mirrored": [pair.axes[axes[a]] for a in flips], **numbers}
            return pair.relation("order", f"the service has the same numbers: {' and '.join(parts)}{also}", found)
        for axis in range(rank):
            order = _matched_slices(view, c, axis, ratio, offset, tolerance)
            if order is None or order == sorted(order):
                continue
            if not close(view.take(order, axis), c, tolerance, ratio, offset):
                continue
            parts = ([moved] if moved else []) + [
                f"permuted along axis {pair.axes[axes[axis]]}: the service has training's {joined(order)}"
            ]
            found = {"axes": [pair.axes[a] for a in axes], "axis": pair.axes[axes[axis]], "order": order, **numbers}
            return pair.relation("order", f"the service has the same numbers: {' and '.join(parts)}{also}", found)
    return None


def _matched_slices(
    view: np.ndarray, c: np.ndarray, axis: int, ratio: float, offset: float, tolerance: float
) -> list[int] | None:
    """Which of the first's slices along the axis each of the second's is, or None where one is none of them."""
    if not 2 <= view.shape[axis] <= SLICES:
        return None
    near = distances(lines_of(view, axis) * ratio + offset, lines_of(c, axis)) <= tolerance
    n = len(near)
    if n >= SHORTEST and any(near[(np.arange(n) + k) % n, np.arange(n)].all() for k in range(1, n)):
        return None  # turned round: a circular shift
    order: list[int] = []
    for j in range(near.shape[1]):
        choices = [int(i) for i in np.flatnonzero(near[:, j]) if i not in order]
        if not choices:
            return None
        order.append(j if j in choices else choices[0])
    return order


def _reversed(length: int, axis: int, rank: int) -> str:
    where = f" along axis {axis}" if rank > 1 else ""
    if length in (3, 4) and rank > 1:
        return f"channels reversed{where}, as RGB against BGR"
    return f"mirrored{where}"


def _subsets(axes: range) -> list[tuple[int, ...]]:
    return [s for k in range(len(axes) + 1) for s in itertools.combinations(axes, k)]


def as_shuffled(pair: Pair) -> Relation | None:
    """The same numbers in some other order, as of a reshape in place of a transpose."""
    if abs(pair.low[0] - pair.low[1]) > pair.tolerance or abs(pair.high[0] - pair.high[1]) > pair.tolerance:
        return None
    if abs(pair.means[0] - pair.means[1]) > pair.tolerance:
        return None
    if not close(np.sort(pair.r, axis=None), np.sort(pair.c, axis=None), pair.tolerance):
        return None
    return pair.relation("order", "the service has the same numbers in another order", {})


def as_shift(pair: Pair) -> Relation | None:
    for axis in sorted(range(pair.r.ndim), key=lambda axis: -pair.shape[axis]):
        if pair.shape[axis] < SHORTEST:
            continue
        for lag in lags(lines_of(pair.r, axis, across=True), lines_of(pair.c, axis, across=True)):
            if lag and (relation := _shifted(pair, axis, lag)):
                return relation
    return None


def _shifted(pair: Pair, axis: int, lag: int) -> Relation | None:
    n = pair.shape[axis]
    r, c = np.moveaxis(pair.r, axis, 0), np.moveaxis(pair.c, axis, 0)
    before, after = (r[: n - lag], c[lag:]) if lag > 0 else (r[-lag:], c[: n + lag])
    filled, left = (c[:lag], r[n - lag :]) if lag > 0 else (c[n + lag :], r[:-lag])
    places = places_in(before.shape)
    x, y = before[places], after[places]
    if float(np.ptp(x)) <= 10 * pair.tolerance:  # silence is like itself at every shift
        return None
    fitted = float(x @ y / (x @ x))
    for ratio in (1.0, fitted):
        tolerance = pair.tolerance if ratio == 1 else pair.tolerance_of(ratio)
        if not ratio or not close(before, after, tolerance, ratio):
            continue
        if close(left, filled, tolerance, ratio):
            filling, how = "circular", "the rest comes in at the other end"
        elif float(np.abs(filled).max()) <= tolerance:
            filling, how = "zeros", "zeros fill the rest"
        elif float(np.ptp(filled)) <= tolerance:
            filling, how = "constant", f"{number(float(filled.flat[0]))} fills the rest"
        elif abs(lag) <= n // 4:
            filling, how = "other", "the rest holds other numbers"
        else:
            continue
        times = "" if ratio == 1 else f", and {times_training(ratio)}"
        word = "later" if lag > 0 else "earlier"
        text = f"the service's numbers come {abs(lag)} positions {word}{pair.along(axis)}{times}; {how}"
        numbers = {"shift": lag, "axis": pair.axes[axis], "filling": filling} | (
            {} if ratio == 1 else ratio_numbers(ratio)
        )
        return pair.relation("shift", text, numbers)
    return None


def lags(a: np.ndarray, b: np.ndarray) -> list[int]:
    """Shifts by which the rows of `a`, (rows, n), are most like those of `b`, (rows, m), the smallest of the best first.

    By the cross-correlation, normalised by the energy of what overlaps, for overlaps of at least half of the shorter.
    Of longer rows, the loudest stretch of `a` of 131072 positions is looked for around its place.
    """
    start = 0
    if a.shape[1] > WINDOW:
        energy = np.square(a - a.mean()).sum(axis=0)[: a.shape[1] // WINDOW * WINDOW].reshape(-1, WINDOW).sum(axis=1)
        start = int(energy.argmax()) * WINDOW
        a = a[:, start : start + WINDOW]
    begin = max(0, start - WINDOW // 2)
    b = b[:, begin : start + a.shape[1] + WINDOW // 2] if b.shape[1] > 2 * WINDOW else b[:, begin:]
    a, b = a - a.mean(), b - b.mean()
    n, m = a.shape[1], b.shape[1]
    if not a.any() or not m:
        return []
    size = fft.next_fast_len(n + m - 1, real=True)
    product = fft.rfft(b, size) * np.conj(fft.rfft(a, size))
    cross = fft.irfft(product.sum(axis=0), size)
    lags = np.arange(-(n - 1), m)
    low, high = np.maximum(0, -lags), np.minimum(n, m - lags)
    total_a, total_b = (np.concatenate([[0.0], np.square(x).sum(axis=0).cumsum()]) for x in (a, b))
    energy = (total_a[high] - total_a[low]) * (total_b[high + lags] - total_b[low + lags])
    usable = (high - low >= min(n, m) / 2) & (energy > 1e-12 * total_a[-1] * total_b[-1])
    likeness = np.where(usable, np.abs(cross[lags]) / np.sqrt(np.where(usable, energy, 1.0)), -1.0)
    best = [int(i) for i in np.argsort(likeness)[::-1][:8] if likeness[i] > 0.5]
    return sorted((int(lags[i]) + begin - start for i in best), key=abs)


def as_padding(pair: Pair) -> Relation | None:
    """A margin in which each side has one number."""
    count = int(pair.differs.sum())
    if not 1 < count < pair.r.size:  # a single number is a place, not a margin
        return None
    ours, theirs = pair.r[pair.differs], pair.c[pair.differs]
    if float(np.ptp(ours)) > pair.tolerance or float(np.ptp(theirs)) > pair.tolerance:
        return None
    margins = [_margin(pair.differs, axis) for axis in range(pair.r.ndim)]
    # A margin: along one axis, every slice outside of the part that is the same differs as a whole.
    for axis, (first, last) in enumerate(margins):
        if 0 < first + last < pair.shape[axis] and count == (first + last) * (pair.r.size // pair.shape[axis]):
            where = ends(first, last) + pair.along(axis)
            text = f"another padding at {where}: training has {number(float(ours[0]))}, the service {number(float(theirs[0]))}"
            numbers = {"training": float(ours[0]), "service": float(theirs[0]), "count": count}
            return pair.relation("padding", text, numbers | {"axis": pair.axes[axis], "first": first, "last": last})
    inside = [slice(f, n - b) for (f, b), n in zip(_box_margins(pair.differs), pair.shape, strict=True)]
    if math.prod(s.stop - s.start for s in inside) + count != pair.r.size:
        return None
    text = f"another padding around: training has {number(float(ours[0]))}, the service {number(float(theirs[0]))}"
    return pair.relation(
        "padding",
        text,
        {
            "training": float(ours[0]),
            "service": float(theirs[0]),
            "count": count,
            "inside": [[s.start, s.stop] for s in inside],
        },
    )


def _margin(differs: np.ndarray, axis: int) -> tuple[int, int]:
    """How many slices at the start and at the end differ somewhere, without a gap."""
    line = np.asarray(np.moveaxis(differs, axis, 0).reshape(differs.shape[axis], -1).any(axis=1))
    if line.all():
        return line.size, 0
    return int((~line).argmax()), int((~line[::-1]).argmax())


def _box_margins(differs: np.ndarray) -> list[tuple[int, int]]:
    """Along each axis the numbers of slices at both ends that differ as a whole."""
    margins = []
    for axis in range(differs.ndim):
        line = np.asarray(np.moveaxis(differs, axis, 0).reshape(differs.shape[axis], -1).all(axis=1))
        margins.append((int((~line).argmax()), int((~line[::-1]).argmax())))
    return margins


def as_edges(pair: Pair) -> Relation | None:
    for axis in range(pair.r.ndim):
        n = pair.shape[axis]
        line = pair.differs.any(axis=tuple(a for a in range(pair.r.ndim) if a != axis))
        first, last = _margin(pair.differs, axis)
        if not 0 < first + last <= n / 2 or int(line.sum()) != first + last or n < 4:
            continue
        text = f"equal but for {ends(first, last)}{pair.along(axis)}, of {n}{_constants(pair)}"
        return pair.relation("edges", text, {"axis": pair.axes[axis], "first": first, "last": last, "of": n})
    return None


def as_some(pair: Pair) -> Relation | None:
    count = int(pair.differs.sum())
    if count > max(1, FEW * pair.r.size) or count == pair.r.size:
        return None
    where = np.argwhere(pair.differs)
    low, high = where.min(axis=0).tolist(), where.max(axis=0).tolist()
    places = where[:5].tolist()
    listed = joined((p[0] if len(p) == 1 else p) for p in places) + (" ..." if count > 5 else "")
    text = f"equal but at {count} of {pair.r.size} numbers: at {listed}{_constants(pair)}"
    return pair.relation("some", text, {"count": count, "of": pair.r.size, "places": places, "from": low, "to": high})


def _constants(pair: Pair) -> str:
    texts = []
    for side, array in (("training", pair.r), ("the service", pair.c)):
        held = array[pair.differs]
        if held.size > 1 and float(np.ptp(held)) == 0:
            texts.append(f"{side} has {number(float(held[0]))} there")
    return "".join(f"; {text}" for text in texts)


def as_per_channel(pair: Pair) -> Relation | None:
    for axis in sorted(range(pair.r.ndim), key=lambda axis: pair.shape[axis]):
        n = pair.shape[axis]
        if not 2 <= n <= 1 << 14 or pair.r.size // n < 8:
            continue
        x, y = lines_of(pair.r, axis), lines_of(pair.c, axis)
        for form, named in (("scale", "scale"), ("offset", "offset"), ("affine", "scale and offset")):
            ratios, offsets = _lines_fit(x, y, form)
            if (np.abs(x * ratios + offsets - y) > pair.tolerance * np.abs(ratios) + 4 * FLOAT32 * pair.peak[1]).any():
                continue
            r, c = (np.moveaxis(a, axis, 0).reshape(n, -1) for a in (pair.r, pair.c))
            ratios, offsets = _lines_fit(r, c, form)
            tolerances = pair.tolerance * np.abs(ratios) + 4 * FLOAT32 * pair.peak[1]
            if not all((np.abs(r[i] * ratios[i] + offsets[i] - c[i]) <= tolerances[i]).all() for i in range(n)):
                continue
            changed = int(((np.abs(ratios - 1) > pair.rtol) | (np.abs(offsets) > pair.tolerance)).sum())
            if n > 8 and changed < n / 2:  # then it is those few slices that differ, whatever they hold
                continue
            numbers: dict[str, Any] = {"axis": pair.axes[axis], "changed": changed, "of": n}
            told = []
            for key, word, values in (("ratios", "ratios", ratios), ("offsets", "offsets", offsets)):
                if (key == "ratios" and form == "offset") or (key == "offsets" and form == "scale"):
                    continue
                numbers[key] = [float(v) for v in values[:, 0]]
                told.append(
                    f"{word} {joined(number(v) for v in numbers[key])}"
                    if n <= 8
                    else f"{word} from {number(min(numbers[key]))} to {number(max(numbers[key]))}"
                )
            text = f"another {named} for each of {n} along axis {pair.axes[axis]}: {', '.join(told)}"
            return pair.relation("per_channel", text, numbers)
    return None


def as_reversed_per_channel(pair: Pair) -> Relation | None:
    """Three channels reversed, and each with another scale or offset: RGB against BGR less its means."""
    for axis in range(pair.r.ndim):
        if pair.shape[axis] != 3 or pair.r.ndim == 1:
            continue
        found = as_per_channel(Pair(np.flip(pair.r, axis), pair.c, pair.rtol, pair.axes))
        if found is not None and found.numbers["axis"] == pair.axes[axis]:
            text = f"{_reversed(3, pair.axes[axis], pair.r.ndim)}, and {found.text}, in the service's order"
            return pair.relation("per_channel", text, {**found.numbers, "mirrored": [pair.axes[axis]]})
    return None


def _lines_fit(x: np.ndarray, y: np.ndarray, form: str) -> tuple[np.ndarray, np.ndarray]:
    """Least squares of y on x, row by row: ratios and offsets, each (rows, 1). A row without spread gets the ratio 1."""
    mean_x, mean_y = (v.mean(axis=1, keepdims=True) for v in (x, y))
    ones = np.ones_like(mean_x)
    if form == "offset":
        return ones, mean_y - mean_x
    squares, products = (np.einsum("ij,ij->i", x, v)[:, None] for v in (x, y))
    if form == "scale":
        return np.divide(products, squares, out=ones, where=squares > 0), np.zeros_like(mean_x)
    n = x.shape[1]
    spread = squares - n * mean_x**2
    ratios = np.divide(products - n * mean_x * mean_y, spread, out=ones, where=spread > 1e-12 * squares)
    return ratios, mean_y - ratios * mean_x

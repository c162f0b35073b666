"""Two arrays of different shapes: another number of rows, a margin, a part cut out, another resolution."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import Any

import numpy as np
from scipy import ndimage

from skewless.programs.relation import same_shape
from skewless.programs.relation.arrangement import SLICES, as_order, as_order_scaled, lags
from skewless.programs.relation.pair import (
    BLOCK,
    Pair,
    Relation,
    close,
    distances,
    ends,
    joined,
    lines_of,
    number,
    places_in,
)


def as_reshaped(pair: Pair) -> Relation | None:
    if pair.r.size != pair.c.size or not close(pair.r.ravel(), pair.c.ravel(), pair.tolerance):
        return None
    ours, theirs = _shape(pair.r), _shape(pair.c)
    text = f"the service has the same numbers, one after the other, in the shape {theirs}; training has {ours}"
    numbers = {"training": list(pair.r.shape), "service": list(pair.c.shape)}
    return pair.relation("order", text, numbers, (pair.r.ravel(), pair.c.ravel()))


def as_repeated(pair: Pair) -> Relation | None:
    axes = _longer_axes(pair)
    if axes is None or len(axes) > 1 or 1 not in (n_r := pair.r.shape[axes[0]], n_c := pair.c.shape[axes[0]]):
        return None
    longer, shorter = ("the service", "training") if n_r == 1 else ("training", "the service")
    r, c = np.broadcast_arrays(pair.r, pair.c)
    if not close(r, c, pair.tolerance):
        return None
    text = f"{_sizes(pair, axes)}; each of {longer}'s is {shorter}'s one"
    numbers = {"axis": pair.axes[axes[0]], "training": n_r, "service": n_c, "where": "repeated", "equal": 1}
    return pair.relation("rows", text, numbers, (r, c))


def as_part(pair: Pair) -> Relation | None:
    """One side is a part of the other: with a margin of a constant, or cut out."""
    axes = _longer_axes(pair)
    if axes is None:
        return None
    less, more = (pair.r, pair.c) if pair.c.shape[axes[0]] > pair.r.shape[axes[0]] else (pair.c, pair.r)
    choices = []
    for axis in axes:
        extra = more.shape[axis] - less.shape[axis]
        starts = [0, extra, extra // 2, extra - extra // 2]
        if len(axes) == 1 and less.shape[axis] >= 8:
            starts += [s for s in lags(lines_of(less, axis, across=True), lines_of(more, axis, across=True)) if s > 0]
        choices.append([s for s in dict.fromkeys(starts) if s <= extra])
    for starts_ in itertools.product(*choices):
        box = [slice(0, n) for n in less.shape]
        for axis, start in zip(axes, starts_, strict=True):
            box[axis] = slice(start, start + less.shape[axis])
        inside = more[tuple(box)]
        if not close(less, inside, pair.tolerance):
            continue
        parts = (less, inside) if less is pair.r else (inside, less)
        outside = np.ones(more.shape, dtype=bool)
        outside[tuple(box)] = False
        extra_numbers = more[outside]
        longer, shorter = ("the service", "training") if more is pair.c else ("training", "the service")
        numbers: dict[str, Any] = {
            "axis": [pair.axes[a] for a in axes] if len(axes) > 1 else pair.axes[axes[0]],
            "training": [pair.r.shape[a] for a in axes] if len(axes) > 1 else pair.r.shape[axes[0]],
            "service": [pair.c.shape[a] for a in axes] if len(axes) > 1 else pair.c.shape[axes[0]],
            "start": list(starts_) if len(axes) > 1 else starts_[0],
        }
        sizes = _sizes(pair, axes)
        if float(np.ptp(extra_numbers)) <= pair.tolerance:
            constant = float(extra_numbers[0])
            numbers |= {"constant": constant, "side": longer}
            text = f"{longer} has {shorter}'s numbers with a margin of {number(constant)}: {sizes}"
            return pair.relation("padding", text, numbers, parts)
        numbers["equal"] = less.shape[axes[0]]
        if len(axes) > 1:
            text = f"{shorter} has a part of {longer}'s numbers, cut out from {joined(starts_)} on: {sizes}"
            return pair.relation("rows", text, numbers, parts)
        n, start = less.shape[axes[0]], starts_[0]
        last = start + n == more.shape[axes[0]]
        where = ends(n, 0) if not start else ends(0, n) if last else f"{longer}'s {start} to {start + n - 1}"
        numbers["where"] = "start" if not start else "end" if last else "middle"
        return pair.relation("rows", f"{sizes}; {where} {_are(n)} the same", numbers, parts)
    return None


def as_rows(pair: Pair) -> Relation | None:
    """Another number along one axis, with only some of them equal, or equal but for a relation that is told."""
    axes = _longer_axes(pair)
    if axes is None or len(axes) > 1:
        return None
    axis = axes[0]
    n_r, n_c = pair.r.shape[axis], pair.c.shape[axis]
    r, c = np.moveaxis(pair.r, axis, 0), np.moveaxis(pair.c, axis, 0)
    shared = min(n_r, n_c)
    sizes = _sizes(pair, axes)
    numbers: dict[str, Any] = {"axis": pair.axes[axis], "training": n_r, "service": n_c}
    less, more = (r, c) if n_r < n_c else (c, r)
    longer, shorter = ("the service", "training") if less is r else ("training", "the service")
    for every in {len(more) // shared, -(-len(more) // shared)} - {1} if shared > 1 else set():
        for start in range(min(every, 64)):
            picked = more[start::every][:shared]
            if len(picked) >= max(2, shared - 1) and close(less[: len(picked)], picked, pair.tolerance):
                text = f"{sizes}; {shorter} has every {_ordinal(every)} of {longer}'s, from {start} on"
                found = {"where": "interleaved", "every": every, "start": start, "equal": len(picked)}
                kept = less[: len(picked)]
                return pair.relation("rows", text, numbers | found, (kept, picked) if less is r else (picked, kept))
    for where, x, y in (("start", r[:shared], c[:shared]), ("end", r[::-1][:shared], c[::-1][:shared])):
        equal = _leading(x, y, pair.tolerance)
        if equal >= shared / 2 and float(np.ptp(x[:equal])) > pair.tolerance:
            text = f"{sizes}; {ends(equal, 0) if where == 'start' else ends(0, equal)} {_are(equal)} the same"
            return pair.relation("rows", text, {**numbers, "where": where, "equal": equal}, (x[:equal], y[:equal]))
    if len(more) <= SLICES and less[0].size >= 8 and shared > 1:
        near = distances(lines_of(r, 0), lines_of(c, 0)) <= pair.tolerance
        pairs = [(int(near[:, j].argmax()), j) for j in range(n_c) if near[:, j].any()]
        if len(pairs) >= max(2, shared / 2) and all(
            close(r[i], c[j], pair.tolerance) and float(np.ptp(r[i])) > pair.tolerance for i, j in pairs
        ):
            listed = ", ".join(f"{j} is training's {i}" for i, j in pairs[:4]) + (" ..." if len(pairs) > 4 else "")
            text = f"{sizes}; {len(pairs)} of the service's are among training's: {listed}"
            found = {"where": "matched", "equal": len(pairs), "pairs": [list(p) for p in pairs]}
            chosen = (r[[i for i, _ in pairs]], c[[j for _, j in pairs]])
            return pair.relation("rows", text, numbers | found, chosen)
    if shared < 2:
        return None
    ours, theirs = (np.ascontiguousarray(np.moveaxis(a[:shared], 0, axis)) for a in (r, c))
    inner = same_shape.explain(Pair(ours, theirs, pair.rtol, pair.axes))
    if inner.kind == "other":
        return None
    text = f"{sizes}; over the first {shared}: {inner.text}"
    found = {"where": "start", "shared": {"kind": inner.kind, **inner.numbers}}
    return pair.relation("rows", text, numbers | found, (r[:shared], c[:shared]))


def _leading(x: np.ndarray, y: np.ndarray, tolerance: float) -> int:
    """How many slices are the same before the first that is not."""
    step = max(1, BLOCK // max(1, x[0].size))
    for start in range(0, len(x), step):
        different = np.abs(x[start : start + step] - y[start : start + step]) > tolerance
        if different.any():
            return start + int(different.reshape(len(different), -1).any(axis=1).argmax())
    return len(x)


def as_resolution(pair: Pair) -> Relation:
    """Other sizes: the coarser one is interpolated linearly at places of the finer one, and correlated with it there.

    Pixels lie in the middle of their squares or, as samples do, at their starts: the better of both counts.
    """
    axes = [axis for axis in range(pair.r.ndim) if pair.r.shape[axis] != pair.c.shape[axis]]
    ratios = [pair.c.shape[axis] / pair.r.shape[axis] for axis in axes]
    fine, coarse = (pair.r, pair.c) if pair.r.size > pair.c.size else (pair.c, pair.r)
    places = places_in(fine.shape, 1 << 14)
    scale = np.array([b / a for a, b in zip(fine.shape, coarse.shape, strict=True)])[:, None]
    there = np.array(places, dtype=np.float64)
    correlations = [
        _correlation(fine[places], ndimage.map_coordinates(coarse, grid, order=1, mode="nearest"))
        for grid in ((there + 0.5) * scale - 0.5, there * scale)
    ]
    correlation = max(correlations)
    sizes = _sizes(pair, axes)
    numbers = {
        "training": list(pair.r.shape),
        "service": list(pair.c.shape),
        "ratios": ratios,
        "correlation": correlation,
    }
    ratio = joined(f"{v:.6g}" for v in ratios)
    if correlation > 0.8:
        word = "resampled" if len(axes) == 1 else "resized"
        text = f"{word}, by {ratio}: {sizes}; the correlation after resizing is {correlation:.4f}"
    else:
        text = f"{sizes}, a ratio of {ratio}; resized, the numbers are not alike (correlation {correlation:.4f})"
    return pair.relation("resolution", text, numbers)


def _longer_axes(pair: Pair) -> list[int] | None:
    """The axes along which the sizes differ, if the same side is the longer one along all of them."""
    axes = [axis for axis in range(pair.r.ndim) if pair.r.shape[axis] != pair.c.shape[axis]]
    return axes if len({pair.r.shape[axis] > pair.c.shape[axis] for axis in axes}) == 1 else None


def _sizes(pair: Pair, axes: list[int]) -> str:
    if len(axes) > 1:
        return f"training has {_shape(pair.r)}, the service {_shape(pair.c)}"
    return f"training has {pair.r.shape[axes[0]]}, the service {pair.c.shape[axes[0]]}{pair.along(axes[0])}"


def _correlation(x: np.ndarray, y: np.ndarray) -> float:
    x, y = x - x.mean(), y - y.mean()
    spread = math.sqrt(float(x @ x) * float(y @ y))
    return float(x @ y) / spread if spread else 0.0


def _are(n: int) -> str:
    return "is" if n == 1 else "are"


def _ordinal(n: int) -> str:
    return {2: "second", 3: "third"}.get(n, f"{n}th")


def _shape(array: np.ndarray) -> str:
    return " x ".join(str(n) for n in array.shape)


ATTEMPTS: tuple[Callable[[Pair], Relation | None], ...] = (
    as_order,
    as_order_scaled,
    as_reshaped,
    as_repeated,
    as_part,
    as_rows,
    as_resolution,
)


def explain(pair: Pair) -> Relation:
    """The first relation that holds; `resolution` always does."""
    return next(filter(None, (attempt(pair) for attempt in ATTEMPTS)))

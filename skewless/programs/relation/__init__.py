"""In which way one array differs from another: the same but for a scale, a shift, the order of channels, a filter...

A subsample is only ever used to refute a relation. Before one is accepted, it is checked on every number, except for
filters and for resized arrays, which are measured and not exact; what they explain is then stated.
"""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np

from skewless.errors import UsageError
from skewless.programs.relation import other_shape, same_shape
from skewless.programs.relation.pair import KINDS, Kind, Pair, Relation

__all__ = ["KINDS", "Kind", "Relation", "describe"]


def describe(reference: np.ndarray, candidate: np.ndarray, *, rtol: float = 1e-5) -> Relation:
    """Say in which way the service's array, `candidate`, differs from training's, `reference`.

    Both are arrays of any rank, of integers, floating-point or complex numbers, or flags; a complex array is compared as
    one with a last axis of 2, real and imaginary part. Numbers are compared as float64.
    rtol: what a relation may leave unexplained, relative to the largest absolute number of training.

    The relations are tried from the most specific one on, and the first that holds is told. Shifts are looked for up to
    65536 positions or half of the axis, permuted slices along axes of up to 256.
    Raises UsageError for an array that holds no numbers, or none at all, and for an rtol outside [0, 1).
    """
    if not 0 <= rtol < 1:
        raise UsageError(f"rtol is {rtol}, expected a number of at least 0 and below 1")
    r, c = _numeric(reference, "training"), _numeric(candidate, "the service")
    if np.iscomplexobj(r) or np.iscomplexobj(c):
        r, c = (np.stack([x.real, x.imag], axis=-1) for x in (r, c))
    r, c, axes = _side_by_side(r, c)
    r, c = (np.ascontiguousarray(x, dtype=np.float64).reshape(x.shape) for x in (r, c))
    finite_r, finite_c = np.isfinite(r), np.isfinite(c)
    common = 0
    if not (finite_r.all() and finite_c.all()):
        if r.shape != c.shape or not np.array_equal(r[~finite_r], c[~finite_r], equal_nan=True):
            return _not_finite(r, c, finite_r, finite_c)
        if not finite_r.any():
            return Relation("same", f"none of the {r.size} numbers is finite, and they are the same", {})
        if not finite_c[finite_r].all():
            return _not_finite(r, c, finite_r, finite_c)
        # The same places hold the same NaN or infinity. A number that stands elsewhere on both sides in their place keeps
        # every relation that holds number by number.
        common = int((~finite_r).sum())
        place = np.unravel_index(int(finite_r.argmax()), r.shape)
        r, c = (np.where(finite_r, x, x[place]) for x in (r, c))
    relation = (same_shape if r.shape == c.shape else other_shape).explain(Pair(r, c, rtol, axes))
    if not common:
        return relation
    text = f"{relation.text}; {common} numbers are not finite, the same ones on both sides"
    return Relation(
        relation.kind, text, {**relation.numbers, "not_finite": common}, relation.largest, relation.relative
    )


def _not_finite(r: np.ndarray, c: np.ndarray, finite_r: np.ndarray, finite_c: np.ndarray) -> Relation:
    told: list[str] = []
    numbers: dict[str, Any] = {}
    for side, key, array, finite in (("training", "training", r, finite_r), ("the service", "service", c, finite_c)):
        count = int((~finite).sum())
        numbers[key] = count
        if count:
            place = [int(i) for i in np.unravel_index(int((~finite).argmax()), finite.shape)]
            numbers[f"{key}_first"] = place
            nan = int(np.isnan(array).sum())
            numbers[f"{key}_nan"] = nan
            told.append(f"{side} has {nan} NaN and {count - nan} infinite of {array.size}, the first at {place}")
        else:
            told.append(f"{side} has none")
    largest = relative = None
    if r.shape == c.shape and (both := finite_r & finite_c).any():
        largest, peak = float(np.abs(c[both] - r[both]).max()), float(np.abs(r[finite_r]).max())
        relative = largest / peak if peak else None
    return Relation("not_finite", f"numbers that are not finite: {'; '.join(told)}", numbers, largest, relative)


def _numeric(array: np.ndarray, side: str) -> np.ndarray:
    array = np.asarray(array)
    if array.dtype.kind not in "biufc":
        raise UsageError(f"{side} has an array of {array.dtype}, expected numbers: compare an array of numbers instead")
    if not array.size:
        raise UsageError(f"{side} has an empty array of shape {array.shape}, expected at least one number")
    return array


def _side_by_side(r: np.ndarray, c: np.ndarray) -> tuple[np.ndarray, np.ndarray, tuple[int, ...]]:
    """Both with one rank: without axes of length 1 where that is enough, else with such axes where most sizes agree."""
    wide = tuple(axis for axis, n in enumerate(r.shape) if n > 1)
    if r.size == c.size == 1:
        return r.reshape(1), c.reshape(1), (0,)
    if sorted(r.squeeze().shape) == sorted(c.squeeze().shape):
        return r.squeeze(), c.squeeze(), wide
    if r.ndim != c.ndim:
        less, rank = min(r, c, key=np.ndim), max(r.ndim, c.ndim)
        more = c if less is r else r
        kept = max(
            itertools.combinations(range(rank), less.ndim),
            key=lambda kept: sum(
                (less.shape[kept.index(axis)] if axis in kept else 1) == more.shape[axis] for axis in range(rank)
            ),
        )
        less = less.reshape([less.shape[kept.index(axis)] if axis in kept else 1 for axis in range(rank)])
        r, c = (less, more) if more is c else (more, less)
    axes = tuple(axis for axis in range(r.ndim) if max(r.shape[axis], c.shape[axis]) > 1)
    return (
        r.reshape([r.shape[axis] for axis in axes]),
        c.reshape([c.shape[axis] for axis in axes]),
        axes,
    )

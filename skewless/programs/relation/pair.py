"""What every relation is written with: the two arrays side by side, the relation that is told, and words for numbers."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal, get_args

import numpy as np

Kind = Literal[
    "same",
    "type",
    "order",
    "scale",
    "offset",
    "affine",
    "shift",
    "clipped",
    "edges",
    "some",
    "rows",
    "padding",
    "per_channel",
    "resolution",
    "filter",
    "noise",
    "other",
    "not_finite",
]
KINDS: tuple[str, ...] = get_args(Kind)

FLOAT32 = float(np.finfo(np.float32).eps)
POINTS = 1024  # places at which a relation is refuted before it is checked everywhere
BLOCK = 1 << 18  # numbers compared at once


@dataclass(frozen=True)
class Relation:
    """How the service's array differs from training's.

    kind: one of KINDS. text: one sentence. numbers: what the sentence says, ready for JSON; axes are counted from 0 in
    the shape of the array that has more of them, training's where both have as many.
    largest: the largest absolute difference over the part that both have, None where no part can be put side by side.
    relative: `largest` divided by training's largest absolute number, None where that is 0 or `largest` is None.
    """

    kind: Kind
    text: str
    numbers: dict[str, Any] = field(default_factory=dict)
    largest: float | None = None
    relative: float | None = None


@dataclass(frozen=True)
class Pair:
    """Training's array `r` and the service's `c`: float64, of one rank. axes: how each axis is called."""

    r: np.ndarray
    c: np.ndarray
    rtol: float
    axes: tuple[int, ...]

    @property
    def shape(self) -> tuple[int, ...]:
        return self.r.shape

    @cached_property
    def low(self) -> tuple[float, float]:
        return float(self.r.min()), float(self.c.min())

    @cached_property
    def high(self) -> tuple[float, float]:
        return float(self.r.max()), float(self.c.max())

    @cached_property
    def peak(self) -> tuple[float, float]:
        """The largest absolute number of each."""
        return max(-self.low[0], self.high[0]), max(-self.low[1], self.high[1])

    @cached_property
    def tolerance(self) -> float:
        return self.rtol * self.peak[0]

    def tolerance_of(self, ratio: float) -> float:
        """What may be unexplained after scaling: rtol in training's unit, and the rounding of float32 in the service's."""
        return self.tolerance * abs(ratio) + 4 * FLOAT32 * self.peak[1]

    @cached_property
    def means(self) -> tuple[float, float]:
        return float(self.r.mean()), float(self.c.mean())

    @cached_property
    def products(self) -> tuple[float, float, float]:
        """Sums of r², r c and c²."""
        r, c = self.r.ravel(), self.c.ravel()
        return float(r @ r), float(r @ c), float(c @ c)

    @cached_property
    def largest(self) -> float:
        return max(float(np.abs(c - r).max()) for r, c in in_blocks(self.r, self.c))

    @cached_property
    def differs(self) -> np.ndarray:
        """Where the two differ by more than the tolerance, in the arrays' shape."""
        return np.abs(self.c - self.r) > self.tolerance

    @cached_property
    def sample(self) -> tuple[np.ndarray, np.ndarray]:
        places = places_in(self.shape)
        return self.r[places], self.c[places]

    def along(self, axis: int) -> str:
        return f" along axis {self.axes[axis]}" if len(self.axes) > 1 else ""

    def relation(
        self, kind: Kind, text: str, numbers: dict[str, Any], parts: tuple[np.ndarray, np.ndarray] | None = None
    ) -> Relation:
        """A relation, with the largest difference of `parts`, or of the whole where both have one shape."""
        largest: float | None = None
        if parts is not None:
            largest = max(float(np.abs(c - r).max()) for r, c in in_blocks(*parts))
        elif self.r.shape == self.c.shape:
            largest = self.largest
        relative = None if largest is None or self.peak[0] == 0 else largest / self.peak[0]
        return Relation(kind, text, numbers, largest, relative)


def close(a: np.ndarray, b: np.ndarray, tolerance: float, ratio: float = 1.0, offset: float = 0.0) -> bool:
    """Whether every |a ratio + offset - b| is within the tolerance."""
    if not a.size:
        return True
    places = places_in(a.shape)
    if np.abs(a[places] * ratio + offset - b[places]).max() > tolerance:
        return False
    return all(np.abs(x * ratio + offset - y).max() <= tolerance for x, y in in_blocks(a, b))


def in_blocks(a: np.ndarray, b: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """The same parts of two arrays of one shape, one after the other, of some 262144 numbers each."""
    if not a.ndim:
        yield a, b
        return
    if a.flags.c_contiguous and b.flags.c_contiguous:
        a, b = a.reshape(-1), b.reshape(-1)
    step = max(1, BLOCK * len(a) // max(1, a.size))
    for start in range(0, len(a), step):
        yield a[start : start + step], b[start : start + step]


def sample_first(pair: Pair) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    yield pair.sample
    yield from in_blocks(pair.r, pair.c)


def places_in(shape: tuple[int, ...], count: int = POINTS) -> tuple[np.ndarray, ...]:
    """Indices of random places, the same ones for the same shape."""
    size = math.prod(shape)
    flat = np.arange(size) if size <= count else np.random.default_rng(0).integers(size, size=count)
    return tuple(np.unravel_index(flat, shape))


def lines_of(array: np.ndarray, axis: int, *, across: bool = False) -> np.ndarray:
    """Rows: for each position along the axis, its numbers at up to 64 random places of the other axes.

    across: instead, each row runs along the axis, at up to 32 places. The places depend on the other axes alone.
    """
    front = np.moveaxis(array, axis, -1 if across else 0)
    rest = front.shape[:-1] if across else front.shape[1:]
    if not rest:
        return front.reshape(1, -1) if across else front.reshape(-1, 1)
    if across:
        return front[places_in(rest, 32)]
    index: tuple[Any, ...] = (slice(None), *places_in(rest, 64))
    return front[index]


def distances(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """The largest differences between each row of the first and each of the second."""
    return np.stack([np.abs(b - row).max(axis=1) for row in a])


def slope_of(pair: Pair) -> float:
    rr, rc, _ = pair.products
    return rc / rr if rr else 0.0


def number(value: float) -> str:
    value += 0.0  # no minus before zero
    if not 1e4 <= abs(value) < 1e9:
        return f"{value:.4g}"
    return f"{value:.0f}" if value == round(value) else f"{value:.1f}"


def times_training(ratio: float) -> str:
    """The ratio in words, with its decibels; with more digits where it is close to 1."""
    text = f"{f'{ratio:.6g}' if 0 < abs(ratio - 1) < 0.01 else number(ratio)} times training's"
    if not ratio:
        return text
    db = 20 * math.log10(abs(ratio))
    digits = f"{db:+.2f}" if abs(db) >= 0.1 or not db else f"{db:+.2g}"
    return f"{text} ({digits} dB{', its sign turned' if ratio < 0 else ''})"


def ratio_numbers(ratio: float) -> dict[str, Any]:
    return {"ratio": ratio, "db": 20 * math.log10(abs(ratio)) if ratio else None}


def joined(values: Any) -> str:
    listed = [str(value) for value in values]
    return ", ".join(listed if len(listed) <= 12 else [*listed[:10], "...", listed[-1]])


def ends(first: int, last: int) -> str:
    counts = (("first", first), ("last", last))
    return " and ".join(f"the {word}" if n == 1 else f"the {word} {n}" for word, n in counts if n)

"""Relations that are measured and not exact: a filter, noise, and what is left."""

from __future__ import annotations

import itertools
import math
from typing import Any

import numpy as np
from scipy import signal

from skewless.programs.relation.pair import Pair, Relation, in_blocks, number

EXPLAINED = 0.9  # share of the difference's power that a filter has to explain
EQUAL_DB = 0.5  # levels closer than this are called equal


def as_filter(pair: Pair) -> Relation | None:
    """A linear time-invariant relation between signals, by Welch's method.

    A filter from x to y leaves the power sum(Pyy - |Pxy|² / Pxx) unexplained, told relative to that of y - x
    (Bendat and Piersol, Random Data, chapter 6). At most about a million numbers are used, a stretch out of the middle.
    """
    if not 1 <= pair.r.ndim <= 2:
        return None
    axis = int(np.argmax(pair.shape))
    n, rows = pair.shape[axis], pair.r.size // pair.shape[axis]
    if n < 1024 or rows > 16:
        return None
    length = min(n, (1 << 20) // rows)
    start = (n - length) // 2
    x, y = (np.moveaxis(a, axis, -1).reshape(rows, n)[:, start : start + length] for a in (pair.r, pair.c))
    segment = min(8192, 1 << int(math.log2(length / 8)))
    x0, y0 = x - x.mean(), y - y.mean()  # a constant part would be explained by any filter
    frequencies, cross = signal.csd(x0, y0, nperseg=segment, detrend=False)
    ours, theirs = (signal.welch(v, nperseg=segment, detrend=False)[1].mean(axis=0) for v in (x0, y0))
    cross = cross.mean(axis=0)
    difference = float((ours + theirs - 2 * cross.real).sum())
    if min(difference, float(ours.sum()), float(theirs.sum())) <= 0:
        return None
    tiny = 1e-12 * float(ours.sum() + theirs.sum())
    # From either side to the other: what one side took away cannot be made of what it left. A filter has to explain the
    # difference and the signal: the difference between a loud signal and a quiet one alone is the loud one.
    common = np.abs(cross) ** 2
    explained = max(
        1 - float((b - common / (a + tiny)).sum()) / min(difference, float(b.sum()))
        for a, b in ((ours, theirs), (theirs, ours))
    )
    if explained < EXPLAINED:
        return None
    ours, theirs = (signal.welch(v, nperseg=segment, detrend=False)[1].mean(axis=0) for v in (x, y))
    bands = _bands(frequencies, ours, theirs, segment)
    runs = [(label, list(run)) for label, run in itertools.groupby(bands, key=lambda band: _louder(band[2]))]
    told = [_band_text(label, run) for label, run in runs if label]
    numbers: dict[str, Any] = {"explained": explained, "bands": [list(band) for band in bands]}
    if not told:
        weights = np.abs(cross)
        phase = np.unwrap(np.angle(cross))
        delay = -float((weights * frequencies * phase).sum() / (2 * np.pi * (weights * frequencies**2).sum()))
        rest = math.sqrt(float((weights * (phase + 2 * np.pi * delay * frequencies) ** 2).sum() / weights.sum()))
        if rest < 0.1:
            numbers["delay"] = delay
            word = "later" if delay > 0 else "earlier"
            told = [f"the service comes {number(abs(delay))} samples {word}, at equal levels"]
        else:
            told = ["another phase, at equal levels"]
    if any(label for label, _ in runs) and any(not label for label, _ in runs):
        told.append(f"elsewhere equal within {EQUAL_DB} dB")
    text = f"a linear filter explains {100 * explained:.2f} % of the difference: {', '.join(told)}"
    return pair.relation("filter", text, numbers)


def _bands(
    frequencies: np.ndarray, ours: np.ndarray, theirs: np.ndarray, segment: int
) -> list[tuple[float, float, float]]:
    """Half octaves: from, to (cycles per sample), and how much louder the service is (dB). Bands without power are left out."""
    edges = [0.5]
    while edges[-1] > 4 / segment:
        edges.append(edges[-1] / math.sqrt(2))
    edges = [0.0, *reversed(edges)]
    bands = []
    least = 1e-9 * float(ours.sum() + theirs.sum())
    for low, high in itertools.pairwise(edges):
        inside = (frequencies >= low) & ((frequencies < high) | (high == 0.5))
        a, b = float(ours[inside].sum()), float(theirs[inside].sum())
        if max(a, b) > least:
            bands.append((low, high, 10 * math.log10(max(b, 1e-3 * least) / max(a, 1e-3 * least))))
    return bands


def _louder(db: float) -> str:
    return "" if abs(db) < EQUAL_DB else "louder" if db > 0 else "quieter"


def _band_text(label: str, run: list[tuple[float, float, float]]) -> str:
    low, high = run[0][0], run[-1][1]
    most = max(abs(db) for *_, db in run)
    where = (
        "everywhere"
        if low == 0 and high == 0.5
        else f"below {number(high)} cycles per sample"
        if low == 0
        else f"above {number(low)} cycles per sample"
        if high == 0.5
        else f"from {number(low)} to {number(high)} cycles per sample"
    )
    upto = "up to " if len(run) > 1 else ""
    return f"{where} the service is {upto}{most:.1f} dB {label}"


def as_noise(pair: Pair) -> Relation | None:
    level, correlation, _ = _statistics(pair)
    spread = math.sqrt(max(0.0, pair.products[0] / pair.r.size - pair.means[0] ** 2))
    rms = math.sqrt(pair.products[0] / pair.r.size)
    if not spread or level > 0.1 * spread or abs(correlation) > 0.1:
        return None
    db = 20 * math.log10(level / rms)
    text = f"a small difference without a structure that was recognised, {db:.1f} dB relative to training's level"
    return pair.relation("noise", text, {"level_db": db, "rms": level, "differing": int(pair.differs.sum())})


def as_other(pair: Pair) -> Relation:
    rr, rc, cc = pair.products
    (r, c), n = pair.means, pair.r.size
    spread = math.sqrt(max(0.0, rr - n * r * r) * max(0.0, cc - n * c * c))
    correlation = max(-1.0, min(1.0, (rc - n * r * c) / spread)) if spread > 1e-12 * math.sqrt(rr * cc) else None
    mean = sum(float(np.abs(y - x).sum()) for x, y in in_blocks(pair.r, pair.c)) / n
    level = _statistics(pair)[0]
    db = 20 * math.log10(level / math.sqrt(rr / n)) if level and rr else None
    told = "" if correlation is None else f"correlation {correlation:.4f}, "
    told += "" if db is None else f"difference {db:.1f} dB relative to training's level, "
    text = f"the service has other numbers: {told}largest difference {number(pair.largest)}, mean {number(mean)}"
    return pair.relation("other", text, {"correlation": correlation, "mean": mean, "level_db": db})


def _statistics(pair: Pair) -> tuple[float, float, float]:
    """Of the difference: its root mean square, its correlation with training's numbers, and its mean."""
    n, r = pair.r.size, pair.means[0]
    squares = products = 0.0
    mean = pair.means[1] - r
    for x, y in in_blocks(pair.r, pair.c):
        d = (y - x).ravel()
        squares += float(d @ d)
        products += float(d @ x.ravel())
    rms = math.sqrt(squares / n)
    spread = math.sqrt(max(0.0, squares / n - mean**2) * max(0.0, pair.products[0] / n - r**2))
    return rms, (products / n - mean * r) / spread if spread else 0.0, mean

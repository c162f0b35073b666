"""What the corpora's sounds and drawings are made with."""

from __future__ import annotations

import numpy as np
from numpy.random import MT19937, RandomState, SeedSequence
from numpy.typing import NDArray

Samples = NDArray[np.float64]


def stream(seed: int, *key: int) -> RandomState:
    """Random numbers for one part of a corpus: NumPy freezes the streams of RandomState for ever."""
    return RandomState(MT19937(SeedSequence([seed, *key])))


def wander(rng: RandomState, n: int, hz: float, rate: int) -> Samples:
    """A curve in [-1, 1] that turns about `hz` times a second: `(n,)`."""
    knots = 2 + int(n / rate * hz)
    return np.interp(np.linspace(0, knots - 1, n), np.arange(knots), rng.uniform(-1, 1, knots))


def glottal_pulses(pitch_hz: Samples, rate: int) -> Samples:
    """Differentiated pulses, rise 40 %, fall 16 % of a period, for a pitch in Hz at every sample: `(n,)`.

    A. E. Rosenberg, "Effect of glottal pulse shape on the quality of natural vowels", JASA 49, 1971.
    """
    phase = np.cumsum(pitch_hz) / rate % 1.0
    rise = 0.5 * (1 - np.cos(np.pi * phase / 0.4))
    fall = np.cos(np.pi / 2 * (phase - 0.4) / 0.16)
    return np.diff(np.where(phase < 0.4, rise, np.where(phase < 0.56, fall, 0.0)), prepend=0.0)

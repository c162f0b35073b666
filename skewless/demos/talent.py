"""A synthetic corpus of steady and wandering sung notes, for demonstration only: it says nothing about anyone's talent.

No person was recorded: every voice was computed from random numbers by crude textbook models, and real good singing is far
more than steadiness. "good" takes hold their notes, with an even vibrato; "poor" ones miss and drift, with an uneven
vibrato, a rough and breathy voice and sliding onsets. How unsteady a take is overlaps between the two, so that no model can
tell all of them apart.

audio/        recordings of 2 to 4 seconds with pauses, in several containers and rates
manifest.csv  file_path, label (poor or good), group (the singer), split (train, val or test; a singer is in one only)
corpus.json   the settings that make these same files again

A pair of takes, one poor and one good, shares singer, melody, length, background, level, rate and container: none of these
betrays the label. Every take is drawn from its own random streams, so that it does not depend on how many there are; only
the splits do.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np
from numpy.random import RandomState
from scipy.signal import lfilter, resample_poly

from skewless.demos.cough import RATES, SUBTYPES, VOWELS, Clip, encode, split_speakers
from skewless.demos.synthesis import Samples, glottal_pulses, stream, wander
from skewless.demos.writer import CorpusError, Example

VERSION = 1  # raise it whenever a byte of any example changes
MIN_COUNT = 12
LABELS = ("poor", "good")
FORMATS = ("wav", "flac", "ogg", "mp3")
TAKES_PER_SINGER = 4
RATE = 44_100  # takes are computed at this rate; the recorder resamples

# The range from which each label's takes draw how unsteady they are, from 0 to 1.
UNSTEADINESS = {"poor": (0.35, 1.0), "good": (0.0, 0.45)}
_MAJOR = (0, 2, 4, 5, 7, 9, 11, 12)


def _throat(source: Samples, formants_hz: Samples) -> Samples:
    """A cascade of resonators (D. H. Klatt, JASA 67(3), 1980), unit RMS."""
    for hz, bandwidth_hz in zip(formants_hz, (80.0, 100.0, 140.0, 200.0, 250.0), strict=True):
        radius = np.exp(-np.pi * bandwidth_hz / RATE)
        b, c = 2 * radius * np.cos(2 * np.pi * hz / RATE), -(radius**2)
        source = lfilter([1 - b - c], [1, -b, -c], source)
    return source / np.sqrt(np.mean(source**2))


def _note(rng: RandomState, n: int, pitch_hz: float, formants_hz: Samples, unsteadiness: float) -> Samples:
    """One sung note of `n` samples. Every imperfection grows with the unsteadiness, each by a factor of its own."""
    u = unsteadiness * rng.uniform(0.5, 1.5, 8)
    t = np.arange(n) / RATE
    vibrato_hz = 5.6 * (1 + 0.5 * u[0] * wander(rng, n, 3.0, RATE))
    depth = rng.uniform(0.2, 0.4) * (1 + u[1] * wander(rng, n, 4.0, RATE)) * np.minimum(1, t / 0.25)
    semitones = depth * np.sin(2 * np.pi * (rng.uniform() + np.cumsum(vibrato_hz) / RATE))
    semitones += 0.5 * u[2] * rng.standard_normal() + 0.6 * u[3] * wander(rng, n, 1.5, RATE)  # missed, and drifting
    semitones -= 2.0 * u[4] * np.exp(-t / 0.08)  # slides up to it
    jitter, shimmer = 0.01 * u[5] * wander(rng, n, 90.0, RATE), 0.35 * u[6] * wander(rng, n, 40.0, RATE)
    voiced = _throat(glottal_pulses(pitch_hz * 2 ** (semitones / 12) * (1 + jitter), RATE), formants_hz) * (1 + shimmer)
    breath = _throat(rng.standard_normal(n), formants_hz) * 10 ** ((-42 + 26 * u[7]) / 20)
    attack = 0.03 + 0.05 * unsteadiness
    return (voiced + breath) * np.minimum(1, t / attack) * np.minimum(1, (t[-1] - t) / 0.05)


def _take(singer: RandomState, pair: RandomState, take: RandomState, number: int, label: str) -> Clip:
    pitch_hz = np.exp(singer.uniform(np.log(110), np.log(330)))
    scale = singer.uniform(0.95, 1.1) * (pitch_hz / 150) ** 0.15
    upper_hz = np.array([3300.0, 4300.0]) * singer.uniform(0.9, 1.1, 2)

    # Drawn in a fixed order and without branches, so that one property never shifts the draws of the next.
    seconds, rate = pair.uniform(2.0, 4.0), RATES[pair.randint(len(RATES))]
    peak_db, noise_db, channels = pair.uniform(-20, -1), pair.uniform(-70, -45), pair.randint(1, 3)
    lead_s, pause_s, pause_after = pair.uniform(0.1, 0.5), pair.uniform(0.15, 0.4), pair.randint(1, 3)
    notes = pair.randint(3, 6)
    shares, steps = pair.uniform(1, 2, notes), pair.randint(len(_MAJOR), size=notes)
    vowel = VOWELS[pair.randint(len(VOWELS))]

    unsteadiness = take.uniform(*UNSTEADINESS[label])
    edges = lead_s + (seconds - lead_s - pause_s - 0.1) * np.concatenate([[0], np.cumsum(shares) / shares.sum()])
    edges[pause_after:] += pause_s
    starts = (edges[:-1] * RATE).astype(int)
    lengths = (np.diff(edges) * RATE).astype(int)
    lengths[pause_after - 1] -= int(pause_s * RATE)
    scene = np.zeros(int(seconds * RATE))
    formants_hz = np.concatenate([vowel * scale, upper_hz])
    for start, n, step in zip(starts, lengths, steps, strict=True):
        scene[start : start + n] += _note(take, n, pitch_hz * 2 ** (_MAJOR[step] / 12), formants_hz, unsteadiness)
    scene /= np.abs(scene).max()
    heard = scene + 10 ** (noise_db / 20) * take.standard_normal((channels, len(scene)))
    divisor = math.gcd(rate, RATE)
    heard = resample_poly(heard, rate // divisor, RATE // divisor, axis=1)
    samples = (heard / np.abs(heard).max() * 10 ** (peak_db / 20)).astype(np.float32)
    container = FORMATS[number % len(FORMATS)]
    subtypes = SUBTYPES[container]
    subtype = subtypes[number // len(FORMATS) % len(subtypes)]
    return Clip(samples, rate, LABELS.index(label), (), container, subtype, number * 2 // TAKES_PER_SINGER)


def examples(count: int, seed: int = 42) -> Iterator[Example]:
    """`count` takes, poor and good in turn, four per singer; raises CorpusError for an odd count."""
    if count % 2:
        raise CorpusError(f"{count} takes: give an even number, half of them poor and half good")
    splits = split_speakers(-(-count // TAKES_PER_SINGER), seed)
    for index in range(count):
        label, pair, singer = LABELS[index % 2], index // 2, index // TAKES_PER_SINGER
        clip = _take(stream(seed, 0, singer), stream(seed, 1, pair), stream(seed, 2, index), pair, label)
        name = f"audio/take-{index:05d}.{clip.format}"
        yield Example(name, encode(clip), label, f"singer-{singer:04d}", splits[singer])

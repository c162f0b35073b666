"""A synthetic corpus of orca calls in sea noise, for demonstration only.

Nothing here was recorded in the sea: every sound is computed from random numbers by crude textbook models, so a detector
trained on it says nothing about whales. It exists so that training, packaging and serving can be tried end to end without
downloading anything, on recordings whose answers are known.

Sounds come in bouts. In class "call" a bout is of whistles and pulsed calls, as J. K. B. Ford describes them ("Acoustic
behaviour of resident killer whales (Orcinus orca) off Vancouver Island, British Columbia", Can. J. Zool. 67, 1989); in
class "other" of sonar pings, moans, rattling chains, gusts and propellers, which also sound between the calls. Bouts are
equally long and loud in both classes, and both lie in coloured noise, often with a boat's tonals, rain or snapping
shrimp. Every two files, one of each class, share a hydrophone: its rate, channels, container and noise betray no label.
A training example is one window of 2 s, so that its label is that window's; the others are recordings of 8 to 12 s with
a bout of 5.5 to 7.5 s. A hydrophone is in one split only.

The same seed gives the same files: NumPy freezes the streams of RandomState for ever, and an example depends on its number
alone, not on how many are made.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator

import numpy as np
import soundfile
from numpy.random import RandomState
from numpy.typing import NDArray
from scipy.fft import next_fast_len
from scipy.signal import resample_poly

from skewless.demos.synthesis import Samples, stream
from skewless.demos.writer import Example

VERSION = 1  # raise it whenever a sample of any example changes
SPLITS = ("train",) * 8 + ("val",) * 2 + ("test",) * 2  # of the hydrophones
MIN_COUNT = 2 * len(SPLITS)
LABELS = ("other", "call")
RATES = (48_000, 20_000, 44_100)
CONTAINERS = (("WAV", "PCM_16"), ("FLAC", "PCM_16"), ("WAV", "PCM_24"), ("FLAC", "PCM_16"))
RATE = 48_000  # scenes are computed at this rate; the hydrophone resamples


def _noise(rng: RandomState, n: int, slope: float = 0.0, low_hz: float = 20.0, high_hz: float = 20_000.0) -> Samples:
    """Gaussian noise, `slope` dB per octave between two band edges; at 1 kHz as strong as white noise of unit RMS."""
    size = next_fast_len(n, real=True)
    f = np.maximum(np.fft.rfftfreq(size, 1 / RATE), 1.0)
    gain = (f / 1000.0) ** (slope / 6.02) / np.sqrt((1 + (low_hz / f) ** 8) * (1 + (f / high_hz) ** 8))
    return np.fft.irfft(np.fft.rfft(rng.standard_normal(size)) * gain, size)[:n]


def _curve(rng: RandomState, n: int, knots: int) -> Samples:
    """A smooth random curve in [-1, 1] through some knots."""
    x = np.linspace(0, knots - 1, n)
    at, values = x.astype(int).clip(max=knots - 2), rng.uniform(-1, 1, knots)
    return values[at] + (values[at + 1] - values[at]) * 0.5 * (1 - np.cos(np.pi * (x - at)))


def _faded(wave: Samples, seconds: float) -> Samples:
    ramp = np.minimum(1, np.arange(len(wave)) / (seconds * RATE))
    return wave * ramp * ramp[::-1]


def _harmonics(pitch_hz: Samples, centre_hz: float, width_hz: float) -> Samples:
    """Harmonics of a moving pitch, strongest around a centre, up to three widths above it and 9 kHz."""
    turn = np.exp(2j * np.pi * np.cumsum(pitch_hz) / RATE)
    wave, harmonic = np.zeros(len(turn)), turn.copy()
    for k in range(1, int(min(9000, centre_hz + 3 * width_hz) / pitch_hz.max()) + 1):
        wave += (0.1 + np.exp(-0.5 * ((k * pitch_hz - centre_hz) / width_hz) ** 2)) * harmonic.imag
        harmonic *= turn
    return wave


def _clicks(rng: RandomState, at: NDArray, n: int) -> Samples:
    """Short broadband resonances at these samples."""
    t = np.arange(int(0.004 * RATE)) / RATE
    wave = np.zeros(n + len(t))
    hz, tau = rng.uniform(2000, 7000), rng.uniform(0.0002, 0.0008)
    for start in at:
        wave[start : start + len(t)] += rng.uniform(0.5, 1) * np.exp(-t / tau) * np.sin(2 * np.pi * hz * t)
    return wave[:n]


def whistle(rng: RandomState, n: int) -> Samples:
    """One gliding, faintly trilled tone between 0.8 and 8 kHz, with a weak octave."""
    trill = 0.03 * np.sin(2 * np.pi * rng.uniform(5, 12) * np.arange(n) / RATE)
    hz = np.exp(rng.uniform(np.log(1500), np.log(4500))) * 2 ** (0.8 * _curve(rng, n, rng.randint(2, 5)) + trill)
    phase = 2 * np.pi * np.cumsum(hz) / RATE
    return _faded(np.sin(phase) + 0.15 * np.sin(2 * phase), 0.04)


def pulsed_call(rng: RandomState, n: int) -> Samples:
    """Bursts of pulses, so fast that they sound as a pitch with many harmonics, whose rate sweeps; often opened by a buzz
    of pulses that can still be told apart."""
    pitch = np.exp(rng.uniform(np.log(350), np.log(1300))) * 2 ** (0.6 * _curve(rng, n, rng.randint(2, 4)))
    wave = _faded(_harmonics(pitch, rng.uniform(1500, 5000), rng.uniform(800, 2500)), 0.03)
    if rng.random_sample() < 0.6:
        buzz = int(rng.uniform(0.1, 0.25) * RATE)
        wave[:buzz] = 3 * _clicks(rng, np.arange(0, buzz, RATE // rng.randint(60, 150)), buzz)
    return wave


def ping(rng: RandomState, n: int) -> Samples:
    """Sonar: one steady tone, in one to four pulses."""
    t = np.arange(n) / RATE
    keyed = (t * rng.randint(1, 5) / t[-1]) % 1 < rng.uniform(0.3, 0.8)
    return _faded(keyed * np.sin(2 * np.pi * np.exp(rng.uniform(np.log(800), np.log(8000))) * t), 0.01)


def moan(rng: RandomState, n: int) -> Samples:
    """A humpback's or a hull's: a low pitch with few harmonics, hardly moving."""
    return _faded(_harmonics(rng.uniform(70, 220) * 2 ** (0.1 * _curve(rng, n, 3)), 200.0, 200.0), 0.1)


def rattle(rng: RandomState, n: int) -> Samples:
    """A chain: clicks at random."""
    return _clicks(rng, rng.randint(0, n, int(n / RATE * rng.uniform(10, 60)) + 2), n)


def gust(rng: RandomState, n: int) -> Samples:
    """A squall or a wave: a swell of noise."""
    return np.hanning(n) * _noise(rng, n, rng.uniform(-4, 2), rng.uniform(100, 1500), rng.uniform(4000, 15_000))


def propeller(rng: RandomState, n: int) -> Samples:
    """Cavitation: noise that beats with the blades."""
    beat = 1 + np.sin(2 * np.pi * rng.uniform(6, 25) * np.arange(n) / RATE)
    return _faded(beat * _noise(rng, n, -3, 200, 12_000), 0.2)


CALLS = (whistle, pulsed_call, pulsed_call)
CONFUSERS = (ping, moan, rattle, gust, propeller)


def _bout(rng: RandomState, n: int, start_s: float, end_s: float, kinds: tuple[Callable, ...], gap_s: float) -> Samples:
    """Sounds one after another, each 0.5 to 1.3 s long, with pauses of up to `gap_s`."""
    wave, at = np.zeros(n), start_s
    while at + 0.5 <= end_s:
        length = int(min(rng.uniform(0.5, 1.3), end_s - at) * RATE)
        sound = kinds[rng.randint(len(kinds))](rng, length)
        level = 10 ** (rng.uniform(-12, 4) / 20) / np.sqrt(np.mean(sound**2))
        wave[int(at * RATE) : int(at * RATE) + length] += level * sound
        at += length / RATE + rng.uniform(0.05, gap_s)
    return wave


def _scene(rng: RandomState, label: str, seconds: float) -> Samples:
    n = int(seconds * RATE)
    length = seconds - 0.1 if seconds <= 2 else rng.uniform(5.5, 7.5)
    start = rng.uniform(0, seconds - length)
    wave = _bout(rng, n, start, start + length, CALLS if label == "call" else CONFUSERS, 0.25)
    if label == "call" and rng.random_sample() < 0.7:
        wave += _bout(rng, n, rng.uniform(0, 1), seconds, CONFUSERS, 3.0)
    if rng.random_sample() < 0.5:
        boat = np.full(n, rng.uniform(25, 90)) * (1 + 0.01 * _curve(rng, n, 6))
        wave += rng.uniform(0.1, 0.6) * _harmonics(boat, rng.uniform(100, 600), 300.0)
    if rng.random_sample() < 0.3:
        wave += rng.uniform(0.2, 0.8) * _noise(rng, n, 1.5, 1000, 16_000)
    if rng.random_sample() < 0.5:
        wave += _clicks(rng, rng.randint(0, n, int(seconds * rng.uniform(5, 40))), n)
    return wave


def _record(rng: RandomState, hydrophone: RandomState, scene: Samples, number: int) -> bytes:
    """The scene in the hydrophone's noise, at a random level, as a file."""
    slope, distance = hydrophone.uniform(-6, -3), hydrophone.uniform(0.4, 0.9)
    rate, (container, subtype) = RATES[number % len(RATES)], CONTAINERS[number % len(CONTAINERS)]
    sea = _noise(rng, len(scene), slope)
    channels = [scene + sea]
    if number % 5 in (1, 3):
        delayed = np.roll(scene, int(0.002 * RATE))
        channels.append(distance * delayed + sea + 0.3 * _noise(rng, len(scene), slope))
    samples = resample_poly(np.stack(channels), rate // 100, RATE // 100, axis=1)
    samples *= 10 ** (rng.uniform(-45, -22) / 20) / np.sqrt(np.mean(samples**2))
    file = io.BytesIO()
    soundfile.write(file, samples.clip(-1, 1).T, rate, format=container, subtype=subtype)
    return file.getvalue()


def examples(count: int, seed: int = 42) -> Iterator[Example]:
    """The first `count` examples: labels alternate, pairs go round the hydrophones; from MIN_COUNT on every split has both.

    seed: at least 0.
    """
    for index in range(count):
        number = index // 2 % len(SPLITS)
        rng, label, split = stream(seed, 0, index), LABELS[index % 2], SPLITS[number]
        scene = _scene(rng, label, 2.0 if split == "train" else rng.uniform(8, 12))
        data = _record(rng, stream(seed, 1, number), scene, number)
        name = f"audio/{index:04d}.{CONTAINERS[number % len(CONTAINERS)][0].lower()}"
        yield Example(name, data, label, f"hydrophone-{number:02d}", split)

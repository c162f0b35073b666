"""A synthetic corpus of cough and not-cough recordings, for demonstration only. NOT FOR MEDICINE.

Nothing here was recorded from a person. Every sound is computed from random numbers by crude textbook
models, so a detector trained on it says nothing about real coughs, let alone about health. It exists so that
training, packaging and serving can be tried end to end without downloading anything, on recordings whose
answers are known.

A recording is a scene (coughs or other sounds at known times) heard in a room and written by a recorder.
Three random streams, each derived from the seed alone, draw the three: the speaker and their room (one per
`CLIPS_PER_SPEAKER` clips), the recorder (one per pair of clips: a cough and a not-cough) and the scene (one
per clip). So clip `i` does not depend on how many clips are asked for, and length, level, background,
channels, rate and container have exactly the same distribution in both classes: none of them betrays the
label. Silent clips are the one exception: their level is lower than the recorder's.

Determinism: `numpy.random.RandomState` is used because NumPy freezes its streams for ever, which it does not
promise for `Generator`. One seed therefore gives the same manifest and events always, and the same samples
up to the rounding of the machine's mathematics library. The files are the same bytes for the same versions
of libsndfile and FFmpeg; what libsndfile draws at random or takes from the clock (an Ogg stream's serial
number, the time in a float WAV's PEAK chunk) is replaced by a constant.
"""

import io
import tempfile
import zlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from itertools import pairwise
from math import gcd
from pathlib import Path
from typing import cast

import av
import numpy as np
import soundfile
from numpy.random import RandomState
from numpy.typing import NDArray
from scipy.fft import next_fast_len
from scipy.signal import fftconvolve, lfilter, resample_poly

from skewless.demos.synthesis import Samples, glottal_pulses, stream, wander
from skewless.demos.writer import CorpusError, finish, is_complete, write_csv

VERSION = 1  # raise it whenever a sample of any clip changes
FORMATS = ("wav", "flac", "ogg", "mp3", "m4a", "webm")
SUBTYPES = {
    "wav": ("PCM_U8", "PCM_16", "PCM_24", "PCM_32", "FLOAT"),
    "flac": ("PCM_16", "PCM_24"),
    "ogg": ("VORBIS",),
    "mp3": ("MPEG_LAYER_III",),
    "m4a": ("AAC",),
    "webm": ("OPUS",),
}
RATES = (16_000, 22_050, 32_000, 44_100, 48_000)
CLIPS_PER_SPEAKER = 4
MIN_CLIPS, MIN_SECONDS, MAX_SECONDS = 12, 1.0, 60.0
RATE = 48_000  # scenes are computed at this rate; the recorder resamples
BLOCK = RATE // 100  # moving formants are updated every 10 ms

# Mean first three formants of men's vowels in Hz: Peterson and Barney, JASA 24(2), 1952, table II.
VOWELS = np.array(
    [
        [270, 2290, 3010],
        [530, 1840, 2480],
        [660, 1720, 2410],
        [730, 1090, 2440],
        [570, 840, 2410],
        [300, 870, 2240],
    ],
    dtype=float,
)
OPEN_VOWEL = VOWELS[3]


@dataclass(frozen=True)
class Event:
    """A sound's first and last sample within 40 dB of its own peak, in seconds from the start of the clip.

    Reverberation may ring on after `offset_s`.
    """

    name: str
    onset_s: float
    offset_s: float


@dataclass(frozen=True)
class Clip:
    """A recording before it is encoded: `samples` (channels, frames) float32 in [-1, 1] at `rate` Hz."""

    samples: NDArray[np.float32]
    rate: int
    label: int
    events: tuple[Event, ...]
    format: str
    subtype: str
    speaker: int


@dataclass(frozen=True)
class Voice:
    """What makes a speaker: pitch, formant scale (1 is an average man) and the timbre of their cough."""

    pitch_hz: float
    formant_scale: float
    cough_formants_hz: Samples
    burst: float
    turbulence: float
    voicing: float


@dataclass(frozen=True)
class Recorder:
    """How a pair of clips is recorded; `peak_db` above 0 clips, `offset` is DC as a fraction of the peak."""

    format: str
    subtype: str
    rate: int
    channels: int
    seconds: float
    peak_db: float
    offset: float
    noise_db: float
    noise_slope: float
    hum_hz: float


def _unit(x: Samples) -> Samples:
    return x / np.sqrt(np.mean(x**2))


def _noise(rng: RandomState, n: int, low_hz: float = 20.0, high_hz: float = 20_000.0, slope: float = 0.0) -> Samples:
    """Gaussian noise of unit RMS with a `slope` in dB per octave between two 12 dB per octave band edges."""
    size = next_fast_len(n, real=True)
    spectrum = np.fft.rfft(rng.standard_normal(size))
    f = np.maximum(np.fft.rfftfreq(size, 1 / RATE), 1.0)
    gain = (f / 1000.0) ** (slope / 6.02) / np.sqrt((1 + (low_hz / f) ** 4) * (1 + (f / high_hz) ** 4))
    return _unit(np.fft.irfft(spectrum * gain, size)[:n])


def _formants(source: Samples, hz: Samples, bandwidth_hz: Samples) -> Samples:
    """Cascade of resonators (Klatt, JASA 67(3), 1980), unit RMS.

    `hz` is (formants,) or, for moving formants, (formants, blocks); `bandwidth_hz` is (formants,).
    """
    tracks = hz[:, None] if hz.ndim == 1 else hz
    edges = np.linspace(0, len(source), tracks.shape[1] + 1).astype(int)
    out = source.copy()
    for track, bandwidth in zip(tracks, bandwidth_hz, strict=True):
        radius = np.exp(-np.pi * bandwidth / RATE)
        state = np.zeros(2)
        for frequency, (start, stop) in zip(track, pairwise(edges), strict=True):
            b, c = 2 * radius * np.cos(2 * np.pi * frequency / RATE), -(radius**2)
            out[start:stop], state = lfilter([1 - b - c], [1, -b, -c], out[start:stop], zi=state)
    return _unit(out)


def cough(rng: RandomState, voice: Voice) -> Samples:
    """One cough: an explosive burst, a turbulent decay and, for some, a closing voiced phase.

    The three phases are those of Korpas, Sadlonova and Vrabec, "Analysis of the cough sound: an overview",
    Pulmonary Pharmacology 9, 1996.
    """
    seconds = rng.uniform(0.25, 0.5)
    n = int(seconds * RATE)
    t = np.arange(n) / RATE
    formants = voice.cough_formants_hz * rng.uniform(0.94, 1.06, len(voice.cough_formants_hz))
    burst = (1 - np.exp(-t / rng.uniform(0.001, 0.003))) * np.exp(-t / rng.uniform(0.012, 0.03))
    turbulence = (1 - np.exp(-t / 0.02)) * np.exp(-t / rng.uniform(0.07, 0.14))
    throat = _formants(_noise(rng, n), formants, np.linspace(150, 500, len(formants)))
    wave = voice.burst * burst * _noise(rng, n, low_hz=80, high_hz=9000, slope=-2)
    wave += voice.burst * burst * throat + voice.turbulence * turbulence * throat
    if rng.random_sample() < voice.voicing:
        start = int(n * rng.uniform(0.4, 0.6))
        glide = np.linspace(rng.uniform(1.2, 1.6), 0.9, n - start) * (1 + 0.03 * wander(rng, n - start, 60, RATE))
        voiced = _formants(
            _unit(glottal_pulses(voice.pitch_hz * glide, RATE)), formants, np.linspace(90, 300, len(formants))
        )
        wave[start:] += rng.uniform(0.1, 0.35) * np.hanning(n - start) * voiced
    return wave * np.minimum(1, (seconds - t) / (0.3 * seconds))


def speech(rng: RandomState, voice: Voice, seconds: float) -> Samples:
    """Syllables: glottal pulses through formants that glide from vowel to vowel, with some fricatives."""
    lengths = rng.uniform(0.13, 0.28, rng.randint(3, 9))
    lengths = lengths[np.cumsum(lengths) <= seconds]
    edges = (np.concatenate([[0], np.cumsum(lengths)]) * RATE).astype(int)
    n = edges[-1]
    vowels = VOWELS[rng.randint(len(VOWELS), size=len(lengths))] * voice.formant_scale
    blocks, centres = np.arange(0, n, BLOCK), (edges[:-1] + edges[1:]) / 2
    tracks = np.stack([np.interp(blocks, centres, vowel) for vowel in vowels.T])
    tracks = np.vstack([tracks, np.full(len(blocks), 3500 * voice.formant_scale)])
    pitch = voice.pitch_hz * np.linspace(1.15, 0.85, n) * (1 + 0.1 * wander(rng, n, 4, RATE))
    wave = _formants(_unit(glottal_pulses(pitch, RATE)), tracks, np.array([70.0, 100.0, 150.0, 250.0]))
    hiss = _noise(rng, n, low_hz=3500, high_hz=9000)
    for start, stop in pairwise(edges):
        wave[start:stop] *= rng.uniform(0.5, 1.0) * np.sin(np.pi * np.linspace(0, 1, stop - start)) ** 0.6
        fricative = slice(start, start + int(rng.uniform(0.05, 0.1) * RATE))
        level = rng.uniform(0.05, 0.4) * (rng.random_sample() < 0.5)
        wave[fricative] += level * np.hanning(fricative.stop - start) * hiss[fricative]
    return wave


def hum(rng: RandomState, voice: Voice, seconds: float) -> Samples:
    """A throat hum: low, nasal, more or less rough."""
    n = int(min(seconds, rng.uniform(0.3, 1.2)) * RATE)
    t = np.arange(n) / RATE
    pitch = voice.pitch_hz * rng.uniform(0.7, 1.0) * (1 + 0.05 * wander(rng, n, 5, RATE))
    nasal = np.array([260.0, 1050.0, 2200.0]) * voice.formant_scale
    rough = 1 + rng.uniform(0, 0.6) * np.sin(2 * np.pi * rng.uniform(20, 35) * t)
    swell = np.minimum(1, np.minimum(t, t[-1] - t) / rng.uniform(0.03, 0.1))
    return swell * rough * _formants(_unit(glottal_pulses(pitch, RATE)), nasal, np.array([90.0, 250.0, 400.0]))


def laughter(rng: RandomState, voice: Voice, seconds: float) -> Samples:
    """Ha-ha-ha: a rhythm of breathy attacks, each followed by a short open vowel that falls in pitch."""
    period = 1 / rng.uniform(4.0, 6.5)
    count = min(rng.randint(3, 9), int(seconds / period))
    step = int(period * RATE)
    n = step * count
    phase = np.arange(n) % step / step
    formants = np.append(OPEN_VOWEL, 3500.0) * voice.formant_scale * rng.uniform(0.95, 1.1)
    pitch = voice.pitch_hz * np.repeat(np.linspace(rng.uniform(1.4, 2.0), 1.1, count), step) * (1.1 - 0.2 * phase)
    ha = np.sin(np.pi * np.clip((phase - 0.25) / 0.6, 0, 1)) * _formants(
        _unit(glottal_pulses(pitch, RATE)), formants, np.array([90.0, 120.0, 180.0, 300.0])
    )
    breath = np.sin(np.pi * np.clip(phase / 0.4, 0, 1)) * _formants(
        _noise(rng, n), formants, np.array([200.0, 250.0, 300.0, 400.0])
    )
    strengths = np.repeat(np.linspace(1.0, 0.5, count) * rng.uniform(0.7, 1.0, count), step)
    return strengths * (ha + rng.uniform(0.2, 0.7) * breath)


def _ring(rng: RandomState, hz: Samples, tau_s: Samples) -> Samples:
    """A sum of damped sinusoids (modes,) of random strength and phase, 5 time constants long."""
    t = np.arange(int(5 * max(tau_s) * RATE)) / RATE
    phase = rng.uniform(0, 2 * np.pi, len(hz))
    modes = np.exp(-t / tau_s[:, None]) * np.sin(2 * np.pi * hz[:, None] * t + phase[:, None])
    return rng.uniform(0.3, 1.0, len(hz)) @ modes


def knocks(rng: RandomState, voice: Voice, seconds: float) -> Samples:
    """Knuckles on wood: two to five blows, each a few low, strongly damped modes and a tick."""
    gap, modes = rng.uniform(0.15, 0.35), rng.uniform(90, 900, 4)
    count = min(rng.randint(2, 6), 1 + int((seconds - 0.3) / gap))
    wave = np.zeros(int((gap * (count - 1) + 0.3) * RATE))
    for k in range(count):
        blow = _ring(rng, modes, rng.uniform(0.01, 0.04, 4))
        tick = int(0.004 * RATE)
        blow[:tick] += rng.uniform(0.2, 0.8) * np.linspace(1, 0, tick) * _noise(rng, tick, high_hz=6000)
        start = int(gap * k * RATE)
        wave[start : start + len(blow)] += rng.uniform(0.6, 1.0) * blow
    return wave


def music(rng: RandomState, voice: Voice, seconds: float) -> Samples:
    """A melody on a pentatonic scale; each note is plucked or blown and has eight harmonics."""
    step = rng.uniform(0.14, 0.35)
    count = min(rng.randint(3, 9), int(seconds / step))
    wave = np.zeros(int(step * count * RATE) + 1)
    tonic, tilt = rng.uniform(130, 520), rng.uniform(0.8, 2.0)
    attack, decay = rng.uniform(0.004, 0.04), rng.uniform(0.1, 0.6)
    harmonics = np.arange(1, 9)
    for k in range(count):
        start, stop = int(step * k * RATE), int(step * (k + 1) * RATE)
        t = np.arange(stop - start) / RATE
        semitones = 12 * rng.randint(-1, 2) + (0, 2, 4, 7, 9)[rng.randint(5)]
        note = harmonics**-tilt @ np.sin(2 * np.pi * tonic * 2 ** (semitones / 12) * harmonics[:, None] * t)
        wave[start:stop] = note * np.minimum(1, t / attack) * np.exp(-t / decay) * np.minimum(1, (t[-1] - t) / 0.01)
    return wave


def noise(rng: RandomState, voice: Voice, seconds: float) -> Samples:
    """A gust of broadband noise: cloth, spray, a tap, a passing car."""
    length = min(seconds, rng.uniform(0.2, 1.4))
    n = int(length * RATE)
    t = np.arange(n) / RATE
    rise, fall = np.exp(rng.uniform(np.log(0.005), np.log(0.2))), rng.uniform(0.1, 0.6) * length
    swell = np.minimum(1, t / rise) * np.minimum(1, (length - t) / fall) * (1 + 0.5 * wander(rng, n, 8, RATE))
    return swell * _noise(
        rng, n, low_hz=rng.uniform(30, 800), high_hz=rng.uniform(3000, 15_000), slope=rng.uniform(-6, 2)
    )


def rumble(rng: RandomState, voice: Voice, seconds: float) -> Samples:
    """Traffic or a handled microphone: noise below about 250 Hz that swells slowly."""
    n = int(min(seconds, rng.uniform(0.6, 2.0)) * RATE)
    return np.hanning(n) * (1 + 0.6 * wander(rng, n, 6, RATE)) * _noise(rng, n, low_hz=25, high_hz=rng.uniform(90, 250))


def clicks(rng: RandomState, voice: Voice, seconds: float) -> Samples:
    """Keys, switches, pens: two to twelve very short resonant impulses."""
    n = int(min(seconds, rng.uniform(0.4, 1.6)) * RATE)
    wave = np.zeros(n)
    modes = rng.uniform(700, 6000, 3)
    for start in rng.randint(0, n - int(0.02 * RATE), rng.randint(2, 13)):
        click = _ring(rng, modes, rng.uniform(0.0005, 0.003, 3))
        wave[start : start + len(click)] += rng.uniform(0.4, 1.0) * click
    return wave


DISTRACTORS = (speech, hum, laughter, knocks, music, noise, rumble, clicks)


def _voice(rng: RandomState) -> Voice:
    pitch = np.exp(rng.uniform(np.log(85), np.log(300)))
    scale = rng.uniform(0.92, 1.08) * (pitch / 150) ** 0.2
    return Voice(
        pitch_hz=pitch,
        formant_scale=scale,
        cough_formants_hz=np.array([550.0, 1350.0, 2400.0, 3500.0, 4700.0]) * scale * rng.uniform(0.85, 1.15, 5),
        burst=rng.uniform(0.6, 1.2),
        turbulence=rng.uniform(0.6, 1.2),
        voicing=rng.uniform(0, 1),
    )


def _room(rng: RandomState) -> Samples:
    """Impulse responses (2, taps) to two microphones: a direct sound and Polack's decaying noise (1988).

    The first direct sound is 1 at tap 0; the second is up to 0.5 ms late and up to 3 dB weaker or stronger.
    """
    rt60, direct_to_reverb_db = rng.uniform(0.1, 0.9), rng.uniform(0, 15)
    t = np.arange(int(rt60 * RATE)) / RATE
    tail = rng.standard_normal((2, len(t))) * 10 ** (-3 * t / rt60)
    tail[:, : int(rng.uniform(0.002, 0.01) * RATE)] = 0
    tail *= np.sqrt(10 ** (-direct_to_reverb_db / 10) / np.sum(tail**2, axis=1, keepdims=True))
    tail[0, 0] = 1.0
    tail[1, rng.randint(0, RATE // 2000)] = 10 ** (rng.uniform(-3, 3) / 20)
    return tail


def _recorder(
    rng: RandomState, pair: int, min_seconds: float, max_seconds: float, formats: tuple[str, ...]
) -> Recorder:
    # Drawn in a fixed order and without branches, so that one property never shifts the draws of the next.
    format = formats[pair % len(formats)]
    subtypes = SUBTYPES[format]
    rate = RATES[rng.randint(len(RATES))]
    quiet_db, clipped_db, clips = rng.uniform(-30, -0.5), rng.uniform(3, 12), rng.random_sample() < 0.12
    offset, has_offset = rng.uniform(-0.15, 0.15), rng.random_sample() < 0.2
    return Recorder(
        format=format,
        subtype=subtypes[pair // len(formats) % len(subtypes)],
        rate=48_000 if format == "webm" else rate,
        channels=rng.randint(1, 3),
        seconds=rng.uniform(min_seconds, max_seconds),
        peak_db=clipped_db if clips else quiet_db,
        offset=offset if has_offset else 0.0,
        noise_db=rng.uniform(-60, -25),
        noise_slope=rng.uniform(-6, 0),
        hum_hz=(0, 0, 50, 60)[rng.randint(4)],
    )


def _place(scene: Samples, sound: Samples, start_s: float, gain_db: float) -> tuple[float, float]:
    """Add a sound with its peak at `gain_db`, trimmed to within 40 dB of the peak; returns its two times."""
    loud = np.flatnonzero(np.abs(sound) >= 0.01 * np.max(np.abs(sound)))
    sound = sound[loud[0] : loud[-1] + 1]
    start = int(start_s * RATE)
    scene[start : start + len(sound)] += 10 ** (gain_db / 20) * sound / np.max(np.abs(sound))
    return start / RATE, (start + len(sound)) / RATE


def _distract(rng: RandomState, scene: Samples, voice: Voice, gain_db: float) -> Event:
    seconds = len(scene) / RATE - 0.1
    make = DISTRACTORS[rng.randint(len(DISTRACTORS))]
    sound = make(rng, voice, seconds)
    start_s = 0.05 + rng.uniform(0, 1) * max(0.0, seconds - len(sound) / RATE)
    return Event(make.__name__, *_place(scene, sound, start_s, gain_db))


def _cough_train(rng: RandomState, scene: Samples, voice: Voice) -> list[Event]:
    """One to five coughs, as many as fit, each weaker than the first."""
    count = rng.randint(1, 6)
    sounds = [cough(rng, voice) for _ in range(count)]
    gaps = rng.uniform(0.02, 0.25, count)
    room_s = len(scene) / RATE - 0.1
    ends = np.cumsum([len(sound) / RATE + gap for sound, gap in zip(sounds, gaps, strict=True)])
    count = max(1, int(np.sum(ends <= room_s)))
    start_s, events = 0.05 + rng.uniform(0, 1) * max(0.0, room_s - ends[count - 1]), []
    for k in range(count):
        gain_db = 0.0 if k == 0 else rng.uniform(-9, 0)
        events.append(Event("cough", *_place(scene, sounds[k], start_s, gain_db)))
        start_s += len(sounds[k]) / RATE + gaps[k]
    return events


def _scene(rng: RandomState, label: int, voice: Voice, seconds: float) -> tuple[Samples, list[Event]]:
    """A clip's dry sounds: coughs, half the time with a weaker distractor; or up to two distractors."""
    scene = np.zeros(int(seconds * RATE))
    if label == 1:
        events = _cough_train(rng, scene, voice)
        if rng.random_sample() < 0.5:
            events.append(_distract(rng, scene, voice, gain_db=rng.uniform(-18, -3)))
    else:
        count = (0, 1, 1, 1, 1, 1, 1, 2, 2, 2, 2, 2)[rng.randint(12)]
        events = [_distract(rng, scene, voice, gain_db=0.0 if k == 0 else rng.uniform(-12, 0)) for k in range(count)]
    return scene, sorted(events, key=lambda event: event.onset_s)


def _record(rng: RandomState, scene: Samples, room: Samples, recorder: Recorder) -> NDArray[np.float32]:
    """A scene (n,) to samples (channels, frames): room, background, resampling, level, offset, clipping."""
    wet = fftconvolve(scene[None], room[: recorder.channels], axes=1)[:, : len(scene)]
    background = np.stack([_noise(rng, len(scene), slope=recorder.noise_slope) for _ in range(recorder.channels)])
    if recorder.hum_hz:
        t = np.arange(len(scene)) / RATE
        background += 0.5 * sum(np.sin(2 * np.pi * recorder.hum_hz * k * t) / k for k in (1, 2, 3, 5))
    is_silent, silent_db = not scene.any(), (-np.inf, -90.0, -75.0, -60.0)[rng.randint(4)]
    # Relative to the peak, not to the power: after peak normalisation both classes have the same noise floor.
    wet += background * 10 ** (recorder.noise_db / 20) * (1.0 if is_silent else np.max(np.abs(wet)))
    divisor = gcd(recorder.rate, RATE)
    heard = resample_poly(wet, recorder.rate // divisor, RATE // divisor, axis=1)
    heard = heard / np.max(np.abs(heard)) + recorder.offset
    heard /= np.max(np.abs(heard))
    peak_db = silent_db if is_silent else recorder.peak_db
    return np.clip(heard * 10 ** (peak_db / 20), -1, 1).astype(np.float32)


def _check(seed: int, min_seconds: float, max_seconds: float, formats: tuple[str, ...]) -> None:
    if seed < 0:
        raise CorpusError(f"seed {seed} is negative: give 0 or more")
    if not MIN_SECONDS <= min_seconds <= max_seconds <= MAX_SECONDS:
        raise CorpusError(
            f"clips of {min_seconds} to {max_seconds} seconds cannot be made: "
            f"give {MIN_SECONDS:g} <= minimum <= maximum <= {MAX_SECONDS:g}"
        )
    unknown = [name for name in formats if name not in FORMATS]
    if unknown or not formats or len(set(formats)) != len(formats):
        raise CorpusError(f"formats {','.join(formats)!r}: give one or more of {','.join(FORMATS)}, each once")


def synthesize(
    index: int,
    seed: int,
    *,
    min_seconds: float = 2.2,
    max_seconds: float = 4.0,
    formats: tuple[str, ...] = FORMATS,
) -> Clip:
    """Make clip `index` of the corpus of `seed`: odd clips are coughs (label 1), even ones are not (label 0).

    Clips `2k` and `2k + 1` share speaker, room and recorder. Raises CorpusError for settings out of range.
    """
    _check(seed, min_seconds, max_seconds, formats)
    if index < 0:
        raise CorpusError(f"clip index {index} is negative: give 0 or more")
    label, pair, speaker = index % 2, index // 2, index // CLIPS_PER_SPEAKER
    speaker_rng, recorder_rng, scene_rng = (
        stream(seed, kind, number) for kind, number in enumerate((speaker, pair, index))
    )
    voice, room = _voice(speaker_rng), _room(speaker_rng)
    recorder = _recorder(recorder_rng, pair, min_seconds, max_seconds, formats)
    scene, events = _scene(scene_rng, label, voice, recorder.seconds)
    samples = _record(scene_rng, scene, room, recorder)
    return Clip(samples, recorder.rate, label, tuple(events), recorder.format, recorder.subtype, speaker)


_BIT_REVERSED = bytes(int(f"{byte:08b}"[::-1], 2) for byte in range(256))


def _ogg_crc(page: bytes) -> int:
    """CRC-32 of RFC 3533, section 6: zlib's polynomial with the bits the other way round, starting from 0."""
    reflected = zlib.crc32(page.translate(_BIT_REVERSED), 0xFFFFFFFF) ^ 0xFFFFFFFF
    return int(f"{reflected:032b}"[::-1], 2)


def _with_ogg_serial(data: bytes, serial: int) -> bytes:
    """The Ogg stream `data` with the stream serial number of every page (RFC 3533, section 6) replaced."""
    pages, at = [], 0
    while at < len(data):
        segments = data[at + 26]
        size = 27 + segments + sum(data[at + 27 : at + 27 + segments])
        page = bytearray(data[at : at + size])
        page[14:18], page[22:26] = serial.to_bytes(4, "little"), bytes(4)
        page[22:26] = _ogg_crc(bytes(page)).to_bytes(4, "little")
        pages.append(bytes(page))
        at += size
    return b"".join(pages)


def _encode_with_ffmpeg(clip: Clip, container: str, codec: str, bits_per_second: int) -> bytes:
    layout = ("mono", "stereo")[len(clip.samples) - 1]
    file = io.BytesIO()
    with av.open(file, "w", format=container, options={"fflags": "+bitexact"}) as output:
        # Which kind of stream it is follows from the codec, which is an audio one.
        added = output.add_stream(codec, rate=clip.rate, layout=layout, options={"flags": "+bitexact"})
        stream = cast(av.AudioStream, added)
        stream.bit_rate = bits_per_second * len(clip.samples)
        frame = av.AudioFrame.from_ndarray(clip.samples, format="fltp", layout=layout)
        frame.sample_rate, frame.pts = clip.rate, 0
        output.mux(stream.encode(frame))
        output.mux(stream.encode(None))
    return file.getvalue()


def encode(clip: Clip) -> bytes:
    """The clip as a file. AAC pads to a multiple of 1024 samples; the other formats keep the exact length."""
    if clip.format == "m4a":
        return _encode_with_ffmpeg(clip, "ipod", "aac", bits_per_second=64_000)
    if clip.format == "webm":
        return _encode_with_ffmpeg(clip, "webm", "libopus", bits_per_second=40_000)
    file = io.BytesIO()
    with soundfile.SoundFile(file, "w", clip.rate, len(clip.samples), clip.subtype, format=clip.format) as output:
        # libsndfile's Vorbis encoder keeps a whole write on the stack and overflows it with long ones.
        for start in range(0, clip.samples.shape[1], clip.rate):
            output.write(clip.samples[:, start : start + clip.rate].T)
    data = file.getvalue()
    if clip.subtype == "VORBIS":
        return _with_ogg_serial(data, serial=1)
    if clip.subtype == "FLOAT":
        time = data.index(b"PEAK") + 12
        return data[:time] + bytes(4) + data[time + 4 :]
    return data


def split_speakers(speakers: int, seed: int) -> list[str]:
    """The split of each speaker: a fifth (at least one) to val and to test, the others to train."""
    held_out = max(1, round(0.2 * speakers))
    splits = ["val"] * held_out + ["test"] * held_out + ["train"] * (speakers - 2 * held_out)
    return [splits[k] for k in stream(seed, 3).permutation(speakers)]


README = """\
A synthetic corpus for demonstration only. NOT FOR MEDICINE.

No person was recorded: every sound was computed from random numbers. A detector trained on these files
knows nothing about real coughs. Use it to try training, packaging and serving, and for nothing else.

audio/        {clips} recordings
manifest.csv  file_path, cough_label (1 cough, 0 not), split (train, val or test;
              a speaker and their room are in one split only)
events.csv    file_path, event, onset_s, offset_s: every cough and every other sound, in seconds
corpus.json   the settings that make these same files again
"""


def write_corpus(
    out: str | Path,
    clips: int,
    seed: int,
    *,
    min_seconds: float = 2.2,
    max_seconds: float = 4.0,
    formats: tuple[str, ...] = FORMATS,
    progress: Callable[[Iterable[int]], Iterable[int]] = iter,
) -> bool:
    """Write `clips` recordings with manifest.csv, events.csv, corpus.json and README.txt under `out`.

    `out` appears complete or not at all. `progress` wraps the clip indices (tqdm does). Returns False, having
    written nothing, if the same corpus is there already. Raises CorpusError for settings out of range and for
    a directory that holds anything else.
    """
    out = Path(out).resolve()
    _check(seed, min_seconds, max_seconds, formats)
    if clips < MIN_CLIPS or clips % 2:
        raise CorpusError(f"{clips} clips: give an even number of at least {MIN_CLIPS}, half coughs and half not")
    settings = {
        "synthesiser": "synthetic-cough",
        "version": VERSION,
        "seed": seed,
        "clips": clips,
        "min_seconds": min_seconds,
        "max_seconds": max_seconds,
        "formats": list(formats),
    }
    if is_complete(out, settings):
        return False
    splits = split_speakers(-(-clips // CLIPS_PER_SPEAKER), seed)
    manifest, events = [], []
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.name}-") as scratch:
        part = Path(scratch) / "corpus"
        (part / "audio").mkdir(parents=True)
        for index in progress(range(clips)):
            clip = synthesize(index, seed, min_seconds=min_seconds, max_seconds=max_seconds, formats=formats)
            name = f"audio/clip-{index:05d}.{clip.format}"
            (part / name).write_bytes(encode(clip))
            manifest.append((name, clip.label, splits[clip.speaker]))
            events += [(name, event.name, f"{event.onset_s:.4f}", f"{event.offset_s:.4f}") for event in clip.events]
        write_csv(part / "manifest.csv", "file_path,cough_label,split", manifest)
        write_csv(part / "events.csv", "file_path,event,onset_s,offset_s", events)
        finish(part, out, settings, README.format(clips=clips))
    return True

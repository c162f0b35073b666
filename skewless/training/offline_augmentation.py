"""Augmented copies of a recording, as recordings: what is done to the waveform cannot be done to features.

Made for training only, each beside its recording and on its split and group: a singer's copies never test a model that has
heard the singer.
"""

from __future__ import annotations

import hashlib
import io

import librosa
import numpy as np
from numpy.typing import NDArray
from scipy.io import wavfile

from skewless.core.stages import Payload, Signal
from skewless.core.stages.decode import Decode

# The widest changes. Noise: decibels that white noise lies below the recording's RMS.
PITCH_SEMITONES = 2.0
STRETCH = (0.9, 1.1)
NOISE_DB = (30.0, 60.0)

Samples = NDArray[np.float32]


def copies(data: bytes, count: int, seed: int) -> list[bytes]:
    """`count` changed copies of an encoded recording, as float WAV at its own rate and channels.

    Each has one change, in turn: pitch shifted by up to 2 semitones, time stretched to 0.9 to 1.1 times the speed, white
    noise added 30 to 60 dB below the recording's RMS. Pitch and time are changed by librosa's phase vocoder (J. L. Flanagan,
    R. M. Golden, "Phase Vocoder", Bell System Technical Journal 1966). How much depends on the seed, the recording's bytes
    and the copy's number alone: more copies begin with the same ones. Samples may exceed full scale, which float WAV keeps.

    Raises InputError for a recording that cannot be decoded, ValueError for a negative count or seed.
    """
    if count < 0 or seed < 0:
        raise ValueError(f"count {count}, seed {seed}: expected 0 or more")
    signal = Decode()(Signal(Payload(data)))
    samples, rate = signal.data.numpy(), signal.rate
    digest = int.from_bytes(hashlib.sha256(data).digest()[:8], "big")
    changes = (_shift, _stretch, _add_noise)
    made = []
    for number in range(count):
        # RandomState: NumPy keeps its streams as they are.
        rng = np.random.RandomState(np.random.MT19937(np.random.SeedSequence([seed, digest, number])))
        made.append(_wav(changes[number % len(changes)](samples, rate, rng), rate))
    return made


def _shift(samples: Samples, rate: int, rng: np.random.RandomState) -> Samples:
    steps = rng.uniform(-PITCH_SEMITONES, PITCH_SEMITONES)
    return librosa.effects.pitch_shift(samples, sr=rate, n_steps=steps)


def _stretch(samples: Samples, rate: int, rng: np.random.RandomState) -> Samples:
    return librosa.effects.time_stretch(samples, rate=rng.uniform(*STRETCH))


def _add_noise(samples: Samples, rate: int, rng: np.random.RandomState) -> Samples:
    level = np.sqrt(np.mean(samples**2)) * 10 ** (-rng.uniform(*NOISE_DB) / 20)
    return (samples + level * rng.standard_normal(samples.shape)).astype(np.float32)


def _wav(samples: Samples, rate: int) -> bytes:
    # Not libsndfile, which stamps the time of writing into a float WAV.
    file = io.BytesIO()
    wavfile.write(file, rate, samples.T)
    return file.getvalue()

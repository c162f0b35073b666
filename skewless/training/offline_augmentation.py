"""Offline augmentation: changed copies of a recording, made once. What is done to a waveform cannot be done to features.

Made for training only, each in its recording's split and group: a singer's copies never test a model that has heard the
singer.
"""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import librosa
import numpy as np
from numpy.typing import NDArray
from scipy.io import wavfile
from tqdm import tqdm

from skewless.core.files import atomic
from skewless.core.stages import InputError, Payload, Signal
from skewless.core.stages.decode import Decode
from skewless.core.versions import library_versions
from skewless.training.manifest import Recording

# The widest changes. Noise: decibels that white noise lies below the recording's RMS.
PITCH_SEMITONES = 2.0
STRETCH = (0.9, 1.1)
NOISE_DB = (30.0, 60.0)

# The packages that compute a copy.
_PACKAGES = ("librosa", "numpy", "scipy", "soundfile", "av")

Samples = NDArray[np.float32]


def augmented_recordings(recordings: Sequence[Recording], count: int, seed: int, folder: Path) -> list[Recording]:
    """`count` augmented copies of every recording, as files in `folder`, each in its recording's split and group.

    A file that is there already is used again. Of an unreadable recording there are none: `StageCache.prepare` reports it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    # Made by other code or other libraries, a copy is another one.
    maker = json.dumps(library_versions(_PACKAGES)).encode() + Path(__file__).read_bytes()
    made = []
    for recording in tqdm(recordings, desc="augmented copies", unit="file"):
        data = recording.path.read_bytes()
        name = f"{hashlib.sha256(maker + data).hexdigest()}-{seed}"
        paths = [folder / f"{name}-{number}.wav" for number in range(count)]
        if not all(path.exists() for path in paths):
            try:
                audio = augmented_copies(data, count, seed)
            except InputError:
                continue
            for path, copy in zip(paths, audio, strict=True):
                with atomic(path) as unfinished:
                    unfinished.write_bytes(copy)
        made += [
            replace(recording, file_path=f"{recording.file_path}, copy {number}", path=path)
            for number, path in enumerate(paths, start=1)
        ]
    return made


def augmented_copies(data: bytes, count: int, seed: int) -> list[bytes]:
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
    samples, rate = signal.data.numpy(), signal.sampling_rate
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

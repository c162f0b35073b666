"""Recordings for the tests: synthetic sounds, and files made from them by pydub and its ffmpeg program.

pydub is the independent decoder too. Without ffprobe only its route over temporary files works, and ffmpeg writes
16-bit samples there: what pydub decodes from a lossy file is rounded to 2**-15.
"""

import io
import subprocess
import warnings
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path

import imageio_ffmpeg
import numpy as np
import pytest
import soundfile
import torch
from numpy.typing import NDArray

with warnings.catch_warnings():
    # On import pydub misses an ffmpeg on the PATH (it is given one below) and notes that audioop will go.
    warnings.simplefilter("ignore")
    from pydub import AudioSegment

FFMPEG = imageio_ffmpeg.get_ffmpeg_exe()
AudioSegment.converter = FFMPEG

ESC10 = Path(__file__).resolve().parents[2] / "shared" / "data" / "esc10" / "audio"

# name: (pydub's container, codec, further options)
ENCODERS: dict[str, tuple[str, str | None, list[str] | None]] = {
    "wav8": ("wav", "pcm_u8", None),
    "wav16": ("wav", "pcm_s16le", None),
    "wav24": ("wav", "pcm_s24le", None),
    "wav32": ("wav", "pcm_s32le", None),
    "wav_float": ("wav", "pcm_f32le", None),
    "wav_double": ("wav", "pcm_f64le", None),
    "wav_mulaw": ("wav", "pcm_mulaw", None),
    "aiff": ("aiff", None, None),
    "flac": ("flac", None, None),
    "flac24": ("flac", None, ["-sample_fmt", "s32"]),
    "vorbis": ("ogg", "libvorbis", None),
    "opus": ("ogg", "libopus", None),
    "mp3": ("mp3", "libmp3lame", None),
    "mp3_vbr": ("mp3", "libmp3lame", ["-q:a", "4"]),
    "m4a": ("ipod", "aac", None),
    "m4a_faststart": ("ipod", "aac", ["-movflags", "faststart"]),
    "alac": ("ipod", "alac", None),
    "aac": ("adts", "aac", None),
    "webm": ("webm", "libopus", None),
    "webm_vorbis": ("webm", "libvorbis", None),
    "mkv8": ("matroska", "pcm_u8", None),
    "mkv32": ("matroska", "pcm_s32le", None),
    "mkv_double": ("matroska", "pcm_f64le", None),
}


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """One CPU thread in the test modules that import this: on small tensors, and on a machine that is shared,
    threads wait for one another far longer than they compute."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def coughs(rate: int, seconds: float, channels: int = 1, seed: int = 0) -> NDArray[np.float64]:
    """Bursts of decaying noise over a hum and faint background noise: `(channels, samples)`, largest magnitude 0.7.

    Channels share the bursts at different levels and have their own background.
    """
    rng = np.random.default_rng([seed, rate, channels])
    length = round(rate * seconds)
    time = np.arange(length) / rate
    bursts = np.zeros(length)
    for onset in np.arange(0.1, seconds, 0.8):
        after = time >= onset
        bursts[after] += rng.standard_normal(after.sum()) * np.exp((onset - time[after]) / 0.06)
    levels = np.linspace(1.0, 0.3, channels)[:, None]
    hum = 0.05 * np.sin(2 * np.pi * (110.0 + 35.0 * np.arange(channels)[:, None]) * time)
    samples = levels * bursts + hum + 1e-3 * rng.standard_normal((channels, length))
    return 0.7 * samples / np.abs(samples).max()


def tones(rate: int, seconds: float, channels: int = 1) -> NDArray[np.float64]:
    """Two steady tones below 3.5 kHz, of another pitch in every channel, and noise at -50 dB: `(channels, samples)`.

    Codecs keep it nearly as it is, and no two channels are alike.
    """
    time = np.arange(round(rate * seconds)) / rate
    index = np.arange(channels)[:, None]
    pitched = 0.3 * np.sin(2 * np.pi * (200.0 + 90.0 * index) * time)
    pitched += 0.15 * np.sin(2 * np.pi * (1500.0 + 170.0 * index) * time + index)
    return pitched + 0.003 * np.random.default_rng([rate, channels]).standard_normal(pitched.shape)


def segment(samples: NDArray, rate: int, sample_width: int = 2) -> AudioSegment:
    """pydub's object for float samples `(channels, samples)` in [-1, 1), rounded to `sample_width` bytes."""
    steps = np.round(np.asarray(samples, dtype=np.float64) * 2.0 ** (8 * sample_width - 1))
    pcm = steps.astype({1: np.int8, 2: np.int16, 4: np.int32}[sample_width])
    return AudioSegment(pcm.T.tobytes(), sample_width=sample_width, frame_rate=rate, channels=len(pcm))


def encode(samples: NDArray, rate: int, encoder: str, sample_width: int = 2, options: tuple[str, ...] = ()) -> bytes:
    """Float samples `(channels, samples)` as a file: rounded to `sample_width` bytes, then encoded by pydub."""
    container, codec, own = ENCODERS[encoder]
    parameters = [*(own or ()), *options] or None
    file = io.BytesIO()
    segment(samples, rate, sample_width).export(file, format=container, codec=codec, parameters=parameters)
    return file.getvalue()


@lru_cache(maxsize=256)
def recording(encoder: str, rate: int = 16000, channels: int = 1, seconds: float = 1.5) -> bytes:
    """`tones` as a file, made once."""
    return encode(tones(rate, seconds, channels), rate, encoder)


def wav(samples: NDArray, rate: int, subtype: str = "PCM_16") -> bytes:
    """Samples `(channels, samples)` as a WAV file, without starting a process. Float samples have full scale 1.0."""
    file = io.BytesIO()
    soundfile.write(file, np.asarray(samples).T, rate, format="WAV", subtype=subtype)
    return file.getvalue()


def ffmpeg(*arguments: str, data: bytes = b"") -> bytes:
    """What the ffmpeg program writes to a pipe, given `data` on another; raises CalledProcessError when it fails."""
    return subprocess.run([FFMPEG, "-v", "error", *arguments], input=data, capture_output=True, check=True).stdout


def pydub_decode(data: bytes) -> tuple[int, NDArray[np.float64]]:
    """The sampling rate in Hz, and the samples `(channels, samples)` with full scale 1.0, as pydub decodes a file.

    pydub reads PCM WAV of 8 to 32 bits itself and leaves everything else to ffmpeg.
    """
    kind = "wav" if data[:4] == b"RIFF" else None
    decoded = AudioSegment.from_file_using_temporary_files(io.BytesIO(data), format=kind)
    pcm = np.array(decoded.get_array_of_samples(), dtype=np.float64).reshape(-1, decoded.channels).T
    return decoded.frame_rate, pcm / 2.0 ** (8 * decoded.sample_width - 1)


def esc10(count: int) -> list[Path]:
    """`count` real recordings, spread over the classes and folds; none where the data folder is absent."""
    files = sorted(ESC10.glob("*.ogg"))
    return files[:: max(1, len(files) // count)][:count] if files else []

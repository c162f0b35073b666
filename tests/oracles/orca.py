"""The orca pipeline in float64: every stage from its definition, on decoded samples. The stages that another pipeline has too
are that one's, with other parameters.

And the front ends of the systems behind it, in float32, by the libraries that they call: `cached_clips` and `resampled_first`
up to the clips, `spectrogram` from a clip on.
"""

from __future__ import annotations

import io
import math
from functools import partial

import numpy as np
import scipy.signal
import soundfile
import torch
import torchaudio.transforms as AT
from numpy.typing import ArrayLike, NDArray

from tests.oracles import cough
from tests.oracles.cough import Array, downmix, replicate

segment = partial(cough.segment, hop_s=1.0, max_segments=300)
# Of 20 kHz samples, by a filterbank that takes them for 16 kHz.
mel = partial(cough.mel, rate=16000, n_fft=2560, hop=256, n_mels=256, f_min=0.0, f_max=10000.0)
decibel = partial(cough.decibel, top_db=100.0)


def resample(clips: ArrayLike, rate: int, new_rate: int = 20000, zero_crossings: int = 10, beta: float = 5.0) -> Array:
    """Polyphase interpolation of (S, N) samples at rate Hz to ceil(N * new_rate / rate) at new_rate Hz.

    y(m) = sum_n x(n) h(m down - n up), with up / down = new_rate / rate in lowest terms, q = max(up, down) and
    h(k) = up g(k) / sum g, g(k) = sinc(k / q) kaiser(k / (q zero_crossings)) for |k| <= q zero_crossings, else 0.
    kaiser(u) = I0(beta sqrt(1 - u^2)) / I0(beta): J. F. Kaiser, "Nonrecursive Digital Filter Design Using the I0-sinh
    Window Function", 1974. Samples outside the clip are zero. Equal rates return the clips unchanged.
    """
    clips = np.asarray(clips, dtype=np.float64)
    if rate == new_rate:
        return clips
    common = math.gcd(rate, new_rate)
    up, down = new_rate // common, rate // common
    q = max(up, down)
    reach = q * zero_crossings
    k = np.arange(-reach, reach + 1)
    g = np.sinc(k / q) * np.i0(beta * np.sqrt(1 - (k / reach) ** 2)) / np.i0(beta)
    h = up * g / g.sum()

    samples = clips.shape[1]
    instants = np.arange(-(-samples * up // down))[:, None] * down
    n = -(-(instants - reach) // up) + np.arange(2 * reach // up + 1)
    taps = instants - n * up + reach
    within = (taps >= 0) & (taps <= 2 * reach) & (n >= 0) & (n < samples)
    weights = np.where(within, h[taps.clip(0, 2 * reach)], 0.0)
    return np.einsum("smt,mt->sm", clips[:, n.clip(0, samples - 1)], weights)


def pad_frames(level: ArrayLike, frames: int = 312, value_db: float = 0.0, above_minimum: bool = False) -> Array:
    """(S, F, T) decibels to (S, F, frames): the first ones, or value_db after them, counted from 0 dB or from the
    segment's lowest value."""
    level = np.asarray(level, dtype=np.float64)
    out = np.full((*level.shape[:2], frames), value_db)
    if above_minimum:
        out += level.min(axis=(1, 2), keepdims=True)
    kept = min(frames, level.shape[2])
    out[:, :, :kept] = level[:, :, :kept]
    return out


def trace(samples: ArrayLike, rate: int) -> dict[str, NDArray]:
    """Every stage's output in order, by stage name, for decoded samples (C, N) at rate Hz."""
    stages = {"downmix": downmix(samples)}
    stages["segment"] = segment(stages["downmix"], rate)
    stages["resample"] = resample(stages["segment"], rate)
    stages["mel"] = mel(stages["resample"])
    stages["decibel"] = decibel(stages["mel"])
    stages["pad_frames"] = pad_frames(stages["decibel"])
    stages["replicate"] = replicate(stages["pad_frames"], 1)
    return stages


def cached_clips(recording: bytes) -> list[NDArray[np.float32]]:
    """Clips of 2 s, one every second, each averaged over its channels, resampled to 20 kHz by scipy, written as a 16-bit WAV by
    libsndfile, and read again: `(40000,)` each."""
    samples, rate = soundfile.read(io.BytesIO(recording), dtype="float32", always_2d=True)
    clips = [samples[k * rate : (k + 2) * rate] for k in range(len(samples) // rate - 1)]
    return [_through_16_bits(_at_20_khz(clip.T, rate)) for clip in clips]


def resampled_first(recording: bytes) -> list[NDArray[np.float32]]:
    """The recording averaged over its channels, resampled to 20 kHz by scipy, written as a 16-bit WAV by libsndfile, and read
    again; of that the clips of 2 s, one every second, that fit: `(40000,)` each."""
    samples, rate = soundfile.read(io.BytesIO(recording), dtype="float32", always_2d=True)
    whole = _through_16_bits(_at_20_khz(samples.T, rate))
    starts = range(0, len(whole), 20000)
    return [whole[start : start + 40000] for start in starts if start + 40000 <= len(whole)]


def spectrogram(clip: NDArray[np.float32]) -> torch.Tensor:
    """A clip `(40000,)` to `(1, 256, 312)`: decibels by torchaudio's transforms with their default rate, zeros behind them."""
    mel = AT.MelSpectrogram(n_fft=2560, hop_length=256, n_mels=256, f_min=0.0, f_max=10000.0, pad=0)
    decibels = AT.AmplitudeToDB(top_db=100)(mel(torch.from_numpy(clip)[None]))
    return torch.nn.functional.pad(decibels, (0, 312 - decibels.shape[2]))


def _at_20_khz(channels: NDArray[np.float32], rate: int) -> NDArray[np.float32]:
    mono = torch.from_numpy(np.ascontiguousarray(channels)).mean(dim=0).numpy()
    common = math.gcd(rate, 20000)
    return mono if rate == 20000 else scipy.signal.resample_poly(mono, 20000 // common, rate // common)


def _through_16_bits(mono: NDArray[np.float32]) -> NDArray[np.float32]:
    file = io.BytesIO()
    soundfile.write(file, mono, 20000, format="WAV", subtype="PCM_16")
    file.seek(0)
    return soundfile.read(file, dtype="float32")[0]


def second_confidences(windows: ArrayLike) -> Array:
    """The mean over the windows (S,), of two seconds each and one second apart, that cover each of the S + 1 seconds."""
    windows = np.asarray(windows, dtype=np.float64)
    cover = np.array([[i in (second - 1, second) for i in range(len(windows))] for second in range(len(windows) + 1)])
    return cover @ windows / cover.sum(axis=1)

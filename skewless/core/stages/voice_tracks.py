"""librosa's numbers about a voice, without librosa: what its functions share is computed once, its constants once per rate.

librosa 0.11 is the definition, and tests hold these functions to its bits. Calling it takes more than twice the time: its
functions build their filterbanks at each call, and interpolate every bin of the spectrum to find a few peaks. It also takes
more than 200 MB, for numba, scikit-learn and scipy.signal.

Frames are rows here, `(T, bins)`, which is how librosa's `(bins, T)` lie in memory: sums add up in the same order. What
is `(bands, T)` here is so there, too.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any, Literal, NamedTuple

import numpy as np
import scipy.fft
from numpy.lib.stride_tricks import sliding_window_view
from numpy.typing import NDArray

F32 = NDArray[np.float32]
F64 = NDArray[np.float64]

# Temporary arrays are this many frames long: they stay in the processor's cache, and a long recording needs no more memory.
BLOCK = 32
# What librosa calls tiny: a frame below it is not divided by its sum.
TINY = np.finfo(np.float32).tiny
# Decibels have this floor, and samples this close to zero are zero.
LEAST_POWER = 1e-10
LEAST_SAMPLE = np.float32(1e-10)
PITCH_CLASSES = 12
TUNINGS = np.linspace(-0.5, 0.5, 101)  # the edges of hundredths of a semitone


class Spectrum(NamedTuple):
    """What one pass over the frames gives.

    power: `(T, 1 + n_fft // 2)`. centroid, rolloff: `(T,)` in Hz. tuning: in semitones from A4 = 440 Hz, [-0.5, 0.5).
    """

    power: F32
    centroid: F64
    rolloff: F64
    tuning: float


def spectrum(waveform: F32, rate: int, n_fft: int, hop_length: int, roll_percent: float) -> Spectrum:
    """`(N,)` in frames of n_fft samples, Hann-windowed, centred, zero-padded: librosa's stft, spectral_centroid,
    spectral_rolloff and estimate_tuning."""
    frames = _frames(np.pad(waveform, n_fft // 2), n_fft, hop_length)
    window, frequencies = hann(n_fft), _frequencies(rate, n_fft)
    power = np.empty((len(frames), len(frequencies)), dtype=np.float32)
    centroid, rolloff = np.empty(len(frames)), np.empty(len(frames))
    peaks = []
    for start in range(0, len(frames), BLOCK):
        block = slice(start, start + BLOCK)
        # The window is float64, and so is the transform; only its result is rounded.
        magnitude = np.abs(scipy.fft.rfft(frames[block] * window, axis=1, overwrite_x=True).astype(np.complex64))
        np.square(magnitude, out=power[block])
        centroid[block] = _centroid(magnitude, frequencies)
        summed = np.cumsum(magnitude, axis=1)
        rolloff[block] = frequencies[(summed >= roll_percent * summed[:, -1:]).argmax(axis=1)]
        peaks.append(_peaks(power[block], rate))
    hertz, strength = (np.concatenate(parts) for parts in zip(*peaks, strict=True))
    return Spectrum(power, centroid, rolloff, _tuning(hertz, strength))


def _centroid(magnitude: F32, frequencies: F64) -> F64:
    total = magnitude.astype(np.float64).sum(axis=1, keepdims=True)
    total[total < TINY] = 1.0
    return np.sum(frequencies * (magnitude / total).astype(np.float32), axis=1)


def _peaks(power: F32, rate: int) -> tuple[F32, F32]:
    """Frequency and height of the spectrum's peaks from 150 to 4000 Hz, above a tenth of their frame's largest power, placed
    by a parabola through three bins (librosa.piptrack)."""
    n_fft = 2 * (power.shape[1] - 1)
    first, end = np.searchsorted(_frequencies(rate, n_fft), (150.0, min(4000.0, rate / 2)))
    here = power[:, first:end]
    below, above = power[:, first - 1 : end - 1], power[:, first + 1 : end + 1]
    at = np.nonzero((here > 0.1 * power.max(axis=1, keepdims=True)) & (here > below) & (here >= above))
    here, below, above = here[at], below[at], above[at]
    # float64 from here on for the shift, where numba's compiler has it.
    curvature, slope = (above + below) - 2 * here.astype(np.float64), (above - below) / np.float64(2)
    usable = np.abs(slope) < np.abs(curvature)
    shift = np.divide(-slope, curvature, where=usable, out=np.zeros_like(slope)).astype(np.float32)
    hertz = ((at[1] + first + shift) * float(rate) / n_fft).astype(np.float32)
    return hertz, here + np.float32(0.5) * slope.astype(np.float32) * shift


def _tuning(hertz: F32, strength: F32) -> float:
    """The commonest deviation of the stronger half of the peaks from equal temperament (librosa.pitch_tuning)."""
    if not len(hertz):
        return 0.0
    hertz = hertz[strength >= np.median(strength)]
    deviation = np.mod(PITCH_CLASSES * np.log2(hertz / (440.0 / 16)), 1.0)
    deviation[deviation >= 0.5] -= 1.0
    return float(TUNINGS[np.argmax(np.histogram(deviation, TUNINGS)[0])])


def mel_level(power: F32, rate: int, n_fft: int, n_mels: int) -> F32:
    """`(n_mels, T)` in dB, floored 80 dB below the largest (librosa.feature.melspectrogram, librosa.power_to_db)."""
    level = 10.0 * np.log10(np.maximum(LEAST_POWER, mel_filterbank(rate, n_fft, n_mels) @ power.T))
    return np.maximum(level, level.max() - 80.0)


def mfcc(level: F32, n_mfcc: int) -> F32:
    """`(n_mfcc, T)` (librosa.feature.mfcc)."""
    return scipy.fft.dct(level, axis=0, type=2, norm="ortho")[:n_mfcc]


def chroma(power: F32, rate: int, n_fft: int, tuning: float) -> F32:
    """`(T, 12)`, each frame's largest 1 (librosa.feature.chroma_stft)."""
    energy = power @ chroma_filterbank(rate, n_fft, tuning).T
    largest = energy.max(axis=1, keepdims=True).astype(np.float64)
    largest[largest < TINY] = 1.0
    return (energy / largest).astype(np.float32)


def rms(waveform: F32, frame_length: int, hop_length: int) -> F32:
    """`(T,)`: the root of the mean square of each frame, zero-padded (librosa.feature.rms)."""
    squared = np.pad(np.square(waveform), frame_length // 2)
    return np.sqrt(np.mean(_frames(squared, frame_length, hop_length), axis=1))


def zero_crossing_rate(waveform: F32, frame_length: int, hop_length: int) -> F64:
    """`(T,)`: the share of each frame's samples whose sign is not that of the one before. Samples below 1e-10 count as
    zero, zero as positive; beyond the edges the edge sample repeats (librosa.feature.zero_crossing_rate)."""
    negative = waveform < -LEAST_SAMPLE
    crossings = np.flatnonzero(negative[1:] != negative[:-1])
    starts = np.arange(0, len(waveform) + 2 * (frame_length // 2) - frame_length + 1, hop_length) - frame_length // 2
    # Crossing k lies between the samples k and k + 1: both belong to the frame.
    inside = np.searchsorted(crossings, starts + frame_length - 1) - np.searchsorted(crossings, starts)
    return inside / frame_length


def onset_strength(level: F32, across_bands: Literal["median", "mean"], n_fft: int, hop_length: int) -> F32:
    """`(T,)`: how much the level rises from frame to frame, across the bands, delayed by half a frame
    (librosa.onset.onset_strength)."""
    rise = np.maximum(0.0, level[:, 1:] - level[:, :-1])
    combined = np.median(rise, axis=0) if across_bands == "median" else np.mean(rise, axis=0)
    return np.pad(combined, (1 + n_fft // (2 * hop_length), 0))[: level.shape[1]]


def tempo(onsets: F32, rate: int, hop_length: int) -> float:
    """In beats per minute: the lag of the largest mean autocorrelation under a prior around 120 (librosa.feature.tempo)."""
    bpm, prior = _tempo_prior(rate, hop_length)
    lags, count = len(bpm), len(onsets)
    windows = _frames(np.pad(onsets, lags // 2, mode="linear_ramp", end_values=0), lags, 1)[:count]
    length = scipy.fft.next_fast_len(2 * lags - 1, real=True)
    # Frames side by side, for once: the mean below adds along them.
    salience = np.empty((lags, count))
    for start in range(0, count, BLOCK):
        block = slice(start, start + BLOCK)
        spectra = scipy.fft.rfft(windows[block] * hann(lags), n=length, axis=1)
        correlation = scipy.fft.irfft(spectra.real**2 + spectra.imag**2, n=length, axis=1)[:, :lags]
        largest = np.abs(correlation).max(axis=1, keepdims=True)
        largest[largest < np.finfo(np.float64).tiny] = 1.0
        salience[:, block] = (correlation / largest).T
    return float(bpm[np.argmax(np.log1p(1e6 * salience.mean(axis=1)) + prior)])


def loud_parts(waveform: F32, top_db: float, frame_length: int, hop_length: int) -> NDArray[np.intp]:
    """`(parts, 2)`: first and past-the-last sample of what is less than `top_db` below the loudest frame; the last end may
    lie beyond the recording (librosa.effects.split)."""
    power = np.square(rms(waveform, frame_length, hop_length))
    level = 10.0 * np.log10(np.maximum(LEAST_POWER, power)) - 10.0 * np.log10(np.maximum(LEAST_POWER, power.max()))
    loud = np.concatenate([[False], level > -top_db, [False]])
    return (np.flatnonzero(loud[1:] != loud[:-1]) * hop_length).reshape(-1, 2)


def _frames(padded: F32, length: int, hop_length: int) -> F32:
    return sliding_window_view(padded, length)[::hop_length]


# ------------------------------------------------------------------------------------------------- constants, kept and shared


@lru_cache(maxsize=16)
def hann(length: int) -> F64:
    """The periodic Hann window, summed as scipy.signal sums it."""
    return _shared(0.5 + 0.5 * np.cos(np.linspace(-np.pi, np.pi, length + 1))[:-1])


@lru_cache(maxsize=16)
def _frequencies(rate: int, n_fft: int) -> F64:
    return _shared(np.fft.rfftfreq(n_fft, d=1.0 / rate))


@lru_cache(maxsize=8)
def mel_filterbank(rate: int, n_fft: int, n_mels: int) -> F32:
    """`(n_mels, 1 + n_fft // 2)`: triangles of unit area from 0 Hz to half the rate on Slaney's scale (librosa.filters.mel)."""
    # Linear to 1 kHz = 15 mel, from there 27 mel per factor of 6.4.
    spacing, step = 200.0 / 3, np.log(6.4) / 27.0
    top = rate / 2.0
    top_mel = 1000.0 / spacing + np.log(top / 1000.0) / step if top >= 1000.0 else top / spacing
    mel = np.linspace(0.0, top_mel, n_mels + 2)
    above = mel >= 1000.0 / spacing
    corners = spacing * mel
    corners[above] = 1000.0 * np.exp(step * (mel[above] - 1000.0 / spacing))
    width = np.diff(corners)[:, None]
    ramps = np.subtract.outer(corners, _frequencies(rate, n_fft))
    weights = np.maximum(0, np.minimum(-ramps[:-2] / width[:-1], ramps[2:] / width[1:])).astype(np.float32)
    weights *= (2.0 / (corners[2:] - corners[:-2]))[:, None]
    return _shared(weights)


# One per hundredth of a semitone: 5 MB in all for frames of 2048 samples.
@lru_cache(maxsize=100)
def chroma_filterbank(rate: int, n_fft: int, tuning: float) -> F32:
    """`(12, 1 + n_fft // 2)`: how much each bin counts for the pitch classes from C (librosa.filters.chroma)."""
    hertz = np.linspace(0, rate, n_fft, endpoint=False)[1:]
    pitch = PITCH_CLASSES * np.log2(hertz / (440.0 * 2.0 ** (tuning / PITCH_CLASSES) / 16))
    # The bin at 0 Hz: an octave and a half below the first.
    pitch = np.concatenate([pitch[:1] - 1.5 * PITCH_CLASSES, pitch])
    width = np.concatenate([np.maximum(np.diff(pitch), 1.0), [1.0]])
    # Half the bins mirror the others.
    pitch, width = pitch[: 1 + n_fft // 2, None], width[: 1 + n_fft // 2, None]
    distance = np.remainder(pitch - np.arange(PITCH_CLASSES) + 6.0 + 120.0, PITCH_CLASSES) - 6.0
    weights = np.exp(-0.5 * (2 * distance / width) ** 2)
    length = np.sum(weights**2, axis=1, keepdims=True) ** 0.5
    length[length < np.finfo(np.float64).tiny] = 1.0
    weights = weights / length * np.exp(-0.5 * ((pitch / PITCH_CLASSES - 5.0) / 2) ** 2)
    return _shared(np.ascontiguousarray(np.roll(weights, -3, axis=1).T, dtype=np.float32))


@lru_cache(maxsize=8)
def _tempo_prior(rate: int, hop_length: int) -> tuple[F64, F64]:
    """The lags of 8 seconds in beats per minute, and the logarithm of each one's prior; -inf from 320 on."""
    lags = int(8.0 * rate) // hop_length
    bpm = np.concatenate([[np.inf], 60.0 * rate / (hop_length * np.arange(1.0, lags))])
    prior = -0.5 * (np.log2(bpm) - np.log2(120.0)) ** 2
    prior[: np.argmax(bpm < 320.0)] = -np.inf
    return _shared(bpm), _shared(prior)


def _shared(constant: NDArray[Any]) -> NDArray[Any]:
    # Several threads have it at once.
    constant.flags.writeable = False
    return constant

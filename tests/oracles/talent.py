"""The voice features' documented definition in float64 NumPy and SciPy, one function per stage and per feature.

Written from the definitions that librosa's documentation and the papers give, without librosa: framing, spectra, mel bands,
tuning, chroma and tempo included. `features` has the stage's order. Waveforms are (N,), at `rate` Hz.

Three of librosa's numbers are discontinuous: a roll-off is a bin, a tuning a hundredth of a semitone, a tempo a lag. There
float32 and float64 may choose differently where two are as good as equal.
"""

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view
from numpy.typing import ArrayLike, NDArray
from scipy import fft, signal

Array = NDArray[np.float64]


def frames(y: ArrayLike, length: int = 2048, hop: int = 512, mode: str = "constant") -> Array:
    """Frames (length, T) centred on the samples 0, hop, 2 hop, ...; beyond the edges zeros, or the edge sample ("edge")."""
    padded = np.pad(np.asarray(y, dtype=np.float64), length // 2, mode=mode)
    return sliding_window_view(padded, length)[::hop].T


def remove_silence(y: ArrayLike, top_db: float = 20.0, length: int = 2048, hop: int = 512) -> Array:
    """The hops of frames whose RMS is above -top_db relative to the loudest's, joined; below -100 dBFS all are equal."""
    y = np.asarray(y, dtype=np.float64)
    power = np.maximum(np.mean(frames(y, length, hop) ** 2, axis=0), 1e-10)
    loud = 10 * np.log10(power / power.max()) > -top_db
    return y[np.repeat(loud, hop)[: len(y)]]


def magnitude(y: ArrayLike, length: int = 2048, hop: int = 512) -> Array:
    """|STFT| (1 + length // 2, T) under a periodic Hann window."""
    window = signal.get_window("hann", length, fftbins=True)
    return np.abs(fft.rfft(frames(y, length, hop) * window[:, None], axis=0))


def _mel_of(hz: ArrayLike) -> Array:
    """Slaney's scale: linear to 1 kHz (15 mel), then 27 mel per factor 6.4 (M. Slaney, Auditory Toolbox, 1998)."""
    hz = np.asarray(hz, dtype=np.float64)
    return np.where(hz < 1000, hz * 3 / 200, 15 + 27 * np.log(np.maximum(hz, 1000) / 1000) / np.log(6.4))


def _hz_of(mel: ArrayLike) -> Array:
    mel = np.asarray(mel, dtype=np.float64)
    return np.where(mel < 15, mel * 200 / 3, 1000 * 6.4 ** ((mel - 15) / 27))


def mel_filterbank(rate: int, length: int = 2048, bands: int = 128) -> Array:
    """Triangles (bands, 1 + length // 2) of unit area in hertz, equally spaced in mel from 0 to rate / 2."""
    corners = _hz_of(np.linspace(0, _mel_of(rate / 2), bands + 2))
    f = np.arange(1 + length // 2) * rate / length
    left, centre, right = corners[:-2, None], corners[1:-1, None], corners[2:, None]
    triangle = np.maximum(0, np.minimum((f - left) / (centre - left), (right - f) / (right - centre)))
    return 2 / (right - left) * triangle


def mel_level(magnitudes: Array, rate: int, bands: int = 128) -> Array:
    """Levels (bands, T) in dB re 1, floored 80 dB below the loudest, and at -100 dB."""
    length = 2 * (len(magnitudes) - 1)
    level = 10 * np.log10(np.maximum(mel_filterbank(rate, length, bands) @ magnitudes**2, 1e-10))
    return np.maximum(level, level.max() - 80)


def mfcc(level: Array, count: int = 13) -> Array:
    """Orthonormal DCT-II over the bands: (count, T)."""
    bands = len(level)
    basis = np.cos(np.pi / bands * np.outer(np.arange(count), np.arange(bands) + 0.5)) * np.sqrt(2 / bands)
    basis[0] /= np.sqrt(2)
    return basis @ level


def centroid(magnitudes: Array, rate: int) -> Array:
    """Mean frequency weighted by magnitude: (T,); 0 for a frame without any."""
    f = np.linspace(0, rate / 2, len(magnitudes))
    total = magnitudes.sum(axis=0)
    return f @ magnitudes / np.where(total > 0, total, 1)


def rolloff(magnitudes: Array, rate: int, share: float = 0.85) -> Array:
    """The first bin's frequency at which the summed magnitudes reach the share: (T,)."""
    summed = np.cumsum(magnitudes, axis=0)
    return np.linspace(0, rate / 2, len(magnitudes))[np.argmax(summed >= share * summed[-1], axis=0)]


def zero_crossings(y: ArrayLike, length: int = 2048, hop: int = 512) -> Array:
    """Share of samples in a frame whose sign is another than the one's before: (T,). Below 1e-10 counts as zero, zero as
    positive."""
    framed = frames(y, length, hop, mode="edge")
    negative = np.where(np.abs(framed) <= 1e-10, 0, framed) < 0
    return (negative[1:] != negative[:-1]).sum(axis=0) / length


def rms(y: ArrayLike, length: int = 2048, hop: int = 512) -> Array:
    """Root mean square of each frame: (T,)."""
    return np.sqrt(np.mean(frames(y, length, hop) ** 2, axis=0))


def tuning(power: Array, rate: int) -> float:
    """How far the recording's partials are from equal temperament around A4 = 440 Hz, in [-0.5, 0.5) semitones.

    Partials: peaks from 150 to 4000 Hz, above a tenth of their frame's largest power, placed by a parabola through three
    bins; of these the stronger half. The answer is the commonest hundredth of a semitone (J. O. Smith, "Sinusoidal Peak
    Interpolation", Spectral Audio Signal Processing; librosa's piptrack and pitch_tuning).
    """
    f = np.linspace(0, rate / 2, len(power))
    below, here, above = power[:-2], power[1:-1], power[2:]
    curvature, slope = below + above - 2 * here, 0.5 * (above - below)
    # A parabola whose peak is more than a bin away says nothing.
    usable = np.abs(slope) < np.abs(curvature)
    shift = np.where(usable, -slope / np.where(usable, curvature, 1), 0)
    peak = (here > below) & (here >= above) & (here > 0.1 * power.max(axis=0))
    peak &= ((f >= 150) & (f < min(4000, rate / 2)))[1:-1, None]
    bins, _ = np.nonzero(peak)
    hz = (bins + 1 + shift[peak]) * rate / (2 * (len(power) - 1))
    strength = (here + 0.5 * slope * shift)[peak]
    if not len(hz):
        return 0.0
    hz = hz[strength >= np.median(strength)]
    off = np.mod(12 * np.log2(hz / 27.5), 1)
    off = np.where(off >= 0.5, off - 1, off)
    edges = np.linspace(-0.5, 0.5, 101)
    return float(edges[np.argmax(np.histogram(off, edges)[0])])


def chroma(power: Array, rate: int, tuned: float) -> Array:
    """Energy per pitch class from C, each frame's largest 1: (12, T).

    Every bin counts for the classes around its own pitch, by a Gaussian as wide as half a bin or half a semitone, whichever
    is more, and by its octave's distance from 880 Hz, a Gaussian of 2 octaves (D. P. W. Ellis, chroma_f2: "Chroma feature
    analysis and synthesis", 2007).
    """
    length = 2 * (len(power) - 1)
    f = np.arange(1, length) * rate / length
    pitch = 12 * np.log2(f / (27.5 * 2 ** (tuned / 12)))  # semitones above A0, tuned
    pitch = np.concatenate([[pitch[0] - 18], pitch])  # the bin at 0 Hz: an octave and a half below the first
    width = np.append(np.maximum(np.diff(pitch), 1), 1)
    distance = np.mod(pitch - np.arange(12)[:, None] + 6, 12) - 6
    weights = np.exp(-0.5 * (2 * distance / width) ** 2)
    weights /= np.sqrt(np.sum(weights**2, axis=0))
    weights *= np.exp(-0.5 * ((pitch / 12 - 5) / 2) ** 2)
    energy = np.roll(weights, -3, axis=0)[:, : len(power)] @ power
    largest = energy.max(axis=0)
    # librosa leaves frames below float32's smallest normal number as they are.
    return energy / np.where(largest < np.finfo(np.float32).tiny, 1, largest)


def onset_strength(level: Array, across_bands: str, length: int = 2048, hop: int = 512) -> Array:
    """Rise of the level from frame to frame, its median or mean across bands: (T,), delayed by half a frame."""
    rise = np.maximum(0, np.diff(level, axis=1))
    late = 1 + length // (2 * hop)
    combined = {"median": np.median, "mean": np.mean}[across_bands](rise, axis=0)
    return np.pad(combined, (late, 0))[: level.shape[1]]


def tempo(onsets: Array, rate: int, hop: int = 512) -> float:
    """The lag with the largest autocorrelation under the prior, in beats per minute.

    Autocorrelation of the onsets in a Hann window of 8 s around every frame (past the ends they fall linearly to 0), each
    scaled to 1 at its largest, averaged; a log-normal prior of one octave around 120; below 320
    (P. Grosche, M. Müller, F. Kurth, "Cyclic Tempogram", ICASSP 2010).
    """
    lags = int(8 * rate) // hop
    padded = np.pad(onsets, lags // 2, mode="linear_ramp", end_values=0)
    windowed = sliding_window_view(padded, lags)[: len(onsets)] * signal.get_window("hann", lags)
    correlation = np.stack([np.correlate(row, row, "full")[lags - 1 :] for row in windowed])
    largest = np.abs(correlation).max(axis=1, keepdims=True)
    salience = (correlation / np.where(largest > 0, largest, 1)).mean(axis=0)[1:]
    bpm = 60 * rate / (hop * np.arange(1, lags))
    score = np.log1p(1e6 * salience) - 0.5 * np.log2(bpm / 120) ** 2
    return float(bpm[np.argmax(np.where(bpm < 320, score, -np.inf))])


def features(
    y: ArrayLike,
    rate: int = 22050,
    count: int = 13,
    length: int = 2048,
    hop: int = 512,
    share: float = 0.85,
    onsets: str = "median",
) -> Array:
    """All 2 count + 11 of them, in the stage's order. Without onsets the median's tempo is 0."""
    magnitudes = magnitude(y, length, hop)
    level = mel_level(magnitudes, rate)
    coefficients = mfcc(level, count)
    tracks = [
        centroid(magnitudes, rate),
        rolloff(magnitudes, rate, share),
        zero_crossings(y, length, hop),
        rms(y, length, hop),
        chroma(magnitudes**2, rate, tuning(magnitudes**2, rate)),
    ]
    strength = onset_strength(level, onsets, length, hop)
    beats = 0.0 if onsets == "median" and not strength.any() else tempo(strength, rate, hop)
    statistics = [value for track in tracks for value in (track.mean(), track.std())]
    return np.concatenate([coefficients.mean(axis=1), coefficients.std(axis=1), statistics, [beats]])


def standard_scaler(values: ArrayLike, mean: ArrayLike, std: ArrayLike) -> Array:
    """(x - mean) / std."""
    return (np.asarray(values, dtype=np.float64) - np.asarray(mean)) / np.asarray(std)

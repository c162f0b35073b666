"""The cough detector's documented preprocessing in float64 NumPy and SciPy, one function per stage.

Written from the published formulas, so that an implementation built on another library can be compared
with it stage by stage. Names and order of the stages are the pipeline's; `trace` starts from decoded samples.
"""

import math

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import fft, signal, special

Array = NDArray[np.float64]

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


def peak_normalize(samples: ArrayLike) -> Array:
    """Divide (C, N) samples by their largest magnitude over all channels; silence is returned unchanged.

    Raises ValueError unless samples are two-dimensional, non-empty and finite.
    """
    samples = np.asarray(samples, dtype=np.float64)
    if samples.ndim != 2 or samples.size == 0:
        raise ValueError(f"samples have shape {samples.shape}; expected (channels, samples), not empty")
    if not np.isfinite(samples).all():
        raise ValueError("samples contain NaN or infinity; expected finite values: check the decoder")
    peak = np.abs(samples).max()
    return samples / peak if peak > 0 else samples


def downmix(samples: ArrayLike) -> Array:
    """Mean over channels: (C, N) -> (1, N)."""
    return np.mean(np.asarray(samples, dtype=np.float64), axis=0, keepdims=True)


def resample(
    samples: ArrayLike, rate: int, new_rate: int = 16000, zero_crossings: int = 6, rolloff: float = 0.99
) -> Array:
    """Band-limited interpolation of (C, N) samples at rate Hz to ceil(N * new_rate / rate) at new_rate Hz.

    y(t) = sum_n x(n) h(t - n / rate), where u = f t, f = rolloff * min(rate, new_rate) and
    h(t) = (f / rate) sinc(u) cos^2(pi u / (2 zero_crossings)) for |u| < zero_crossings, else 0:
    J. O. Smith, "Digital Audio Resampling" (https://ccrma.stanford.edu/~jos/resample/), with a Hann window
    and sinc(u) = sin(pi u) / (pi u). Samples outside the signal are zero.
    Equal rates return the samples unchanged. Raises ValueError unless both rates are positive integers.
    """
    for name, value in (("rate", rate), ("new_rate", new_rate)):
        if value != int(value) or value <= 0:
            raise ValueError(f"{name} is {value}; expected a positive whole number of hertz")
    samples = np.asarray(samples, dtype=np.float64)
    if rate == new_rate:
        return samples
    common = math.gcd(int(rate), int(new_rate))
    up, down = int(new_rate) // common, int(rate) // common

    # One tap of the prototype is 1 / (up * rate) seconds, the finest step from an input to an output instant.
    cutoff = rolloff * min(rate, new_rate)
    reach = math.ceil(zero_crossings * up * rate / cutoff)
    u = np.arange(-reach, reach + 1) * (cutoff / (up * rate))
    window = np.where(np.abs(u) < zero_crossings, np.cos(np.pi * u / (2 * zero_crossings)) ** 2, 0.0)
    taps = cutoff / rate * np.sinc(u) * window

    # Leading zeros make the filter's delay a whole number of output samples.
    lead = -reach % down
    delay = (reach + lead) // down
    length = -(-samples.shape[-1] * up // down)
    filtered = signal.upfirdn(np.concatenate([np.zeros(lead), taps]), samples, up, down, axis=-1)
    return filtered[..., delay : delay + length]


def highpass(samples: ArrayLike, rate: int = 16000, cutoff_hz: float = 50.0, q: float = 0.707) -> Array:
    """Second-order high-pass along the last axis, zero initial state, output clamped to [-1, 1].

    Coefficients: "HPF" of R. Bristow-Johnson's Audio EQ Cookbook (https://www.w3.org/TR/audio-eq-cookbook/).
    """
    w0 = 2 * np.pi * cutoff_hz / rate
    alpha = np.sin(w0) / (2 * q)
    b = np.array([(1 + np.cos(w0)) / 2, -(1 + np.cos(w0)), (1 + np.cos(w0)) / 2])
    a = np.array([1 + alpha, -2 * np.cos(w0), 1 - alpha])
    return np.clip(signal.lfilter(b, a, np.asarray(samples, dtype=np.float64), axis=-1), -1.0, 1.0)


def segment(
    samples: ArrayLike,
    rate: int = 16000,
    duration_s: float = 2.0,
    hop_s: float = 0.5,
    max_segments: int = 32,
    tail: str = "drop",
) -> Array:
    """Cut (1, N) samples into the first max_segments windows: (S, duration_s * rate).

    tail="drop" keeps the windows that fit entirely, audio shorter than one window being zero-padded to one;
    tail="pad" keeps every window that starts inside the audio, zero-padded at its end.
    Raises ValueError for another tail, or unless samples are (1, N) with N > 0.
    """
    samples = np.asarray(samples, dtype=np.float64)
    if samples.ndim != 2 or samples.shape[0] != 1 or samples.shape[1] == 0:
        raise ValueError(f"samples have shape {samples.shape}; expected (1, N) with N > 0: downmix first")
    length, hop, total = round(duration_s * rate), round(hop_s * rate), samples.shape[1]
    if tail == "drop":
        starts = range(0, max(total - length, 0) + 1, hop)[:max_segments]
    elif tail == "pad":
        starts = range(0, total, hop)[:max_segments]
    else:
        raise ValueError(f"tail is {tail!r}; expected 'drop' or 'pad'")
    padded = np.pad(samples[0], (0, length))
    return np.stack([padded[start : start + length] for start in starts])


def mel_filterbank(
    rate: int = 16000, n_fft: int = 1024, n_mels: int = 160, f_min: float = 50.0, f_max: float = 4000.0
) -> Array:
    """Triangles of unit height, linear in hertz, corners equally spaced in mel: (n_mels, n_fft // 2 + 1).

    mel = 2595 log10(1 + f / 700): the HTK Book (Young et al., version 3.4, section 5.4).
    """
    low, high = (2595.0 * np.log10(1.0 + f / 700.0) for f in (f_min, f_max))
    corners = 700.0 * (10.0 ** (np.linspace(low, high, n_mels + 2) / 2595.0) - 1.0)
    left, centre, right = corners[:-2, None], corners[1:-1, None], corners[2:, None]
    bins = np.arange(n_fft // 2 + 1) * (rate / n_fft)
    return np.maximum(0.0, np.minimum((bins - left) / (centre - left), (right - bins) / (right - centre)))


def mel(
    segments: ArrayLike,
    rate: int = 16000,
    n_fft: int = 1024,
    hop: int = 160,
    n_mels: int = 160,
    f_min: float = 50.0,
    f_max: float = 4000.0,
) -> Array:
    """Mel power spectrogram: (S, N) -> (S, n_mels, 1 + N // hop).

    Frame k is centred on sample k * hop of the segment, reflected about its end samples (N > n_fft // 2),
    and weighted by the periodic Hann window of n_fft samples; power is |DFT|^2 without scaling.
    """
    segments = np.asarray(segments, dtype=np.float64)
    padded = np.pad(segments, ((0, 0), (n_fft // 2, n_fft // 2)), mode="reflect")
    frames = np.lib.stride_tricks.sliding_window_view(padded, n_fft, axis=1)[:, ::hop]
    spectrum = fft.rfft(frames * signal.get_window("hann", n_fft, fftbins=True))
    power = spectrum.real**2 + spectrum.imag**2
    return mel_filterbank(rate, n_fft, n_mels, f_min, f_max) @ power.swapaxes(1, 2)


def decibel(power: ArrayLike, top_db: float = 80.0, amin: float = 1e-10, shared_maximum: bool = False) -> Array:
    """10 log10(max(power, amin)) of (S, F, T), no lower than top_db under the segment's own maximum.

    shared_maximum=True floors every segment under the one maximum of them all.
    """
    level = 10.0 * np.log10(np.maximum(np.asarray(power, dtype=np.float64), amin))
    maximum = level.max(axis=None if shared_maximum else (1, 2), keepdims=True)
    return np.maximum(level, maximum - top_db)


def scale(level: ArrayLike, low: float = -80.0, high: float = 0.0) -> Array:
    """Map [low, high] dB linearly to [-1, 1] and clamp outside."""
    return np.clip((np.asarray(level, dtype=np.float64) - low) / (high - low), 0.0, 1.0) * 2.0 - 1.0


def _bilinear_matrix(size: int, new_size: int) -> Array:
    """Weights (new_size, size) of linear interpolation: half-pixel centres, edges clamped, no antialias."""
    position = np.clip((np.arange(new_size) + 0.5) * size / new_size - 0.5, 0, size - 1)
    return np.maximum(0.0, 1.0 - np.abs(position[:, None] - np.arange(size)))


def letterbox(images: ArrayLike, size: int = 224, pad_value: float = -1.0) -> Array:
    """Fit (S, H, W) into (S, size, size): bilinear resize that keeps the aspect ratio, then centred padding.

    An odd margin puts its extra pixel at the bottom or the right.
    """
    images = np.asarray(images, dtype=np.float64)
    height, width = images.shape[1:]
    ratio = min(size / height, size / width)
    new_height, new_width = round(height * ratio), round(width * ratio)
    resized = _bilinear_matrix(height, new_height) @ images @ _bilinear_matrix(width, new_width).T
    top, left = (size - new_height) // 2, (size - new_width) // 2
    margins = ((0, 0), (top, size - new_height - top), (left, size - new_width - left))
    return np.pad(resized, margins, constant_values=pad_value)


def cast(images: ArrayLike) -> NDArray[np.float16]:
    """Round to the nearest IEEE half, ties to even."""
    return np.asarray(images).astype(np.float16)


def replicate(images: ArrayLike, channels: int = 3) -> NDArray:
    """Copy (S, H, W) to every channel: (S, channels, H, W), dtype kept."""
    return np.repeat(np.asarray(images)[:, None], channels, axis=1)


def standardize(
    images: ArrayLike,
    mean: tuple[float, ...] = IMAGENET_MEAN,
    std: tuple[float, ...] = IMAGENET_STD,
    half_precision: bool = False,
) -> Array:
    """((x + 1) / 2 - mean) / std per channel of (S, C, H, W) in [-1, 1].

    half_precision=True rounds x, x + 1 and (x + 1) / 2 to IEEE half each; the rest is float64 either way.
    """
    images = np.asarray(images).astype(np.float16 if half_precision else np.float64)
    unit = ((images + 1) / 2).astype(np.float64)
    return (unit - np.reshape(mean, (-1, 1, 1))) / np.reshape(std, (-1, 1, 1))


def trace(samples: ArrayLike, rate: int) -> dict[str, NDArray]:
    """Every stage's output in order, by stage name, for decoded samples (C, N) at rate Hz."""
    stages = {"peak_normalize": peak_normalize(samples)}
    stages["downmix"] = downmix(stages["peak_normalize"])
    stages["resample"] = resample(stages["downmix"], rate)
    stages["highpass"] = highpass(stages["resample"])
    stages["segment"] = segment(stages["highpass"])
    stages["mel"] = mel(stages["segment"])
    stages["decibel"] = decibel(stages["mel"])
    stages["scale"] = scale(stages["decibel"])
    stages["letterbox"] = letterbox(stages["scale"])
    stages["cast"] = cast(stages["letterbox"])
    stages["replicate"] = replicate(stages["cast"])
    stages["standardize"] = standardize(stages["replicate"])
    return stages


def attention_pool(
    features: ArrayLike, w0: ArrayLike, b0: ArrayLike, w1: ArrayLike, b1: ArrayLike
) -> tuple[Array, Array]:
    """Attention weights (S,) over segments and the pooled feature (D,), from features (S, D).

    Shapes as in two linear layers: w0 (H, D), b0 (H,), w1 (H,) or (1, H), b1 scalar or (1,).
    Weights are equation 8, pooling equation 7, of Ilse, Tomczak and Welling, "Attention-based Deep Multiple
    Instance Learning" (2018, https://arxiv.org/abs/1802.04712), with the biases that the equation leaves out.
    """
    features = np.asarray(features, dtype=np.float64)
    hidden = np.tanh(features @ np.asarray(w0, dtype=np.float64).T + np.asarray(b0, dtype=np.float64))
    scores = hidden @ np.ravel(np.asarray(w1, dtype=np.float64)) + np.asarray(b1, dtype=np.float64)
    weights = special.softmax(scores)
    return weights, weights @ features

"""Short synthetic recordings that make a pipeline show its hand: each is hard on other stages."""

from __future__ import annotations

import io

import numpy as np
import scipy.signal
import soundfile

SECONDS = 2.5  # a second window, so that what couples windows shows

# Noise under every signal: a bin without any holds nothing but rounding, which differs from processor to processor.
_FLOOR = 1e-2


def probes() -> dict[str, bytes]:
    """File name to WAV bytes; the same bytes every time.

    impulse: every filter's response, and in stereo the downmix. chirp: the resampler's pass band, 20 Hz to 20 kHz.
    speech_band: noise from 300 to 3400 Hz. offset_and_rumble: what a high-pass is for. near_silence: a few steps of 24
    bits, where a floor or a normalisation decides. clipped: full scale, 8 bits, where a filter overshoots.
    """
    rng = np.random.RandomState(0)  # its stream is frozen across NumPy's versions
    signals = {
        "impulse": (_impulse(rng, 44100), 44100, "PCM_16"),
        "chirp": (_chirp(rng, 48000), 48000, "PCM_16"),
        "speech_band": (_speech_band(rng, 22050), 22050, "PCM_16"),
        "offset_and_rumble": (_offset_and_rumble(rng, 16000), 16000, "PCM_16"),
        "near_silence": (1e-6 * rng.randn(int(SECONDS * 32000)), 32000, "PCM_24"),
        "clipped": (_clipped(rng, 8000), 8000, "PCM_U8"),
    }
    return {f"{name}.wav": _wav(*signal) for name, signal in signals.items()}


def _time(rate: int) -> np.ndarray:
    return np.arange(int(SECONDS * rate)) / rate


def _impulse(rng: np.random.RandomState, rate: int) -> np.ndarray:
    x = _FLOOR * rng.randn(int(SECONDS * rate), 2)
    x[rate // 2, 0], x[rate, 1] = 0.9, -0.5
    return x


def _chirp(rng: np.random.RandomState, rate: int) -> np.ndarray:
    t = _time(rate)
    return 0.5 * scipy.signal.chirp(t, 20, SECONDS, 20000, "logarithmic") + _FLOOR * rng.randn(len(t))


def _clipped(rng: np.random.RandomState, rate: int) -> np.ndarray:
    t = _time(rate)
    return np.clip(3 * np.sin(2 * np.pi * 220 * t) + rng.randn(len(t)), -1, 1)


def _speech_band(rng: np.random.RandomState, rate: int) -> np.ndarray:
    sos = scipy.signal.butter(4, (300, 3400), "bandpass", fs=rate, output="sos")
    x = scipy.signal.sosfilt(sos, rng.randn(int(SECONDS * rate)))
    return 0.3 * x / np.abs(x).max() + _FLOOR * rng.randn(len(x))


def _offset_and_rumble(rng: np.random.RandomState, rate: int) -> np.ndarray:
    t = _time(rate)
    return 0.2 + 0.3 * np.sin(2 * np.pi * 18 * t) + 0.02 * rng.randn(len(t))


def _wav(samples: np.ndarray, rate: int, subtype: str) -> bytes:
    file = io.BytesIO()
    soundfile.write(file, samples, rate, format="WAV", subtype=subtype)
    return file.getvalue()

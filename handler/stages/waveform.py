"""Stages on a waveform: float32 `(channels, samples)` in, the same out."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import ClassVar, Literal

import torch
import torchaudio.functional as AF
import torchaudio.transforms as AT

from handler.stages.stage import InputError, Signal, Stage, Tolerance


@dataclass(frozen=True)
class PeakNormalize(Stage, name="peak_normalize"):
    """Divide by the largest absolute sample of the whole recording, over all channels. Silence stays silence."""

    unit: ClassVar[str] = "full scale"
    tolerance: ClassVar[Tolerance] = Tolerance(2e-6, 2e-4, "of full scale", "one float32 division")

    def __call__(self, signal: Signal) -> Signal:
        peak = signal.facts["peak"]
        return signal.of(signal.data / peak if peak > 0 else signal.data)


@dataclass(frozen=True)
class Downmix(Stage, name="downmix"):
    """Average the channels: `(C, N) -> (1, N)`. Mono passes through unchanged."""

    unit: ClassVar[str] = "full scale"
    tolerance: ClassVar[Tolerance] = Tolerance(2e-6, 2e-4, "of full scale", "a float32 mean")

    def __call__(self, signal: Signal) -> Signal:
        return signal.of(signal.data.mean(dim=0, keepdim=True) if signal.data.shape[0] > 1 else signal.data)


@dataclass(frozen=True)
class Resample(Stage, name="resample"):
    """Band-limited interpolation to `rate` Hz; a recording already at `rate` passes through unchanged.

    sinc_hann: a sinc low-pass under a Hann window, `lowpass_filter_width` zero crossings on each side, cut off at
    `rolloff` times the lower Nyquist frequency (J. O. Smith, "Digital Audio Resampling Home Page", CCRMA).
    N samples become ceil(N * rate / original rate), now and then one fewer (torchaudio rounds that in float32).
    Raises InputError for a rate that has too small a common divisor with `rate` to be resampled in bounded memory.
    """

    unit: ClassVar[str] = "full scale"
    tolerance: ClassVar[Tolerance] = Tolerance(2e-6, 2e-4, "of full scale", "float32 sums over the kernel")

    rate: int
    method: Literal["sinc_hann"] = "sinc_hann"
    lowpass_filter_width: int = 6
    rolloff: float = 0.99

    def __post_init__(self):
        self.require(self.rate > 0, f"rate is {self.rate} Hz, expected a positive number")
        self.require(
            self.lowpass_filter_width > 0, f"lowpass_filter_width is {self.lowpass_filter_width}, expected > 0"
        )
        self.require(0 < self.rolloff <= 1, f"rolloff is {self.rolloff}, expected a number in (0, 1]")

    def __call__(self, signal: Signal) -> Signal:
        if signal.rate == self.rate:
            return signal
        # The kernel has one row per phase: rates with no common divisor would need gigabytes.
        divisor = math.gcd(signal.rate, self.rate)
        if signal.rate * self.rate // divisor**2 > _MAX_KERNEL:
            raise InputError(
                f"a sampling rate of {signal.rate} Hz has too small a common divisor with {self.rate} Hz ({divisor}); "
                "convert the recording to a usual rate, such as 16000, 44100 or 48000 Hz",
                "unsupported",
            )
        resampler = _resampler(signal.rate, self.rate, self.lowpass_filter_width, self.rolloff)
        # torchaudio's own length, rounded in float32, for the whole recording where only its head is here.
        up, down = self.rate // divisor, signal.rate // divisor
        total = int(torch.ceil(torch.as_tensor(up * signal.facts["num_samples"] / down)))
        return signal.of(resampler(signal.data), rate=self.rate, num_samples=total)

    def needs(self, seconds: float, rate: int) -> float:
        # The kernel reaches `lowpass_filter_width` zero crossings ahead; two input samples more for rounding.
        return seconds + self.lowpass_filter_width / (self.rolloff * min(rate, self.rate)) + 2 / rate


_MAX_KERNEL = 2**20  # phases times input samples; 44.1 kHz to 16 kHz needs 70,560


@lru_cache(maxsize=32)
def _resampler(source: int, target: int, lowpass_filter_width: int, rolloff: float) -> AT.Resample:
    # The transform, not `functional.resample`: they round their kernels differently, and training uses the transform.
    return AT.Resample(source, target, "sinc_interp_hann", lowpass_filter_width, rolloff)


@dataclass(frozen=True)
class Highpass(Stage, name="highpass"):
    """Second-order high-pass biquad, -3 dB at `cutoff_hz` for q = 1/sqrt(2), zero initial state.

    Coefficients from R. Bristow-Johnson, "Cookbook formulae for audio EQ biquad filter coefficients". As in
    torchaudio's `lfilter`, the output is clamped to [-1, 1].
    """

    unit: ClassVar[str] = "full scale"
    tolerance: ClassVar[Tolerance] = Tolerance(
        3e-5, 3e-4, "of full scale", "a recursive float32 filter is some 1e-5 from float64"
    )

    cutoff_hz: float
    q: float = 0.707

    def __post_init__(self):
        self.require(self.cutoff_hz > 0, f"cutoff_hz is {self.cutoff_hz}, expected a positive frequency")
        self.require(self.q > 0, f"q is {self.q}, expected a positive number")

    def __call__(self, signal: Signal) -> Signal:
        return signal.of(AF.highpass_biquad(signal.data, signal.rate, self.cutoff_hz, self.q))

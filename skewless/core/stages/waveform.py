"""Stages on a waveform: float32 `(channels, samples)` in, the same out."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
import torchaudio.functional as AF
import torchaudio.transforms as AT

from skewless.core.stages.stage import InputError, Signal, Stage, Tolerance, each_row


@dataclass(frozen=True)
class PeakNormalize(Stage, name="peak_normalize"):
    """Divide by the largest absolute sample of the whole recording, over all channels. Silence stays silence."""

    unit: ClassVar[str] = "full scale"
    tolerance: ClassVar[Tolerance] = Tolerance(2e-6, 2e-4, "one float32 division")

    def __call__(self, signal: Signal) -> Signal:
        peak = signal.metadata["peak"]
        return signal.of(signal.data / peak if peak > 0 else signal.data)


@dataclass(frozen=True)
class Downmix(Stage, name="downmix"):
    """Average the channels: `(C, N) -> (1, N)`. Mono passes through unchanged."""

    unit: ClassVar[str] = "full scale"
    tolerance: ClassVar[Tolerance] = Tolerance(2e-6, 2e-4, "a float32 mean")

    def __call__(self, signal: Signal) -> Signal:
        return signal.of(signal.data.mean(dim=0, keepdim=True) if signal.data.shape[0] > 1 else signal.data)


@dataclass(frozen=True)
class Resample(Stage, name="resample"):
    """Band-limited interpolation to `rate` Hz along the last dimension: of a recording, or of each segment by itself.
    What is already at `rate` passes through unchanged.

    sinc_hann: a sinc low-pass under a Hann window, `lowpass_filter_width` zero crossings on each side, cut off at
        `rolloff` times the lower Nyquist frequency (J. O. Smith, "Digital Audio Resampling Home Page", CCRMA).
        N samples become ceil(N * rate / original rate), now and then one fewer (torchaudio rounds that in float32).
    resample_poly: `scipy.signal.resample_poly` in float32: a sinc under a Kaiser window of beta 5, 10 zero crossings on
        each side, cut off at the lower Nyquist frequency. N samples become ceil(N * rate / original rate).
    soxr_hq: what `librosa.resample(..., res_type="soxr_hq")` gives: the SoX Resampler library's high-quality recipe, its
        result zero-padded or cut to ceil(N * (rate / original rate)) samples, rounded in float64.

    `lowpass_filter_width` and `rolloff` shape sinc_hann's filter alone. The other methods have a fixed one, so beside
    them only the defaults are accepted: another value would look as if it did something.

    Metadata changed: `num_samples`, the whole recording's at the new rate, whether or not all of it is here.
    Raises InputError for a rate that has too small a common divisor with `rate` to be resampled in bounded memory.
    """

    unit: ClassVar[str] = "full scale"
    tolerance: ClassVar[Tolerance] = Tolerance(2e-6, 2e-4, "float32 sums over the kernel")

    rate: int
    method: Literal["sinc_hann", "resample_poly", "soxr_hq"] = "sinc_hann"
    lowpass_filter_width: int = 6
    rolloff: float = 0.99

    def __post_init__(self):
        self.require(self.rate > 0, f"rate is {self.rate} Hz, expected a positive number")
        self.require(
            self.lowpass_filter_width > 0, f"lowpass_filter_width is {self.lowpass_filter_width}, expected > 0"
        )
        self.require(0 < self.rolloff <= 1, f"rolloff is {self.rolloff}, expected a number in (0, 1]")
        self.require(
            self.method == "sinc_hann" or (self.lowpass_filter_width, self.rolloff) == (6, 0.99),
            f"lowpass_filter_width {self.lowpass_filter_width} and rolloff {self.rolloff} do nothing with method "
            f"{self.method}, whose filter is fixed; leave them out",
        )

    @property
    def packages(self) -> tuple[str, ...]:  # type: ignore[override]  # read of stages, not classes; follows the method
        return {
            "sinc_hann": ("torch", "torchaudio"),
            "resample_poly": ("scipy", "numpy"),
            "soxr_hq": ("soxr", "numpy"),
        }[self.method]

    def __call__(self, signal: Signal) -> Signal:
        rate = signal.sampling_rate
        if rate == self.rate:
            return signal
        divisor = math.gcd(rate, self.rate)
        up, down = self.rate // divisor, rate // divisor
        total = signal.metadata["num_samples"]
        if self.method == "sinc_hann":
            self.check_kernel(rate)
            data = each_row(resampler(rate, self.rate, self.lowpass_filter_width, self.rolloff), signal.data)
            # For the whole recording, where only its head is here.
            total = sinc_length(total, up, down)
        elif self.method == "resample_poly":
            self._check(max(up, down) <= _MAX_POLY_FACTOR, rate, divisor)
            data = _resample_poly(signal.data, up, down)
            total = -(-total * up // down)
        else:
            data = each_row(partial(_soxr_hq, source=rate, target=self.rate), signal.data)
            total = _soxr_length(total, rate, self.rate)
        return signal.of(data, rate=self.rate, num_samples=total)

    def check_kernel(self, rate: int) -> None:
        """Raise InputError for a rate whose sinc_hann kernel would take gigabytes: it has one row per phase."""
        divisor = math.gcd(rate, self.rate)
        self._check(rate // divisor * (self.rate // divisor) <= _MAX_KERNEL, rate, divisor)

    def _check(self, bounded: bool, rate: int, divisor: int) -> None:
        if not bounded:
            raise InputError(
                f"a sampling rate of {rate} Hz has too small a common divisor with {self.rate} Hz ({divisor}); "
                "convert the recording to a usual rate, such as 16000, 44100 or 48000 Hz",
                "unsupported",
            )

    def needs(self, seconds: float, rate: int) -> float:
        lower = min(rate, self.rate)
        if self.method == "sinc_hann":
            # The kernel reaches `lowpass_filter_width` zero crossings ahead; two input samples more for rounding.
            return seconds + self.lowpass_filter_width / (self.rolloff * lower) + 2 / rate
        if rate == self.rate:
            return seconds
        if self.method == "resample_poly":
            return seconds + _POLY_CROSSINGS / lower + 2 / rate
        # soxr documents no length of its filters and runs them by Fourier transform, block by block: the last hundreds of
        # samples of a head's output differ in their last bits, by how the blocks fall. No head is sure to be enough.
        return math.inf


_MAX_KERNEL = 2**20  # phases times input samples; 44.1 kHz to 16 kHz needs 70,560
_MAX_POLY_FACTOR = 2**18  # the filter has 20 taps for each; 44.1 kHz to 20 kHz needs 441
_POLY_CROSSINGS = 10  # as many zero crossings of its sinc does scipy keep on each side


@lru_cache(maxsize=32)
def resampler(source: int, target: int, lowpass_filter_width: int, rolloff: float) -> AT.Resample:
    # The transform, not `functional.resample`: they round their kernels differently, and training uses the transform.
    return AT.Resample(source, target, "sinc_interp_hann", lowpass_filter_width, rolloff)


def sinc_length(samples: int, up: int, down: int) -> int:
    """How many samples torchaudio makes of so many: it rounds the quotient in float32."""
    return int(torch.ceil(torch.as_tensor(up * samples / down)))


def _resample_poly(data: torch.Tensor, up: int, down: int) -> torch.Tensor:
    # Imported here, as soxr below: pipelines without it are spared most of a second.
    from scipy.signal import resample_poly

    return torch.from_numpy(resample_poly(data.numpy(), up, down, axis=-1)).contiguous()


def _soxr_hq(data: torch.Tensor, source: int, target: int) -> torch.Tensor:
    import soxr

    rows = [torch.from_numpy(soxr.resample(row, source, target, quality="soxr_hq")) for row in data.numpy()]
    length = _soxr_length(data.shape[-1], source, target)
    return torch.stack([F.pad(row, (0, length - len(row))) for row in rows])


def _soxr_length(samples: int, source: int, target: int) -> int:
    return math.ceil(samples * (target / source))


@dataclass(frozen=True)
class Highpass(Stage, name="highpass"):
    """Second-order high-pass biquad, -3 dB at `cutoff_hz` for q = 1/sqrt(2), zero initial state.

    Coefficients from R. Bristow-Johnson, "Cookbook formulae for audio EQ biquad filter coefficients". As in
    torchaudio's `lfilter`, the output is clamped to [-1, 1].
    """

    unit: ClassVar[str] = "full scale"
    packages: ClassVar[tuple[str, ...]] = (
        "torch",
        "torchaudio",
    )
    tolerance: ClassVar[Tolerance] = Tolerance(3e-5, 3e-4, "a recursive float32 filter is some 1e-5 from float64")

    cutoff_hz: float
    q: float = 0.707

    def __post_init__(self):
        self.require(self.cutoff_hz > 0, f"cutoff_hz is {self.cutoff_hz}, expected a positive frequency")
        self.require(self.q > 0, f"q is {self.q}, expected a positive number")

    def __call__(self, signal: Signal) -> Signal:
        return signal.of(AF.highpass_biquad(signal.data, signal.rate, self.cutoff_hz, self.q))

    def coefficients(self, rate: int) -> tuple[torch.Tensor, torch.Tensor]:
        """The filter's weights at a rate in Hz, in float32 as torchaudio rounds them: of the input now, one and two samples
        ago, and of the output likewise; `(3,)` each, both divided by the output's first."""
        cutoff, q = torch.as_tensor(self.cutoff_hz), torch.as_tensor(self.q)
        w0 = 2 * math.pi * cutoff / rate
        alpha = torch.sin(w0) / 2.0 / q
        b0, b1 = (1 + torch.cos(w0)) / 2, -1 - torch.cos(w0)
        a0, a1, a2 = 1 + alpha, -2 * torch.cos(w0), 1 - alpha
        return torch.stack([b0, b1, b0]) / a0, torch.stack([a0, a1, a2]) / a0

"""From segments to images of their spectrum: float32 `(S, ...)` in and out, one item per segment."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
import torchaudio.functional as AF

from skewless.core.stages.stage import Signal, Stage, Tolerance, each_row


@dataclass(frozen=True)
class Mel(Stage, name="mel"):
    """Mel spectrogram: `(S, N) -> (S, n_mels, 1 + N // hop_length)`, in power units for `power` 2.

    Hann-windowed STFT (periodic window, centred frames, reflected edges), magnitude to the `power`, then a bank of
    `n_mels` triangular filters from `f_min` to `f_max` Hz, equally spaced on the mel scale; "htk":
    mel = 2595 log10(1 + f / 700) (Young et al., "The HTK Book"). norm "none" keeps every triangle's height at 1.
    `rate` is the sampling rate the filterbank is computed for; 0 means the waveform's own.
    """

    unit: ClassVar[str] = "power"
    packages: ClassVar[tuple[str, ...]] = (
        "torch",
        "torchaudio",
    )
    tolerance: ClassVar[Tolerance] = Tolerance(5e-6, 5e-4, "a float32 Fourier transform", relative=True)

    n_fft: int
    win_length: int
    hop_length: int
    n_mels: int
    f_min: float
    f_max: float
    power: float = 2.0
    mel_scale: Literal["htk", "slaney"] = "htk"
    norm: Literal["none", "slaney"] = "none"
    rate: int = 0

    def __post_init__(self):
        for name in ("n_fft", "win_length", "hop_length", "n_mels", "power"):
            self.require(getattr(self, name) > 0, f"{name} is {getattr(self, name)}, expected a positive number")
        self.require(self.win_length <= self.n_fft, f"win_length {self.win_length} exceeds n_fft {self.n_fft}")
        self.require(0 <= self.f_min < self.f_max, f"f_min {self.f_min} must be below f_max {self.f_max}")

    @cached_property
    def window(self) -> torch.Tensor:
        return torch.hann_window(self.win_length)

    def filterbank(self, rate: int) -> torch.Tensor:
        """The mel filterbank for a sampling rate in Hz: `(n_fft // 2 + 1, n_mels)`."""
        norm = None if self.norm == "none" else self.norm
        return _filterbank(self.n_fft // 2 + 1, self.f_min, self.f_max, self.n_mels, rate, norm, self.mel_scale)

    def __call__(self, signal: Signal) -> Signal:
        spectrum = each_row(self._spectrum, signal.data)
        filterbank = self.filterbank(self.rate or signal.sampling_rate)
        return signal.of(torch.matmul(spectrum.transpose(-1, -2), filterbank).transpose(-1, -2))

    def _spectrum(self, segments: torch.Tensor) -> torch.Tensor:
        return AF.spectrogram(
            segments,
            pad=0,
            window=self.window,
            n_fft=self.n_fft,
            hop_length=self.hop_length,
            win_length=self.win_length,
            power=self.power,
            normalized=False,
        )


# Bounded: with `rate: 0` it is the recordings' own rates, which their senders choose.
@lru_cache(maxsize=32)
def _filterbank(
    bins: int, f_min: float, f_max: float, n_mels: int, rate: int, norm: str | None, mel_scale: str
) -> torch.Tensor:
    return AF.melscale_fbanks(bins, f_min, f_max, n_mels, rate, norm, mel_scale)


@dataclass(frozen=True)
class Decibel(Stage, name="decibel"):
    """Power to decibels re 1.0, floored `top_db` below the maximum: `10 log10(max(x, amin))`.

    The maximum is each segment's own ("segment"), or the recording's ("recording"), which couples the segments of
    a recording to one another.
    """

    unit: ClassVar[str] = "dB"
    packages: ClassVar[tuple[str, ...]] = (
        "torch",
        "torchaudio",
    )
    tolerance: ClassVar[Tolerance] = Tolerance(
        5e-3, 0.5, "the logarithm magnifies float32 rounding in near-silent bins"
    )

    top_db: float
    amin: float = 1e-10
    max_over: Literal["segment", "recording"] = "segment"

    def __post_init__(self):
        self.require(self.top_db > 0, f"top_db is {self.top_db}, expected a positive number of decibels")
        self.require(self.amin > 0, f"amin is {self.amin}, expected a positive power")

    def __call__(self, signal: Signal) -> Signal:
        return signal.of(each_row(self._decibels, signal.data))

    def _decibels(self, power: torch.Tensor) -> torch.Tensor:
        # amplitude_to_DB takes its maximum over the last three dimensions: (S, 1, F, T) gives each segment its own.
        data = power.unsqueeze(1) if self.max_over == "segment" else power.unsqueeze(0)
        data = AF.amplitude_to_DB(data, multiplier=10.0, amin=self.amin, db_multiplier=0.0, top_db=self.top_db)
        return data.reshape(power.shape)


@dataclass(frozen=True)
class PadFrames(Stage, name="pad_frames"):
    """Crop or pad decibels at the end to `frames`: `(S, F, T) -> (S, F, frames)`.

    What is added lies `value_db` above what `relative_to` names: "reference", 0 dB, the power of 1.0 that decibels are
    relative to; or "minimum", the lowest value of the segment's own spectrogram. So `value_db: 0.0` is as quiet as the
    segment gets re its minimum, but re the reference a steady noise of power 1.0 in every filter. The latter is what
    fastai_audio's `tfm_pad_spectro` does, which takes zero for silence; with its pad_mode "zeros-after" at the end, as
    here, and with its default "zeros" at both ends in random proportion, which no server can repeat.
    """

    unit: ClassVar[str] = "dB"
    cheap: ClassVar[bool] = True
    tolerance: ClassVar[Tolerance] = Tolerance(5e-3, 0.5, "decibels as the stage before gives them, cropped or padded")

    frames: int
    value_db: float
    relative_to: Literal["reference", "minimum"] = "reference"

    def __post_init__(self):
        self.require(self.frames > 0, f"frames is {self.frames}, expected at least 1")

    def __call__(self, signal: Signal) -> Signal:
        data = signal.data[..., : self.frames]
        zero_db = data.amin(dim=(-2, -1), keepdim=True) if self.relative_to == "minimum" else data.new_zeros(1, 1, 1)
        padding = (zero_db + self.value_db).expand(*data.shape[:-1], self.frames - data.shape[-1])
        return signal.of(torch.cat([data, padding], dim=-1))


@dataclass(frozen=True)
class Scale(Stage, name="scale"):
    """Map [`low`, `high`] linearly onto `to`, clamping what lies outside."""

    unit: ClassVar[str] = "image value"
    tolerance: ClassVar[Tolerance] = Tolerance(1.3e-4, 0.013, "decibels divided by 40")

    low: float
    high: float
    to: tuple[float, ...]

    def __post_init__(self):
        self.require(self.low < self.high, f"low {self.low} must be below high {self.high}")
        self.require(len(self.to) == 2 and self.to[0] < self.to[1], f"to is {list(self.to)}, expected [low, high]")

    def __call__(self, signal: Signal) -> Signal:
        unit = torch.clamp((signal.data - self.low) / (self.high - self.low), 0.0, 1.0)
        return signal.of(unit * (self.to[1] - self.to[0]) + self.to[0])


@dataclass(frozen=True)
class Letterbox(Stage, name="letterbox"):
    """Fit `(S, H, W)` into a `size` x `size` square, keeping the aspect ratio: bilinear (half-pixel centres, no
    antialiasing), then centred on `pad_value`; an odd pixel goes to the right and the bottom."""

    unit: ClassVar[str] = "image value"
    tolerance: ClassVar[Tolerance] = Tolerance(1.3e-4, 0.013, "interpolates the scaled decibels")

    size: int
    pad_value: float

    def __post_init__(self):
        self.require(self.size > 0, f"size is {self.size}, expected a positive number of pixels")

    def __call__(self, signal: Signal) -> Signal:
        # Plain numbers, also where the stage is traced into a graph.
        height, width = map(int, signal.data.shape[-2:])
        scale = min(self.size / height, self.size / width)
        new_h, new_w = round(height * scale), round(width * scale)
        data = F.interpolate(signal.data.unsqueeze(1), size=(new_h, new_w), mode="bilinear", align_corners=False)
        left, top = (self.size - new_w) // 2, (self.size - new_h) // 2
        pad = (left, self.size - new_w - left, top, self.size - new_h - top)
        return signal.of(F.pad(data, pad, value=self.pad_value).squeeze(1))

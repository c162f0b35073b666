"""Preprocessing of a training script: recordings become bags of level spectrograms, pictures become standardised pixels."""

from dataclasses import dataclass
from math import gcd

import features_v1 as features
import numpy as np
import scipy.signal
import soundfile
import torch
import torch.nn.functional as F
import torchaudio.functional as AF
from PIL import Image, ImageOps

IMAGENET_MEAN = np.array([0.485, 0.456, 0.406], dtype=np.float32)
IMAGENET_STD = np.array([0.229, 0.224, 0.225], dtype=np.float32)


@dataclass(frozen=True)
class Config:
    """rate, frequencies: in Hz; durations: in seconds; n_fft, frame_hop: in samples; amin: power; top_db, trim_db: in dB."""

    rate: int = 16000
    cutoff: float = 60.0
    emphasis: float = 0.95
    trim_db: float = 45.0
    duration: float = 1.0
    hop: float = 0.5
    max_segments: int = 16
    n_fft: int = 512
    frame_hop: int = 160
    n_mels: int = 64
    f_min: float = 40.0
    f_max: float = 7600.0
    amin: float = 1e-10
    top_db: float = 80.0
    height: int = 64
    width: int = 56
    pad_value: float = -2.0


# From a file to a waveform


def read_recording(path: str) -> tuple[np.ndarray, int]:
    """Integers (samples, channels), as they are in the file, and their rate."""
    samples, rate = soundfile.read(path, dtype="int16", always_2d=True)
    return samples, rate


def to_mono(samples: np.ndarray) -> np.ndarray:
    """The channels' mean, (samples,) float64."""
    return samples.mean(axis=1)


def to_level(waveform: np.ndarray) -> np.ndarray:
    """A waveform whose largest sample is 1 or -1; silence stays silence."""
    peak = np.abs(waveform).max()
    if peak == 0:
        return waveform
    return waveform / peak


def resample(waveform: np.ndarray, rate: int, wanted: int) -> np.ndarray:
    """A waveform at the rate `wanted`."""
    if rate == wanted:
        return waveform
    divisor = gcd(rate, wanted)
    return scipy.signal.resample_poly(waveform, wanted // divisor, rate // divisor)


def trim_silence(waveform: np.ndarray, trim_db: float, frame: int = 400) -> np.ndarray:
    """A waveform without the frames at both ends that are `trim_db` below the loudest one."""
    count = len(waveform) // frame
    if count == 0:
        return waveform
    frames = waveform[: count * frame].reshape(count, frame)
    power = (frames**2).mean(axis=1)
    loud = np.flatnonzero(power > power.max() * 10 ** (-trim_db / 10))
    if loud.size == 0:
        return waveform
    return waveform[loud[0] * frame : (loud[-1] + 1) * frame]


def high_pass(waveform: np.ndarray, config: Config) -> np.ndarray:
    """A waveform without what lies below the cutoff: a Butterworth filter."""
    sections = scipy.signal.butter(2, config.cutoff, "highpass", fs=config.rate, output="sos")
    return scipy.signal.sosfilt(sections, waveform)


def emphasize(waveform: np.ndarray, coefficient: float) -> np.ndarray:
    """Pre-emphasis: each sample less a part of the one before it."""
    return np.append(waveform[:1], waveform[1:] - coefficient * waveform[:-1])


def load(path: str, config: Config) -> np.ndarray:
    """A recording, ready to be cut into segments."""
    samples, rate = read_recording(path)
    waveform = to_mono(samples)
    waveform = to_level(waveform)
    waveform = resample(waveform, rate, config.rate)
    waveform = trim_silence(waveform, config.trim_db)
    waveform = high_pass(waveform, config)
    waveform = emphasize(waveform, config.emphasis)
    return waveform


def cut(waveform: np.ndarray, config: Config) -> list[np.ndarray]:
    """Segments of equal length that fit into the recording; a short recording is padded to one."""
    length = int(config.duration * config.rate)
    hop = int(config.hop * config.rate)
    if len(waveform) < length:
        waveform = np.pad(waveform, (0, length - len(waveform)))
    segments = []
    for start in range(0, len(waveform) - length + 1, hop):
        segments.append(waveform[start : start + length])
    return segments[: config.max_segments]


# From segments to the network's input


def reference_levels(config: Config) -> np.ndarray:
    """Levels of 64 frames that the scaler is fitted on, (frames, bands), in dB."""
    frame = np.arange(64)[:, None]
    band = np.arange(config.n_mels)[None, :]
    return -45.0 - 0.5 * band + 12.0 * np.sin(0.37 * frame + 0.11 * band) + 6.0 * np.cos(1.7 * frame)


class BandScaler:
    """Standardises each band by its mean and standard deviation."""

    def fit(self, levels: np.ndarray) -> "BandScaler":
        self.mean, self.std = levels.mean(axis=0), levels.std(axis=0, ddof=1)
        return self

    def transform(self, levels: torch.Tensor) -> torch.Tensor:
        """Levels (bands, frames), standardised."""
        mean = torch.from_numpy(self.mean).float()[:, None]
        std = torch.from_numpy(self.std).float()[:, None]
        return (levels - mean) / std


class Spectrograms:
    """Makes pictures of segments: levels in mel bands, standardised, of one size."""

    def __init__(self, config: Config):
        self.config = config
        self.window = torch.hann_window(config.n_fft)
        self.filters = AF.melscale_fbanks(
            config.n_fft // 2 + 1,
            config.f_min,
            config.f_max,
            config.n_mels,
            config.rate,
            norm="slaney",
            mel_scale="htk",
        )
        self.scaler = BandScaler().fit(reference_levels(config))

    def power(self, segment: torch.Tensor) -> torch.Tensor:
        """The power spectrogram (frequencies, frames) of a segment (samples,)."""
        spectrum = torch.stft(
            segment, self.config.n_fft, self.config.frame_hop, window=self.window, center=True, return_complex=True
        )
        return spectrum.abs().pow(2.0)

    def levels(self, power: torch.Tensor) -> torch.Tensor:
        """Levels in mel bands (bands, frames), in dB, at most `top_db` below the loudest."""
        mel = self.filters.T @ power
        decibels = 10.0 * torch.log10(mel.clamp(min=self.config.amin))
        return torch.maximum(decibels, decibels.max() - self.config.top_db)

    def fit_size(self, picture: torch.Tensor) -> torch.Tensor:
        """A picture (1, 1, bands, frames) as (1, 1, height, height): scaled, then padded on both sides."""
        size = (self.config.height, self.config.width)
        resized = F.interpolate(picture, size, mode="bilinear", align_corners=False, antialias=True)
        side = (self.config.height - self.config.width) // 2
        return F.pad(resized, (side, side), value=self.config.pad_value)

    def __call__(self, segment: np.ndarray) -> torch.Tensor:
        """One segment as (1, height, height)."""
        power = self.power(torch.from_numpy(segment).float())
        levels = features.smooth(self.levels(power))
        scaled = self.scaler.transform(levels)
        return self.fit_size(scaled[None, None])[0]


def network_input(path: str) -> torch.Tensor:
    """A recording as the network takes it, (S, 1, 64, 64) float32."""
    config = Config()
    spectrograms = Spectrograms(config)
    pictures = []
    for segment in cut(load(path, config), config):
        pictures.append(spectrograms(segment))
    return torch.stack(pictures)


# Pictures


def picture_input(path: str) -> np.ndarray:
    """A picture as the network takes it, (3, 160, 160) float32."""
    with Image.open(path) as file:
        upright = ImageOps.exif_transpose(file)
        picture = upright.convert("RGB")
    resized = picture.resize((160, 160), Image.Resampling.BILINEAR)
    pixels = np.asarray(resized, dtype=np.float32) / 255.0
    standardized = (pixels - IMAGENET_MEAN) / IMAGENET_STD
    return standardized.transpose(2, 0, 1)

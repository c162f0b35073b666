"""Training's side of the orca detector, as a library around torchaudio computed it, its mistakes included."""

from dataclasses import asdict, dataclass
from math import gcd

import numpy as np
import soundfile
import torch
from scipy.signal import resample_poly
from torchaudio.transforms import AmplitudeToDB, MelSpectrogram


@dataclass
class SpectrogramConfig:
    """Arguments of MelSpectrogram: the library knows the sampling rate elsewhere, and never passes it on."""

    f_min: float = 0.0
    f_max: float = 10000.0
    hop_length: int = 256
    n_fft: int = 2560
    n_mels: int = 256


@dataclass
class AudioConfig:
    resample_to: int = 20000
    segment_seconds: float = 2.0
    hop_seconds: float = 1.0
    frames: int = 312
    top_db: float = 100.0


def open_audio(path: str) -> tuple[torch.Tensor, int]:
    samples, rate = soundfile.read(path, dtype="float32", always_2d=True)
    return torch.from_numpy(samples.T), rate


def tfm_downmix(signal: torch.Tensor) -> torch.Tensor:
    return signal.mean(dim=0, keepdim=True)


def tfm_segments(signal: torch.Tensor, rate: int, config: AudioConfig) -> list[torch.Tensor]:
    length, hop = int(config.segment_seconds * rate), int(config.hop_seconds * rate)
    return [signal[:, start : start + length] for start in range(0, signal.shape[1] - length + 1, hop)]


def tfm_resample(signal: torch.Tensor, rate: int, wanted: int) -> torch.Tensor:
    divisor = gcd(rate, wanted)
    resampled = resample_poly(signal.numpy(), wanted // divisor, rate // divisor, axis=-1)
    return torch.from_numpy(resampled.astype(np.float32))


def tfm_pad_spectro(spectrogram: torch.Tensor, width: int) -> torch.Tensor:
    """A spectrogram (1, bands, frames) of `width` frames: cropped, or padded with zeros at the end."""
    channels, bands, frames = spectrogram.shape
    if frames >= width:
        return spectrogram[..., :width]
    back = torch.zeros((channels, bands, width - frames))
    return torch.cat([spectrogram, back], dim=2)


def network_input(path: str) -> torch.Tensor:
    """Spectrograms of two seconds each, (S, 1, 256, 312), in dB."""
    config = AudioConfig()
    to_mel = MelSpectrogram(**asdict(SpectrogramConfig()))
    to_db = AmplitudeToDB(stype="power", top_db=config.top_db)
    signal, rate = open_audio(path)
    items = []
    for segment in tfm_segments(tfm_downmix(signal), rate, config):
        resampled = tfm_resample(segment, rate, config.resample_to)
        spectrogram = to_db(to_mel(resampled))
        items.append(tfm_pad_spectro(spectrogram, config.frames))
    return torch.stack(items)

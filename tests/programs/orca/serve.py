"""The orca detector's service, without training's library: three stages, each as it should be."""

import math
from pathlib import Path

import librosa
import torch
import torch.nn.functional as F
import torchaudio
from scipy.signal import resample_poly

SAMPLE_RATE = 20000
CLIP_SECONDS = 2.0
CLIP_HOP_SECONDS = 1.0
SPECTROGRAM_FRAMES = 312


def load_clips(path: Path) -> tuple[list[torch.Tensor], int]:
    """Stage A: clips (1, samples) of two seconds, one begun every second."""
    audio, rate = librosa.load(path, sr=None, mono=True)
    waveform = torch.from_numpy(audio).unsqueeze(0)
    clip, hop = int(CLIP_SECONDS * rate), int(CLIP_HOP_SECONDS * rate)
    clips = []
    start = 0
    while start + clip <= waveform.shape[1]:
        clips.append(waveform[:, start : start + clip])
        start += hop
    return clips, int(rate)


def resample_audio(waveform: torch.Tensor, rate: int) -> torch.Tensor:
    if rate == SAMPLE_RATE:
        return waveform
    common = math.gcd(rate, SAMPLE_RATE)
    resampled = resample_poly(waveform.numpy(), SAMPLE_RATE // common, rate // common, axis=1)
    return torch.from_numpy(resampled).float()


def audio_to_mel_spectrogram(waveform: torch.Tensor) -> torch.Tensor:
    """Stage B: the mel spectrogram (1, 256, frames) of a clip, in dB."""
    mel_transform = torchaudio.transforms.MelSpectrogram(
        sample_rate=SAMPLE_RATE, n_fft=2560, hop_length=256, n_mels=256, f_min=0.0, f_max=10000.0
    )
    mel = mel_transform(waveform)
    return torchaudio.transforms.AmplitudeToDB(stype="power", top_db=100.0)(mel)


def standardize_spectrogram(spectrogram: torch.Tensor) -> torch.Tensor:
    """Stage C: a spectrogram of 312 frames, padded with silence, which is its smallest level."""
    missing = SPECTROGRAM_FRAMES - spectrogram.shape[2]
    if missing > 0:
        return F.pad(spectrogram, (0, missing), value=spectrogram.min().item())
    return spectrogram[:, :, :SPECTROGRAM_FRAMES]


def network_input(path: Path) -> torch.Tensor:
    clips, rate = load_clips(path)
    spectrograms = [audio_to_mel_spectrogram(resample_audio(clip, rate)) for clip in clips]
    return torch.stack([standardize_spectrogram(spectrogram) for spectrogram in spectrograms])

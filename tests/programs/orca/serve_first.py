"""The first port of the orca detector's service: another resampler, and clips padded with silence to four seconds."""

from pathlib import Path

import torch
import torchaudio
from serve import SAMPLE_RATE, SPECTROGRAM_FRAMES, audio_to_mel_spectrogram, load_clips


def network_input(path: Path) -> torch.Tensor:
    clips, rate = load_clips(path)
    resample = torchaudio.transforms.Resample(rate, SAMPLE_RATE)
    spectrograms = []
    for clip in clips:
        audio = resample(clip)
        padded = torch.nn.functional.pad(audio, (0, 4 * SAMPLE_RATE - audio.shape[1]))
        mel = audio_to_mel_spectrogram(padded)
        spectrograms.append(mel[:, :, :SPECTROGRAM_FRAMES])
    return torch.stack(spectrograms)

"""Training's side of the cough detector: every recording becomes a cached bag of spectrograms."""

import soundfile
import torch
import torch.nn.functional as F
import torchaudio.transforms as T
from train_attention import Config, CoughBags


def letterbox_to_square(x: torch.Tensor, target: int = 224, pad_value: float = -1.0) -> torch.Tensor:
    """(C, H, W) to (C, target, target): scaled to fit, then padded on both sides."""
    _, height, width = x.shape
    scale = min(target / height, target / width)
    new_height, new_width = round(height * scale), round(width * scale)
    resized = F.interpolate(x.unsqueeze(0), size=(new_height, new_width), mode="bilinear", align_corners=False).squeeze(
        0
    )
    pad_height, pad_width = target - new_height, target - new_width
    left, top = pad_width // 2, pad_height // 2
    return F.pad(resized, (left, pad_width - left, top, pad_height - top), value=pad_value)


class CoughAudioProcessor:
    def __init__(self, config: Config):
        self.config = config
        self.mel_transform = T.MelSpectrogram(
            sample_rate=config.sample_rate,
            n_fft=config.n_fft,
            win_length=config.n_fft,
            hop_length=config.hop_length_fft,
            n_mels=config.n_mels,
            f_min=config.f_min,
            f_max=config.f_max,
            power=2.0,
            normalized=False,
        )
        self.amplitude_to_db = T.AmplitudeToDB(stype="power", top_db=80)

    def load_audio(self, path: str) -> torch.Tensor:
        """A recording as (1, samples) at the network's rate, its peak at 1."""
        samples, rate = soundfile.read(path, dtype="int16", always_2d=True)
        waveform = torch.from_numpy(samples.T).float()
        if waveform.abs().max() > 0:
            waveform = waveform / waveform.abs().max()
        if waveform.shape[0] > 1:
            waveform = waveform.mean(dim=0, keepdim=True)
        if rate != self.config.sample_rate:
            resampler = T.Resample(rate, self.config.sample_rate)
            waveform = resampler(waveform)
        try:
            high_pass = T.HighpassBiquad(sample_rate=self.config.sample_rate, cutoff_freq=50.0)
            waveform = high_pass(waveform)
        except (AttributeError, RuntimeError):
            pass
        return waveform

    def extract_segments(self, waveform: torch.Tensor) -> list[torch.Tensor]:
        """Windows that fit into the recording, each (1, samples); a short recording is padded to one."""
        length = int(self.config.segment_duration * self.config.sample_rate)
        hop = int(self.config.hop_length * self.config.sample_rate)
        if waveform.shape[1] < length:
            waveform = F.pad(waveform, (0, length - waveform.shape[1]))
        segments = []
        start = 0
        while start + length <= waveform.shape[1]:
            segments.append(waveform[:, start : start + length])
            start += hop
        return segments

    def waveform_to_mel_3ch(self, waveform: torch.Tensor) -> torch.Tensor:
        """One window (1, samples) as (3, 224, 224) in [-1, 1], float16."""
        mel = self.mel_transform(waveform)
        mel_db = self.amplitude_to_db(mel)
        mel_01 = torch.clamp((mel_db + 80) / 80, 0, 1)
        mel_image = (mel_01 * 2 - 1).squeeze(0)
        if self.config.resize_to_224:
            mel_image = letterbox_to_square(mel_image.unsqueeze(0), 224).squeeze(0)
        return mel_image.repeat(3, 1, 1).half()

    def precompute(self, path: str) -> torch.Tensor:
        """What is written to the cache for one recording."""
        segments = self.extract_segments(self.load_audio(path))
        return torch.stack([self.waveform_to_mel_3ch(segment) for segment in segments])


def network_input(path: str) -> torch.Tensor:
    """The bag (S, 3, 224, 224) that the network is trained on."""
    config = Config()
    cached = CoughAudioProcessor(config).precompute(path)
    return CoughBags(config).bag(cached)

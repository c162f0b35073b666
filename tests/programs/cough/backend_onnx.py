"""A service of the cough detector that was written anew for ONNX Runtime and imports nothing of training."""

from dataclasses import dataclass

import numpy as np
import soundfile
import torch
import torchaudio
from pydub import AudioSegment


@dataclass
class AudioConfig:
    sample_rate: int = 16000
    segment_duration: float = 2.0
    hop_length: float = 0.5
    n_fft: int = 1024
    hop_length_fft: int = 160
    n_mels: int = 160
    f_min: float = 50.0
    f_max: float = 4000.0
    resize_to_224: bool = True
    max_segments_per_file: int = 32


def letterbox_to_square(x: torch.Tensor, target: int = 224, pad_value: float = -1.0) -> torch.Tensor:
    channels, height, width = x.shape
    scale = min(target / height, target / width)
    new_h, new_w = round(height * scale), round(width * scale)
    x = torch.nn.functional.interpolate(x[None], size=(new_h, new_w), mode="bilinear", align_corners=False)[0]
    out = torch.full((channels, target, target), pad_value)
    top, left = (target - new_h) // 2, (target - new_w) // 2
    out[:, top : top + new_h, left : left + new_w] = x
    return out


class AudioProcessor:
    def __init__(self, config: AudioConfig):
        self.config = config
        self.mel_transform = torchaudio.transforms.MelSpectrogram(
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
        self.db_transform = torchaudio.transforms.AmplitudeToDB(stype="power", top_db=80)

    def load_audio(self, path: str) -> torch.Tensor:
        try:
            audio = AudioSegment.from_file(path)
            if audio.channels > 1:
                audio = audio.set_channels(1)
            rate = audio.frame_rate
            samples = np.array(audio.get_array_of_samples(), dtype=np.float32)
            if audio.sample_width == 1:
                samples = samples / 128.0 - 1.0
            elif audio.sample_width == 2:
                samples = samples / 32768.0
            elif audio.sample_width == 4:
                samples = samples / 2147483648.0
            else:
                samples = samples / (2 ** (8 * audio.sample_width - 1))
            waveform = torch.from_numpy(samples).unsqueeze(0)
        except Exception:
            decoded, rate = soundfile.read(path, dtype="float32", always_2d=True)
            waveform = torch.from_numpy(decoded.T)
            if waveform.shape[0] > 1:
                waveform = torch.mean(waveform, dim=0, keepdim=True)
        if rate != self.config.sample_rate:
            resampler = torchaudio.transforms.Resample(rate, self.config.sample_rate)
            waveform = resampler(waveform)
        return waveform

    def extract_segments(self, waveform: torch.Tensor) -> list[torch.Tensor]:
        segment_samples = int(self.config.segment_duration * self.config.sample_rate)
        hop_samples = int(self.config.hop_length * self.config.sample_rate)
        segments = []
        start = 0
        while start < waveform.shape[1]:
            segment = waveform[:, start : start + segment_samples]
            if segment.shape[1] < segment_samples:
                padding = segment_samples - segment.shape[1]
                segment = torch.nn.functional.pad(segment, (0, padding))
            segments.append(segment)
            if len(segments) >= self.config.max_segments_per_file:
                break
            start += hop_samples
        return segments

    def waveform_to_mel_3ch(self, waveform: torch.Tensor) -> torch.Tensor:
        mel = self.mel_transform(waveform)
        mel_db = self.db_transform(mel)
        mel_norm01 = torch.clamp((mel_db + 80) / 80, 0, 1)
        mel_norm = mel_norm01 * 2 - 1
        mel_img = mel_norm.squeeze(0)
        if self.config.resize_to_224:
            mel_img = letterbox_to_square(mel_img.unsqueeze(0), 224).squeeze(0)
        return mel_img.repeat(3, 1, 1).float()


class OnnxCoughModel:
    def __init__(self) -> None:
        self.config = AudioConfig()
        self.processor = AudioProcessor(self.config)
        self.mean = np.array([0.485, 0.456, 0.406]).reshape(1, 1, 3, 1, 1)
        self.std = np.array([0.229, 0.224, 0.225]).reshape(1, 1, 3, 1, 1)

    def build_batch(self, segments: list[torch.Tensor]) -> np.ndarray:
        """Windows to a batch of one bag, (1, S, 3, 224, 224)."""
        specs = [self.processor.waveform_to_mel_3ch(segment).numpy() for segment in segments]
        x = np.stack(specs)[np.newaxis, ...]
        x01 = (x + 1) / 2.0
        x_norm = (x01 - self.mean) / self.std
        return x_norm.astype(np.float32)


def network_input(path: str) -> np.ndarray:
    model = OnnxCoughModel()
    waveform = model.processor.load_audio(path)
    return model.build_batch(model.processor.extract_segments(waveform))

"""Settings of the cough detector, and the bags of spectrograms that its network is trained on."""

from dataclasses import dataclass

import torch


@dataclass
class Config:
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


class CoughBags:
    """Cached spectrograms (S, 3, 224, 224) in [-1, 1], standardised as ImageNet's pictures are."""

    def __init__(self, config: Config):
        self.config = config
        self.mean = torch.tensor([0.485, 0.456, 0.406]).view(1, 3, 1, 1)
        self.std = torch.tensor([0.229, 0.224, 0.225]).view(1, 3, 1, 1)

    def bag(self, cached: torch.Tensor) -> torch.Tensor:
        specs = cached[: self.config.max_segments_per_file].float()
        specs = (specs + 1) / 2.0
        return (specs - self.mean) / self.std

"""A service of the cough detector that imports training's own classes."""

import torch
from precompute import CoughAudioProcessor
from train_attention import Config


class ActualCoughModel:
    def __init__(self) -> None:
        self.config = Config()
        self.processor = CoughAudioProcessor(self.config)
        self.mean = torch.tensor([0.485, 0.456, 0.406]).view(1, 1, 3, 1, 1)
        self.std = torch.tensor([0.229, 0.224, 0.225]).view(1, 1, 3, 1, 1)

    def build_batch(self, segments: list[torch.Tensor]) -> torch.Tensor:
        """Windows to a batch of one bag, (1, S, 3, 224, 224)."""
        if len(segments) > self.config.max_segments_per_file:
            segments = segments[: self.config.max_segments_per_file]
        specs = []
        for segment in segments:
            specs.append(self.processor.waveform_to_mel_3ch(segment))
        x = torch.stack(specs).unsqueeze(0)
        x01 = (x + 1) / 2.0
        return (x01 - self.mean) / self.std


def network_input(path: str) -> torch.Tensor:
    model = ActualCoughModel()
    waveform = model.processor.load_audio(path)
    segments = model.processor.extract_segments(waveform)
    return model.build_batch(segments)

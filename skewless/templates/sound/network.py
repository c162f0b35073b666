"""The network of this model. model.yaml names it as `network.py:SmallCNN`; this file travels in the archive."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import nn

from skewless.core.networks import Network


class SmallCNN(Network):
    """Three convolutions and an average: windows `(N, 1, 40, 101)` to one logit each, a recording's is their mean.

    channels: of the first convolution; each further one has twice as many.
    """

    packages: ClassVar[tuple[str, ...]] = ("torch",)
    input_name: ClassVar[str] = "spectrograms"

    def __init__(self, channels: int = 16):
        super().__init__()
        self.body = nn.Sequential(
            *self._block(1, channels), *self._block(channels, 2 * channels), *self._block(2 * channels, 4 * channels)
        )
        self.classifier = nn.Linear(4 * channels, 1)

    @staticmethod
    def _block(inputs: int, outputs: int) -> list[nn.Module]:
        return [nn.Conv2d(inputs, outputs, 3, padding=1), nn.BatchNorm2d(outputs), nn.ReLU(), nn.MaxPool2d(2)]

    def encode(self, x: torch.Tensor) -> torch.Tensor:
        """Windows `(N, 1, 40, 101)` to features `(N, 4 channels)`; no row may depend on another."""
        return self.body(x).mean(dim=(2, 3))

    def logits(self, features: torch.Tensor) -> torch.Tensor:
        """Features `(N, F)` to logits `(N, 1)`: what training compares with the labels."""
        return self.classifier(features)

    def head(self, features: torch.Tensor) -> dict[str, torch.Tensor]:
        """One recording's features `(S, F)` to what the post-processing reads: logit `()` and probability `()`."""
        logit = self.logits(features).mean()
        return {"logit": logit, "probability": torch.sigmoid(logit)}

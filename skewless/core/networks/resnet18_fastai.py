"""ResNet-18 under the head that fastai 1 puts on it, one answer per window."""

from __future__ import annotations

from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import nn
from torchvision.models import resnet18

from skewless.core.networks.network import Network


class AdaptiveConcatPool2d(nn.Module):
    """Maximum, then average, over the whole image: `(N, C, H, W) -> (N, 2 C, 1, 1)`. The order is fastai's."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        # A window as large as the image: ONNX has no adaptive maximum.
        maximum = F.max_pool2d(x, tuple(x.shape[-2:]))
        return torch.cat([maximum, F.adaptive_avg_pool2d(x, 1)], dim=1)


class ResNet18Fastai(Network):
    """Class logits from images of `channels` channels, as fastai 1's `cnn_learner(..., models.resnet18)` builds it.

    State-dict keys: `backbone.*` (torchvision's ResNet-18 without `fc`; `conv1` takes `channels` channels) and
    `classifier.0/2/4/6.*` (batch normalisation, 512 hidden units, batch normalisation, classes).

    dropout: before the last layer; half of it before the hidden one.
    """

    packages: ClassVar[tuple[str, ...]] = ("torch", "torchvision")
    input_name: ClassVar[str] = "images"

    def __init__(self, channels: int = 1, classes: int = 2, dropout: float = 0.5):
        super().__init__()
        self.backbone = resnet18(weights=None)
        first, features = self.backbone.conv1, 2 * self.backbone.fc.in_features
        self.backbone.conv1 = nn.Conv2d(channels, first.out_channels, kernel_size=7, stride=2, padding=3, bias=False)
        nn.init.kaiming_normal_(self.backbone.conv1.weight, mode="fan_out", nonlinearity="relu")
        self.backbone.avgpool = AdaptiveConcatPool2d()
        self.backbone.fc = nn.Identity()
        self.classifier = nn.Sequential(
            nn.BatchNorm1d(features),
            nn.Dropout(dropout / 2),
            nn.Linear(features, 512),
            nn.ReLU(),
            nn.BatchNorm1d(512),
            nn.Dropout(dropout),
            nn.Linear(512, classes),
        )

    def encode(self, x: torch.Tensor) -> torch.Tensor:
        """Images `(N, channels, H, W)` to features `(N, 1024)`; rows do not depend on one another in eval mode."""
        return self.backbone(x)

    def logits(self, features: torch.Tensor) -> torch.Tensor:
        """Features `(N, 1024)` to class logits `(N, classes)`."""
        return self.classifier(features)

    def head(self, features: torch.Tensor) -> dict[str, torch.Tensor]:
        """One recording's features `(S, 1024)` to its windows' class_logits and class_probabilities `(S, classes)`."""
        logits = self.logits(features)
        return {"class_logits": logits, "class_probabilities": torch.softmax(logits, dim=1)}

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Images `(N, channels, H, W)` to class logits `(N, classes)`."""
        return self.logits(self.encode(x))

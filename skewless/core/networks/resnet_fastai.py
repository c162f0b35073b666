"""A residual network under the head that fastai 1 puts on it, one answer per window.

K. He et al., "Deep Residual Learning for Image Recognition", CVPR 2016, table 1: 18 and 34 layers are of basic blocks,
50 of bottleneck blocks.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import nn
from torchvision.models import ResNet, resnet18, resnet34, resnet50

from skewless.core.networks.network import Network

Depth = Literal[18, 34, 50]
BODIES: dict[Depth, Callable[..., ResNet]] = {18: resnet18, 34: resnet34, 50: resnet50}


class AdaptiveConcatPool2d(nn.Module):
    """Maximum, then average, over the whole image: `(N, C, H, W) -> (N, 2 C, 1, 1)`. The order is fastai's."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        # A window as large as the image: ONNX has no adaptive maximum.
        maximum = F.max_pool2d(x, tuple(x.shape[-2:]))
        return torch.cat([maximum, F.adaptive_avg_pool2d(x, 1)], dim=1)


class ResNetFastai(Network):
    """Class logits from images of `channels` channels, as fastai 1's `cnn_learner(..., models.resnet50)` builds it.

    State-dict keys: `backbone.*` (torchvision's ResNet without `fc`; `conv1` takes `channels` channels) and
    `classifier.0/2/4/6.*` (batch normalisation, 512 hidden units, batch normalisation, classes).

    depth: layers of the residual network. dropout: before the last layer; half of it before the hidden one.
    """

    packages: ClassVar[tuple[str, ...]] = ("torch", "torchvision")
    input_name: ClassVar[str] = "images"

    def __init__(self, depth: Depth, channels: int = 1, classes: int = 2, dropout: float = 0.5):
        super().__init__()
        self.backbone = BODIES[depth](weights=None)
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
        """Images `(N, channels, H, W)` to features `(N, F)`, F 1024 for 18 and 34 layers, 4096 for 50; rows do not depend
        on one another in eval mode."""
        return self.backbone(x)

    def logits(self, features: torch.Tensor) -> torch.Tensor:
        """Features `(N, F)` to class logits `(N, classes)`."""
        return self.classifier(features)

    def head(self, features: torch.Tensor) -> dict[str, torch.Tensor]:
        """One recording's features `(S, F)` to its windows' class_logits and class_probabilities `(S, classes)`."""
        logits = self.logits(features)
        return {"class_logits": logits, "class_probabilities": torch.softmax(logits, dim=1)}

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Images `(N, channels, H, W)` to class logits `(N, classes)`."""
        return self.logits(self.encode(x))

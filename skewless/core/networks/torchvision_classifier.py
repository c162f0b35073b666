"""torchvision's classification backbones under a new last layer."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import nn
from torchvision import models
from torchvision.models import get_model, list_models

from skewless.core.networks.network import Network


class TorchvisionClassifier(Network):
    """Class logits from images `(N, channels, height, width)`, by a backbone of torchvision with random weights.

    State-dict keys: torchvision's own, the new last layer in its place. A first convolution for another number of channels
    than 3 takes the place of torchvision's.

    model: such as "resnet18", "efficientnet_b0", "convnext_tiny"; `torchvision.models.list_models(torchvision.models)`.
    classes: number of outputs. Raises ValueError for a model that torchvision does not have, or that has no last linear layer.
    """

    packages: ClassVar[tuple[str, ...]] = ("torch", "torchvision")
    input_name: ClassVar[str] = "images"

    def __init__(self, model: str, classes: int, channels: int = 3, height: int = 224, width: int = 224):
        super().__init__()
        known = list_models(module=models)
        if model not in known:
            raise ValueError(f"model is {model!r}, expected one of torchvision's: {', '.join(known)}")
        if min(classes, channels, height, width) < 1:
            raise ValueError(f"classes {classes}, channels {channels}, {height} x {width} pixels: expected 1 or more")
        self.input_shape = (channels, height, width)
        self.backbone = get_model(model, weights=None)
        linears = [name for name, m in self.backbone.named_modules() if isinstance(m, nn.Linear)]
        if not linears:
            raise ValueError(f"model {model!r} has no linear layer at its end to be replaced")
        last = self.backbone.get_submodule(linears[-1])
        self.backbone.set_submodule(linears[-1], nn.Identity())
        self.classifier = nn.Linear(last.in_features, classes)
        if channels != 3:
            self._replace_first_convolution(channels)

    def _replace_first_convolution(self, channels: int) -> None:
        name, first = next((n, m) for n, m in self.backbone.named_modules() if isinstance(m, nn.Conv2d))
        self.backbone.set_submodule(
            name,
            nn.Conv2d(
                channels,
                first.out_channels,
                first.kernel_size,
                first.stride,
                first.padding,
                first.dilation,
                bias=first.bias is not None,
            ),
        )

    def encode(self, x: torch.Tensor) -> torch.Tensor:
        """Images `(N, channels, height, width)` to features `(N, F)`."""
        return self.backbone(x)

    def logits(self, features: torch.Tensor) -> torch.Tensor:
        """Features `(N, F)` to class logits `(N, classes)`."""
        return self.classifier(features)

    def head(self, features: torch.Tensor) -> dict[str, torch.Tensor]:
        """One recording's features `(S, F)` to its rows' class_logits and class_probabilities, both `(S, classes)`."""
        logits = self.logits(features)
        return {"class_logits": logits, "class_probabilities": torch.softmax(logits, dim=1)}

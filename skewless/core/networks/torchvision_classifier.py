"""torchvision's classification backbones under a new last layer."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import nn
from torchvision import models
from torchvision.models import get_model, list_models

from skewless.core.networks.network import Network


class TorchvisionClassifier(Network):
    """Class logits from images `(N, channels, height, width)`, by a backbone of torchvision with random weights.

    State-dict keys: `backbone.` and torchvision's own without those of its last layer, and `classifier.weight` and
    `classifier.bias` for the new one. For another number of channels than 3 the first convolution is a new one, too.

    model: such as "resnet18", "efficientnet_b0", "convnext_tiny"; `torchvision.models.list_models(torchvision.models)`.
    classes: number of outputs. channels: of the images.
    Raises ValueError for a model that torchvision does not have, one whose last layer is not linear (squeezenet), and
    one that has further outputs in training (googlenet, inception_v3).
    """

    packages: ClassVar[tuple[str, ...]] = ("torch", "torchvision")
    input_name: ClassVar[str] = "images"

    def __init__(self, model: str, classes: int, channels: int = 3):
        super().__init__()
        known = list_models(module=models)
        if model not in known:
            raise ValueError(f"model is {model!r}, expected one of torchvision's: {', '.join(known)}")
        if min(classes, channels) < 1:
            raise ValueError(f"classes is {classes} and channels {channels}, expected 1 or more")
        self.backbone = get_model(model, weights=None)
        *_, (name, last) = self.backbone.named_modules()
        if not isinstance(last, nn.Linear):
            raise ValueError(
                f"model is {model!r}, whose last layer is {type(last).__name__}, expected one that ends in a linear layer, "
                "such as 'resnet18'"
            )
        if getattr(self.backbone, "aux_logits", False):
            raise ValueError(
                f"model is {model!r}, which has auxiliary outputs in training, expected one with a single output, such as "
                "'resnet18'"
            )
        self.backbone.set_submodule(name, nn.Identity())
        self.classifier = nn.Linear(last.in_features, classes)
        if channels != 3:
            self._replace_first_convolution(channels)

    def _replace_first_convolution(self, channels: int) -> None:
        name, first = next((n, m) for n, m in self.backbone.named_modules() if isinstance(m, nn.Conv2d))
        same = ("kernel_size", "stride", "padding", "dilation", "groups", "padding_mode")
        settings: dict[str, Any] = {key: getattr(first, key) for key in same}
        new = nn.Conv2d(channels, first.out_channels, bias=first.bias is not None, **settings)
        self.backbone.set_submodule(name, new)

    def encode(self, x: torch.Tensor) -> torch.Tensor:
        """Images `(N, channels, height, width)` to features `(N, F)`; rows do not depend on one another in eval mode."""
        return self.backbone(x)

    def logits(self, features: torch.Tensor) -> torch.Tensor:
        """Features `(N, F)` to class logits `(N, classes)`."""
        return self.classifier(features)

    def head(self, features: torch.Tensor) -> dict[str, torch.Tensor]:
        """One recording's features `(S, F)` to its rows' class_logits and class_probabilities, both `(S, classes)`; with two
        classes also probability `()`, the mean of the rows' for the second class."""
        logits = self.logits(features)
        probabilities = torch.softmax(logits, dim=1)
        outputs = {"class_logits": logits, "class_probabilities": probabilities}
        return outputs | ({"probability": probabilities[:, 1].mean()} if logits.shape[1] == 2 else {})

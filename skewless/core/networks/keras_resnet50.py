"""ResNet-50 as Keras has it, under two dense layers: one picture, one probability per class.

K. He et al., "Deep Residual Learning for Image Recognition", CVPR 2016, with Keras' choices, which torchvision does not
share: a stage halves the size in its first 1x1 convolution, convolutions have biases, batch normalisation has epsilon
1.001e-5.
"""

from __future__ import annotations

from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import nn

from skewless.core.networks.network import Network

# Per stage: its name, blocks, channels inside a block, and the first block's stride.
STAGES = (("conv2", 3, 64, 1), ("conv3", 4, 128, 2), ("conv4", 6, 256, 2), ("conv5", 3, 512, 2))


class KerasResNet50(Network):
    """Class probabilities from pictures as `keras.applications.resnet.preprocess_input` leaves them.

    State-dict keys: Keras' layer names (`conv1_conv`, `conv2_block1_0_bn`, ...), then `dense` and `predictions` for the
    head. Random weights are drawn as Keras draws them (Glorot uniform, biases 0), but the first filters without their mean:
    they then respond to edges, as trained ones do, and not to brightness, which would drown all else in random features;
    and residual branches at a fifth of their scale, because random features of fifty full layers tell pictures apart
    much worse than those of a few (P. Goyal et al., "Accurate, Large Minibatch SGD", 2017, start at 0).

    classes: outputs. hidden: units of the first dense layer, behind a ReLU. dropout: share of them that training drops.
    """

    packages: ClassVar[tuple[str, ...]] = ("torch",)
    input_name: ClassVar[str] = "images"

    conv1_conv: nn.Conv2d  # `_convolution` adds it, as all the others

    def __init__(self, classes: int = 3, hidden: int = 256, dropout: float = 0.0):
        super().__init__()
        self._convolution("conv1", 3, 64, size=7, stride=2)
        channels = 64
        for stage, blocks, inner, stride in STAGES:
            for block in range(1, blocks + 1):
                name, step = f"{stage}_block{block}", stride if block == 1 else 1
                if block == 1:
                    self._convolution(f"{name}_0", channels, 4 * inner, stride=step)
                self._convolution(f"{name}_1", channels, inner, stride=step)
                self._convolution(f"{name}_2", inner, inner, size=3, padding=1)
                self._convolution(f"{name}_3", inner, 4 * inner)
                channels = 4 * inner
        self.dense = nn.Linear(channels, hidden)
        self.predictions = nn.Linear(hidden, classes)
        self.dropout = nn.Dropout(dropout)
        for module in self.modules():
            if isinstance(module, nn.Conv2d | nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        with torch.no_grad():
            self.conv1_conv.weight -= self.conv1_conv.weight.mean(dim=(1, 2, 3), keepdim=True)
            for name, module in self.named_modules():
                if name.endswith("_3_bn"):
                    module.weight.fill_(0.2)

    def _convolution(self, name: str, inputs: int, outputs: int, size: int = 1, stride: int = 1, padding: int = 0):
        self.add_module(f"{name}_conv", nn.Conv2d(inputs, outputs, size, stride, padding))
        # Keras' momentum is the share that is kept.
        self.add_module(f"{name}_bn", nn.BatchNorm2d(outputs, eps=1.001e-5, momentum=1 - 0.99))

    def _normalized(self, name: str, x: torch.Tensor) -> torch.Tensor:
        return self.get_submodule(f"{name}_bn")(self.get_submodule(f"{name}_conv")(x))

    def _block(self, name: str, x: torch.Tensor) -> torch.Tensor:
        shortcut = self._normalized(f"{name}_0", x) if hasattr(self, f"{name}_0_conv") else x
        x = F.relu(self._normalized(f"{name}_1", x))
        x = F.relu(self._normalized(f"{name}_2", x))
        return F.relu(shortcut + self._normalized(f"{name}_3", x))

    def encode(self, x: torch.Tensor) -> torch.Tensor:
        """Pictures `(N, 3, 224, 224)` to features `(N, 2048)`; rows do not depend on one another in eval mode."""
        x = F.relu(self._normalized("conv1", F.pad(x, (3, 3, 3, 3))))
        # Padded with zeros beforehand, as in Keras; behind a ReLU the maximum is the same either way.
        x = F.max_pool2d(F.pad(x, (1, 1, 1, 1)), 3, stride=2)
        for stage, blocks, _, _ in STAGES:
            for block in range(1, blocks + 1):
                x = self._block(f"{stage}_block{block}", x)
        return x.mean(dim=(2, 3))

    def logits(self, features: torch.Tensor) -> torch.Tensor:
        """Features `(N, 2048)` to logits `(N, classes)`."""
        return self.predictions(self.dropout(F.relu(self.dense(features))))

    def head(self, features: torch.Tensor) -> dict[str, torch.Tensor]:
        """One picture's features `(1, 2048)` to class_logits and class_probabilities, both `(classes,)`."""
        logits = self.logits(features)[0]
        return {"class_logits": logits, "class_probabilities": torch.softmax(logits, dim=0)}

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Pictures `(N, 3, 224, 224)` to logits `(N, classes)`."""
        return self.logits(self.encode(x))

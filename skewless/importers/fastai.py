"""Weights that fastai 1 saved, under the names of `resnet18_fastai`.

fastai's `cnn_learner` makes a nn.Sequential of body and head, so its weights are named by position: `0.0.weight` is the
first convolution's. `learn.save()` and `torch.save(learn.model.state_dict(), ...)` write tensors alone, which
`skewless.importers.pytorch` reads. What `learn.export()` writes is a whole learner pickled with its code and is refused:
load it where fastai is installed, and save its model's state_dict().
"""

from __future__ import annotations

import re
from collections.abc import Mapping

import torch

# The body is every child of ResNet-18 but the last two; ReLU, pooling, flattening and dropout have no weights.
_LAYERS = {
    "0.0": "backbone.conv1",
    "0.1": "backbone.bn1",
    "0.4": "backbone.layer1",
    "0.5": "backbone.layer2",
    "0.6": "backbone.layer3",
    "0.7": "backbone.layer4",
    "1.2": "classifier.0",
    "1.4": "classifier.2",
    "1.6": "classifier.4",
    "1.8": "classifier.6",
}


def is_fastai(weights: Mapping[str, torch.Tensor]) -> bool:
    """Whether every weight is named by its position in a body (0) or a head (1)."""
    return bool(weights) and all(re.match(r"[01]\.\d+\.", name) for name in weights)


def rename(weights: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """fastai's weights under the network's names.

    A position that the network has no layer for keeps its name, and is refused as unexpected when the
    weights are put into the network.
    """
    renamed = {}
    for name, value in weights.items():
        part, position, rest = name.split(".", 2)
        layer = f"{part}.{position}"
        renamed[f"{_LAYERS.get(layer, layer)}.{rest}"] = value
    return renamed

"""Weights of a residual network under fastai 1's head, under the names of `resnet_fastai`.

They come by two sets of names:

- fastai's `cnn_learner` makes a nn.Sequential of body and head, so its weights are named by position: `0.0.weight` is the
  first convolution's. `learn.save()` and `torch.save(learn.model.state_dict(), ...)` write tensors alone. What
  `learn.export()` writes is a whole learner pickled with its code and is refused: load it where fastai is installed,
  and save its model's state_dict().
- Ports without fastai take torchvision's network and put the head in place of its `fc`: `conv1.weight`, `fc.1.weight`, or
  `model.conv1.weight` where a class holds the network as `model`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import cache

import torch

from skewless.core.definition import MODEL, Definition
from skewless.core.networks import NETWORKS
from skewless.core.networks.resnet_fastai import BODIES, Depth, ResNetFastai
from skewless.importers.errors import ImportFileError

# The body is every child of torchvision's network but the last two; ReLU, pooling, flattening and dropout have no weights.
_BY_POSITION = {
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
# There pooling is `avgpool`, so that the head begins with flattening.
_OF_A_PORT = {
    "conv1": "backbone.conv1",
    "bn1": "backbone.bn1",
    "layer1": "backbone.layer1",
    "layer2": "backbone.layer2",
    "layer3": "backbone.layer3",
    "layer4": "backbone.layer4",
    "fc.1": "classifier.0",
    "fc.3": "classifier.2",
    "fc.5": "classifier.4",
    "fc.7": "classifier.6",
}
_NAMINGS = (
    (re.compile(r"([01]\.\d+)\.(.+)"), _BY_POSITION),
    (re.compile(r"(conv1|bn1|layer[1-4]|fc\.\d+)\.(.+)"), _OF_A_PORT),
)


def rename(weights: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Weights by either set of names under the network's names; others as they are.

    A layer that the network does not have keeps its name, and is refused as unexpected when the weights are put
    into the network.
    """
    held = all(name.startswith("model.") for name in weights)
    bare = {name.removeprefix("model.") if held else name: value for name, value in weights.items()}
    for pattern, layers in _NAMINGS:
        found = {name: pattern.fullmatch(name) for name in bare}
        if all(found.values()):
            return {
                f"{layers.get(match[1], match[1])}.{match[2]}": bare[name] for name, match in found.items() if match
            }
    return dict(weights)


def shape_of(weights: Mapping[str, torch.Tensor]) -> dict[str, int] | None:
    """`depth`, `channels` and `classes` of the `resnet_fastai` whose weights these are, by either set of names or by the
    network's own; None for weights that are not exactly one's."""
    shapes = {name: () if value.is_nested else tuple(value.shape) for name, value in rename(weights).items()}
    first, last = shapes.get("backbone.conv1.weight", ()), shapes.get("classifier.6.weight", ())
    if len(first) != 4 or len(last) != 2 or min(*first, *last) < 1:
        return None
    channels, classes = first[1], last[0]
    for depth in BODIES:
        expected = _shapes(depth) | {
            "backbone.conv1.weight": (64, channels, 7, 7),
            "classifier.6.weight": (classes, 512),
            "classifier.6.bias": (classes,),
        }
        if shapes == expected:
            return {"depth": depth, "channels": channels, "classes": classes}
    return None


@cache
def _shapes(depth: Depth) -> dict[str, tuple[int, ...]]:
    with torch.device("meta"):
        return {name: tuple(value.shape) for name, value in ResNetFastai(depth).state_dict().items()}


def weights_for(definition: Definition, weights: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The weights under the names of the definition's `resnet_fastai`.

    Raises ImportFileError for those of one with another depth, other channels or other classes than model.yaml says.
    """
    found, asked = shape_of(weights), shape_of(definition.build_network().state_dict())
    if found is not None and asked is not None and found != asked:
        _, params = NETWORKS.split(definition.network)
        fitting = ", ".join(f"{name}: {value}" for name, value in (found | dict(params) | found).items())
        raise ImportFileError(
            f"the file holds fastai's {_described(found)}, {definition.folder / MODEL} asks for {_described(asked)}; "
            f"write there `network: {{resnet_fastai: {{{fitting}}}}}`"
        )
    return rename(weights)


def _described(shape: Mapping[str, int]) -> str:
    return f"ResNet-{shape['depth']} (input channels: {shape['channels']}, classes: {shape['classes']})"

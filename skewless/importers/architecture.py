"""Which known network a file's weights are of, by their names and shapes: for a message, never for a computation."""

from __future__ import annotations

import re
import warnings
from collections.abc import Collection, Mapping
from dataclasses import dataclass

import torch
from torch import nn
from torchvision import models
from torchvision.models import get_model, list_models

from skewless.importers.torchvision_names import last_layer, split

Shapes = Mapping[str, tuple[int, ...]]

# A name that only this family of torchvision's has, and what its models' names begin with.
_FAMILIES = {
    r"layer1\.0\.conv1\.weight$": ("resnet", "resnext", "wide_resnet"),
    r"features\.1\.conv\.0\.0\.weight$": ("mobilenet_v2",),
    r"features\.1\.block\.0\.0\.weight$": ("mobilenet_v3",),
    r"features\.1\.0\.block\.0\.0\.weight$": ("efficientnet",),
    r"features\.1\.0\.layer_scale$": ("convnext",),
    r"features\.1\.0\.attn\.qkv\.weight$": ("swin",),
    r"features\.denseblock1\.": ("densenet",),
    r"encoder\.layers\.encoder_layer_0\.": ("vit",),
    r"features\.\d\.squeeze\.weight$": ("squeezenet",),
    r"inception3a\.": ("googlenet",),
    r"Mixed_5b\.": ("inception",),
    r"stage2\.0\.branch1\.": ("shufflenet",),
    r"layers\.8\.0\.layers\.0\.weight$": ("mnasnet",),
    r"trunk_output\.block1\.": ("regnet",),
    r"blocks\.0\.layers\.0\.layers\.MBconv\.": ("maxvit",),
    r"features\.0\.weight$": ("vgg", "alexnet"),
}
_WITH_FURTHER_OUTPUTS = ("googlenet", "inception_v3")
# The blocks of residual networks by other names: stage, block and convolution.
_BLOCKS = {
    "torchvision": r"(?:^|\.)layer([1-4])\.(\d+)\.conv(\d)\.weight$",
    "fastai": r"^0\.([4-7])\.(\d+)\.conv(\d)\.weight$",
    "transformers": r"encoder\.stages\.(\d)\.layers\.(\d+)\.layer\.(\d)\.convolution\.weight$",
    "Keras": r"^conv([2-5])_block(\d+)_(\d)_conv\b",
}
_DEPTHS: dict[tuple[tuple[int, ...], int], str] = {
    ((2, 2, 2, 2), 2): "ResNet-18",
    ((3, 4, 6, 3), 2): "ResNet-34",
    ((3, 4, 6, 3), 3): "ResNet-50",
    ((3, 4, 23, 3), 3): "ResNet-101",
    ((3, 8, 36, 3), 3): "ResNet-152",
}
# Layers that only this network of keras.applications has. The first that fits is it.
_KERAS = {
    "MobileNetV2": r"block_1_expand",
    "MobileNetV3": r"expanded_conv(_1)?[_/](expand|squeeze_excite)",
    "MobileNet": r"conv_dw_1",
    "EfficientNet": r"block1a_dwconv",
    "EfficientNetV2": r"block1a_project_conv",
    "VGG19": r"block5_conv4",
    "VGG16": r"block5_conv3",
    "DenseNet": r"pool2_conv",
    "Xception": r"block2_sepconv1",
    "InceptionResNetV2": r"conv_7b",
    "InceptionV3": r"mixed10",
    "NASNet": r"normal_conv_1_",
    "ConvNeXt": r"convnext_\w+_stage_0_block_0",
    "ResNet V2": r"conv2_block1_preact_bn",
}


@dataclass(frozen=True)
class Architecture:
    """text: such as "a ResNet-50 by its layers (3, 4, 6, 3) in torchvision's names, 1 input channel, 2 outputs".

    model: what torchvision calls a network that is exactly this one, with one last linear layer of its own; None for others.
    channels, outputs: of a `model`.
    """

    text: str
    model: str | None = None
    channels: int = 3
    outputs: int = 0


def describe(shapes: Shapes) -> Architecture | None:
    """The network with weights of these names and shapes, as far as it is known; None for one that is not."""
    names = list(shapes)
    begins = next((begins for sign, begins in _FAMILIES.items() if any(re.search(sign, name) for name in names)), ())
    of_family = [name for name in list_models(module=models) if name.startswith(begins)] if begins else []
    channels = next((shape[1] for shape in shapes.values() if len(shape) == 4), 0)
    outputs = next((shape[0] for name, shape in reversed(list(shapes.items())) if len(shape) == 2), 0)
    ends = ", ".join(
        f"{number} {what}{'' if number == 1 else 's'}"
        for number, what in ((channels, "input channel"), (outputs, "output"))
        if number
    )
    exact = None
    for name in of_family:
        # Of a network with a head of its own, the deepest body: a ResNet-34 has every layer of a ResNet-18.
        if (found := _as_torchvision(name, shapes)) is not None and (exact is None or found.matched > exact.matched):
            exact = found
            if exact.layer is not None:
                break
    residual = _residual(names)
    if exact is not None:
        text = f"a {residual}" if re.fullmatch(r"resnet\d+", exact.name) else f"torchvision's {exact.name}"
        usable = exact.layer is not None and exact.name not in _WITH_FURTHER_OUTPUTS
        return Architecture(f"{text}, {ends}", exact.name if usable else None, channels, outputs)
    if residual:
        return Architecture(f"a {residual}, {ends}")
    if of_family:
        return Architecture(f"a network of torchvision's family {begins[0]}, {ends}")
    return None


def keras_application(layers: Collection[str]) -> str:
    """The network of keras.applications with layers of these names, such as "MobileNetV2"; empty for one that is not known."""
    for network, sign in _KERAS.items():
        if any(re.match(sign, name) for name in layers):
            return network
    found = _blocks(layers, _BLOCKS["Keras"])
    return _DEPTHS.get(found, "").replace("-", "") if found else ""


def _residual(names: Collection[str]) -> str:
    for where, pattern in _BLOCKS.items():
        if (found := _blocks(names, pattern)) is not None:
            layers = f"({', '.join(map(str, found[0]))})"
            return f"{_DEPTHS.get(found, 'residual network')} by its layers {layers} in {where}'s names"
    return ""


def _blocks(names: Collection[str], pattern: str) -> tuple[tuple[int, ...], int] | None:
    """How many blocks each stage has, and how many convolutions a block; None for names without any."""
    found = [tuple(map(int, match.groups())) for name in names if (match := re.search(pattern, name))]
    if not found:
        return None
    stages = sorted({stage for stage, _, _ in found})
    counts = tuple(len({block for s, block, _ in found if s == stage}) for stage in stages)
    # Keras counts the convolution of the shortcut as 0.
    return counts, len({convolution for _, _, convolution in found} - ({0} if pattern == _BLOCKS["Keras"] else set()))


@dataclass(frozen=True)
class _Model:
    """One of torchvision's. layer: the file's name of its last layer, None where the file has several of its own.
    matched: how many of its weights the file has."""

    name: str
    layer: str | None
    matched: int


def _as_torchvision(name: str, shapes: Shapes) -> _Model | None:
    """A model of torchvision's, if the weights are its; None otherwise. The number of channels and of classes may be another."""
    try:
        # Without numbers, which takes no time; regnet needs them. Some warn of their own initial values.
        with torch.device("meta"), warnings.catch_warnings(action="ignore"):
            network = get_model(name, weights=None)
    except NotImplementedError:
        return None
    *_, (last, module) = network.named_modules()
    if not isinstance(module, nn.Linear):
        return None
    body = {k: tuple(v.shape) for k, v in network.state_dict().items() if not k.startswith(f"{last}.")}
    found = split(shapes, body)
    if found is None:
        return None
    prefix, others = found
    same = [shapes[prefix + k] == shape or (len(shape) == 4 and i == 0) for i, (k, shape) in enumerate(body.items())]
    return _Model(name, last_layer(others), len(body)) if all(same) else None

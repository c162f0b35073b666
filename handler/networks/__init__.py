"""The network architectures, by the names that a model-config.yaml uses."""

from __future__ import annotations

from typing import Any

from torch import nn

from handler.definition import build
from handler.networks.attn_mil_resnet import AttnMILResNet
from handler.networks.keras_resnet50 import KerasResNet50
from handler.networks.mlp import MLP
from handler.networks.resnet18_fastai import ResNet18Fastai

NETWORKS: dict[str, type[nn.Module]] = {
    "attn_mil_resnet": AttnMILResNet,
    "keras_resnet50": KerasResNet50,
    "mlp": MLP,
    "resnet18_fastai": ResNet18Fastai,
}


def build_network(definition: Any) -> nn.Module:
    """The network of `{name: {parameter: value}}`, with random weights; raises ValueError for an unknown one."""
    return build("network", NETWORKS, definition)

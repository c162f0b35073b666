"""The network architectures, by the names that a model-config.yaml uses."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from handler.networks.attn_mil_resnet import AttnMILResNet

NETWORKS: dict[str, type[nn.Module]] = {"attn_mil_resnet": AttnMILResNet}


def build_network(definition: Mapping[str, Mapping[str, Any]]) -> nn.Module:
    """The network of `{name: {parameter: value}}`, with random weights; raises ValueError for an unknown one."""
    if not isinstance(definition, Mapping) or len(definition) != 1:
        raise ValueError(f"network is {definition!r}, expected one 'name: {{parameters}}'")
    ((name, params),) = definition.items()
    if name not in NETWORKS:
        raise ValueError(f"unknown network '{name}'; there are: {', '.join(sorted(NETWORKS))}")
    try:
        return NETWORKS[name](**params)
    except TypeError as error:
        raise ValueError(f"network '{name}': {error}") from error

"""Weights from a file in the definition's network, changed in nothing."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn

from skewless.core.definition import MODEL, Definition
from skewless.core.networks import NETWORKS, Network
from skewless.importers.architecture import describe
from skewless.importers.errors import ImportFileError
from skewless.training.checkpoint import UnfitWeightsError, check_fit, network_of


def network_from(weights: Mapping[str, torch.Tensor], definition: Definition) -> Network:
    """The network with these weights, each in the network's own type, in eval mode; an exported network with its own.

    Raises CheckpointError as `network_of` does; ImportFileError for values that another type would change (float16 to
    float32 never does, float64 to float32 nearly always).
    """
    if definition.network_files:
        return network_of({}, definition)
    for name, value in weights.items():
        plain = type(value) in (torch.Tensor, nn.Parameter) and value.layout == torch.strided
        if not plain or value.is_quantized or value.is_nested or value.is_meta:
            raise ImportFileError(f"{name} is not a plain dense tensor; save model.state_dict() of the float32 model")
    expected = definition.build_network()
    try:
        check_fit(weights, expected)
    except UnfitWeightsError as error:
        raise ImportFileError(f"{error}{_what_they_are(weights, expected, definition)}") from error
    converted = {}
    for name, like in expected.state_dict().items():
        value = weights[name].detach()
        if value.is_floating_point() != like.is_floating_point():
            raise ImportFileError(f"{name} is {value.dtype}, expected {like.dtype}")
        converted[name] = value.to(like.dtype)
        if not torch.allclose(converted[name].double(), value.double(), rtol=0, atol=0, equal_nan=True):
            raise ImportFileError(
                f"{name} is {value.dtype} and changes when converted to {like.dtype}, which the network computes in; "
                "evaluate and save the model in that type"
            )
    return network_of({"model_state_dict": converted}, definition)


def _what_they_are(weights: Mapping[str, torch.Tensor], network: Network, definition: Definition) -> str:
    """Which network the file has, which one the archive, and what to do; empty where neither is known."""
    found, asked = (
        describe({name: tuple(value.shape) for name, value in state.items()})
        for state in (weights, network.state_dict())
    )
    if found is None:
        return ""
    name, _ = NETWORKS.split(definition.network)
    ours = f"{name}, {asked.text}" if asked else name
    export = "save the network with torch.export.save and write `network: {exported: model.pt2}`"
    if found.model:
        channels = "" if found.channels == 3 else f", channels: {found.channels}"
        export = f"write `network: {{torchvision: {found.model}, classes: {found.outputs}{channels}}}`"
    return (
        f"\nThe file has {found.text}. The archive's network is {ours}. Choose the archive of the file's network, or {export} "
        f"into {definition.folder / MODEL}"
    )

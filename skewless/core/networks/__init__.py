"""The network architectures, by the names that a model.yaml uses."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from skewless.core.catalogue import Catalogue, check
from skewless.core.errors import DefinitionError
from skewless.core.networks.network import Network
from skewless.core.own_code import OwnCode

if TYPE_CHECKING:
    from skewless.core.networks.exported import ExportedFile

__all__ = ["NETWORKS", "SHORT", "Network", "build_network", "exported_file"]

NETWORKS: Catalogue[Network] = Catalogue(
    "network",
    Network,
    {
        "attn_mil_resnet": "skewless.core.networks.attn_mil_resnet:AttnMILResNet",
        "exported": "skewless.core.networks.exported:ExportedNetwork",
        "keras_resnet50": "skewless.core.networks.keras_resnet50:KerasResNet50",
        "mlp": "skewless.core.networks.mlp:MLP",
        "resnet_fastai": "skewless.core.networks.resnet_fastai:ResNetFastai",
        "torchvision": "skewless.core.networks.torchvision_classifier:TorchvisionClassifier",
    },
)

# What the one value of a short definition is: `{exported: model.pt2}`, `{torchvision: resnet18, classes: 3}`.
SHORT = {"exported": "file", "torchvision": "model"}


def spelt_out(definition: Any) -> Any:
    """A short definition as `name: {parameters}`, any other as it is."""
    if isinstance(definition, dict):
        for name, parameter in SHORT.items():
            if isinstance(definition.get(name), str):
                rest = {key: value for key, value in definition.items() if key != name}
                return {name: {parameter: definition[name], **rest}}
    return definition


def exported_file(params: Mapping[str, Any]) -> ExportedFile:
    """What a model.yaml says of an exported network; raises DefinitionError for what it cannot say."""
    from skewless.core.networks.exported import ExportedFile

    try:
        return ExportedFile(**check(ExportedFile, params, "network 'exported'"))
    except DefinitionError:
        raise
    except ValueError as error:
        raise DefinitionError(f"network 'exported': {error}") from error


def build_network(definition: Any, folder: str | Path | None = None) -> Network:
    """The network of `{name: {parameter: value}}`, with random weights unless it is an exported one.

    folder: the archive's, for classes of its own code and for an exported network's file.
    Raises DefinitionError for an unknown name, for parameters that it does not take, and for a file that is no network.
    """
    definition = spelt_out(definition)
    name, params = NETWORKS.split(definition)
    if name != "exported":
        return NETWORKS.build(definition, None if folder is None else OwnCode(folder))
    from skewless.core.networks.exported import ExportedNetwork

    asked = exported_file(params)
    if folder is None:
        raise DefinitionError(f"network 'exported' is {asked.file} in the archive's folder, which was not given")
    return ExportedNetwork.from_file(Path(folder, asked.file), asked.outputs, asked.per)

"""What executes a network: `outputs = runtime(inputs)`, one dict of named tensors per recording."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from skewless.core.catalogue import Catalogue, check
from skewless.core.errors import DefinitionError
from skewless.core.runtimes.runtime import Runtime, RuntimeSettings
from skewless.core.stages import Stage

__all__ = ["RUNTIMES", "Runtime", "RuntimeSettings", "load_runtime", "runtime_settings"]

_log = logging.getLogger(__name__)

RUNTIMES: Catalogue[Runtime] = Catalogue(
    "runtime",
    Runtime,
    {
        "eager": "skewless.core.runtimes.eager:EagerRuntime",
        "mnn": "skewless.core.runtimes.mnn:MnnRuntime",
        "onnxruntime": "skewless.core.runtimes.onnx:OnnxRuntime",
        "openvino": "skewless.core.runtimes.openvino:OpenVinoRuntime",
    },
)


def runtime_settings(definition: Mapping[str, Any]) -> tuple[type[Runtime], RuntimeSettings]:
    """The runtime's class and its settings, of `{name: {parameter: value}}`; raises DefinitionError."""
    name, params = RUNTIMES.split(definition)
    found = RUNTIMES.find(name)
    try:
        settings = RuntimeSettings(**check(RuntimeSettings, params, f"runtime '{name}'"))
    except DefinitionError:
        raise
    except ValueError as error:
        raise DefinitionError(f"runtime '{name}': {error}") from error
    if settings.precision not in found.precisions:
        raise DefinitionError(
            f"runtime '{name}': precision is {settings.precision!r}, expected one of {', '.join(found.precisions)}"
        )
    return found, settings


def load_runtime(
    definition: Mapping[str, Any],
    network: Mapping[str, Any],
    archive_dir: Path,
    device: torch.device,
    absorbed: Sequence[Stage] = (),
) -> Runtime:
    """The runtime that a model.yaml asks for, with the archive's weights on `device`.

    absorbed: the pipeline's last stages, those that the definition's `absorb` names.
    A runtime that computes on the CPU alone is loaded there, whatever the device.
    Raises DefinitionError for an unknown runtime; ValueError for weights that do not fit the network.
    """
    found, settings = runtime_settings(definition)
    if found.devices == ("cpu",) and device.type != "cpu":
        _log.info("runtime '%s' computes on the CPU; device '%s' is left to others", found.name, device)
        device = torch.device("cpu")
    return found.load(archive_dir, network, device, settings, absorbed)

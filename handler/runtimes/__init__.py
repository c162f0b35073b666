"""What executes a network: `outputs = runtime(inputs)`, one dict of named tensors per recording."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch

from handler.definition import build
from handler.runtimes.eager import EagerRuntime
from handler.runtimes.onnx import OnnxRuntime


class Runtime(Protocol):
    """Recordings, each `(S_i, ...)` float32, to each one's outputs by name, on the CPU.

    name: as in RUNTIMES. precision: its arithmetic, such as "fp32". tier: "exact" or "reduced", which sets the tolerance.
    tolerance: how far an output may be from the one recorded at the build, and a probability from the evaluated one.
    """

    name: str
    precision: str
    tier: str
    device: torch.device
    tolerance: float

    def __call__(self, inputs: Sequence[torch.Tensor]) -> list[dict[str, torch.Tensor]]: ...


RUNTIMES: dict[str, Callable[..., Runtime]] = {"eager": EagerRuntime.load, "onnxruntime": OnnxRuntime.load}


def load_runtime(config: Mapping[str, Any], archive_dir: Path, device: torch.device) -> Runtime:
    """The runtime that a model-config.yaml asks for, with the archive's weights on `device`.

    Raises ValueError for an unknown runtime, or weights that do not fit the network.
    """
    return build("runtime", RUNTIMES, config["runtime"], archive_dir, config["network"], device)

"""PyTorch's eager mode."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import nn

from handler.networks import build_network
from handler.precision import TIERS, TOLERANCES


class EagerRuntime:
    """Runs a network whose `encode` takes segments and whose `head` takes one recording's features.

    micro_batch: how many segments go through `encode` at once; it bounds memory, whatever the requests.
    """

    name = "eager"
    precision = "fp32"
    tier = TIERS[precision]

    def __init__(self, network: nn.Module, device: torch.device, micro_batch: int = 32):
        if micro_batch < 1:
            raise ValueError(f"micro_batch is {micro_batch}, expected at least 1")
        self.tolerance = TOLERANCES[self.tier]
        self.network = network.to(device).eval()
        self.device = device
        self.micro_batch = micro_batch

    @classmethod
    def load(
        cls, archive_dir: Path, network: Mapping[str, Any], device: torch.device, micro_batch: int = 32
    ) -> EagerRuntime:
        """The network of a definition with the archive's weights.safetensors; raises ValueError when they do not fit."""
        built = build_network(network)
        try:
            built.load_state_dict(load_file(archive_dir / "weights.safetensors"), strict=True)
        except RuntimeError as error:
            raise ValueError(f"weights.safetensors does not fit the network: {error}") from error
        return cls(built, device, micro_batch)

    def __call__(self, inputs: Sequence[torch.Tensor]) -> list[dict[str, torch.Tensor]]:
        """Recordings, each `(S_i, ...)` float32, to each one's outputs on the CPU.

        All segments form one flat batch, so nothing is padded; heads see one recording at a time, so a recording's
        result cannot depend on its neighbours beyond the last bits that a batch size changes in a convolution.
        """
        if not inputs:
            return []
        with torch.inference_mode():
            chunks = torch.cat(list(inputs)).split(self.micro_batch)
            features = torch.cat([self.network.encode(chunk.to(self.device)) for chunk in chunks])
            outputs = [self.network.head(part) for part in features.split([len(x) for x in inputs])]
            return [{name: value.cpu() for name, value in output.items()} for output in outputs]

"""PyTorch's eager mode."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn


class EagerRuntime:
    """Runs a network whose `encode` takes segments and whose `head` takes one recording's features.

    micro_batch: how many segments go through `encode` at once; it bounds memory, whatever the requests.
    """

    def __init__(self, network: nn.Module, device: torch.device, micro_batch: int = 32):
        if micro_batch < 1:
            raise ValueError(f"micro_batch is {micro_batch}, expected at least 1")
        self.network = network.to(device).eval()
        self.device = device
        self.micro_batch = micro_batch

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

"""PyTorch's eager mode."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from skewless.core.networks import Network, build_network
from skewless.core.networks.with_stages import WithStages
from skewless.core.runtimes.runtime import DEFAULTS, Runtime, RuntimeSettings
from skewless.core.stages import Stage

WEIGHTS = "weights.safetensors"


class EagerRuntime(Runtime):
    """PyTorch's eager mode."""

    name = "eager"

    def __init__(
        self,
        network: Network,
        device: torch.device,
        settings: RuntimeSettings = DEFAULTS,
        absorbed: Sequence[Stage] = (),
    ):
        self.network = (WithStages(network, absorbed) if absorbed else network).to(device).eval()
        self.device, self.settings = device, settings

    @classmethod
    def write(
        cls,
        network: Network,
        folder: Path,
        settings: RuntimeSettings,
        examples: Iterable[torch.Tensor],
        absorbed: Sequence[Stage] = (),
    ) -> list[Path]:
        """weights.safetensors; nothing for a network that is in a file of the folder with its weights."""
        if network.files:
            return []
        path = folder / WEIGHTS
        save_file({name: value.contiguous() for name, value in network.state_dict().items()}, path)
        return [path]

    @classmethod
    def load(
        cls,
        archive_dir: Path,
        network: Mapping[str, Any],
        device: torch.device,
        settings: RuntimeSettings,
        absorbed: Sequence[Stage] = (),
    ) -> EagerRuntime:
        """The network of a definition with the archive's weights.safetensors; raises ValueError when they do not fit."""
        built = build_network(network, archive_dir)
        # An exported network comes with its weights.
        if not built.files:
            try:
                built.load_state_dict(load_file(archive_dir / WEIGHTS), strict=True)
            except RuntimeError as error:
                raise ValueError(f"{WEIGHTS} does not fit the network: {error}") from error
        return cls(built, device, settings, absorbed)

    def __call__(self, inputs: Sequence[torch.Tensor]) -> list[dict[str, torch.Tensor]]:
        """Recordings, each `(S_i, ...)` float32 or float16, to each one's outputs on the CPU.

        All rows form one flat batch, so nothing is padded; heads see one recording at a time, so a recording's result
        cannot depend on its neighbours beyond the last bits that a batch size changes in a convolution.
        """
        if not inputs:
            return []
        with torch.inference_mode():
            chunks = torch.cat(list(inputs)).split(self.settings.micro_batch)
            # To float32 on the device: half the bytes to copy where the rows are float16.
            features = torch.cat([self.network.encode(chunk.to(self.device).float()) for chunk in chunks])
            outputs = [self.network.head(part) for part in features.split([len(x) for x in inputs])]
            return [{name: value.cpu() for name, value in output.items()} for output in outputs]

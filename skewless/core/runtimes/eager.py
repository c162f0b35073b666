"""PyTorch's eager mode."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from skewless.core.networks import Network, build_network
from skewless.core.networks.with_stages import through
from skewless.core.runtimes.runtime import DEFAULTS, Runtime, RuntimeSettings
from skewless.core.stages import Stage

WEIGHTS = "weights.safetensors"


class EagerRuntime(Runtime):
    """PyTorch's eager mode, on the CPU, on CUDA or on MPS.

    bf16: what `encode` multiplies is rounded to bfloat16, where PyTorch's autocast does so (its documentation lists the
    operators); sums, normalisation, absorbed stages and the head stay in float32, and so do the weights in the archive.
    On a CPU without AVX-512 or AMX instructions for bfloat16 that is slower than float32.
    """

    name = "eager"
    precisions = ("fp32", "bf16")

    def __init__(
        self,
        network: Network,
        device: torch.device,
        settings: RuntimeSettings = DEFAULTS,
        absorbed: Sequence[Stage] = (),
    ):
        self.network = network.to(device).eval()
        self.device, self.settings, self.absorbed = device, settings, tuple(absorbed)
        # Only from such memory does the copy to the GPU run while Python goes on.
        self._pinned = device.type == "cuda"

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
            except (RuntimeError, SafetensorError) as error:
                raise ValueError(f"{WEIGHTS} does not fit the network: {error}") from error
        return cls(built, device, settings, absorbed)

    def compute(self, inputs: Sequence[torch.Tensor]) -> list[dict[str, torch.Tensor]]:
        """Recordings, each `(S_i, ...)` float32 or float16, to each one's outputs on the CPU.

        All rows form one flat batch, so nothing is padded; heads see one recording at a time, so a recording's result
        cannot depend on its neighbours beyond the last bits that a batch size changes in a convolution.
        """
        if not inputs:
            return []
        # The outer context keeps arithmetic that a caller has switched on away from all but `encode`.
        with torch.inference_mode(), self._autocast(enabled=False):
            rows = torch.cat(list(inputs))
            if self._pinned:
                rows = rows.pin_memory()
            features = torch.cat([self._encode(chunk) for chunk in rows.split(self.settings.micro_batch)])
            outputs = [self.network.head(part) for part in features.split([len(x) for x in inputs])]
            return _to_host(outputs)

    def _encode(self, rows: torch.Tensor) -> torch.Tensor:
        # To float32 on the device: half the bytes to copy where the rows are float16.
        rows = through(self.absorbed, rows.to(self.device, non_blocking=True).float())
        with self._autocast(enabled=self.precision == "bf16"):
            return self.network.encode(rows).float()

    def _autocast(self, enabled: bool) -> torch.autocast:
        return torch.autocast(self.device.type, torch.bfloat16, enabled=enabled)


def _to_host(outputs: Sequence[Mapping[str, torch.Tensor]]) -> list[dict[str, torch.Tensor]]:
    """Outputs by name to the same ones on the CPU, by one copy: for each copy Python would wait for the device."""
    packed = [value.flatten().view(torch.uint8) for each in outputs for value in each.values()]
    parts = iter(torch.cat(packed).cpu().split([len(part) for part in packed]))
    # A clone begins where its type may begin, whatever came before it.
    return [
        {name: next(parts).clone().view(value.dtype).view(value.shape) for name, value in each.items()}
        for each in outputs
    ]

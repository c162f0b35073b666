"""A network with a pipeline's last stages in front of it."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from skewless.core.networks.network import Network
from skewless.core.stages import Signal, Stage


def through(stages: Sequence[Stage], rows: torch.Tensor) -> torch.Tensor:
    """Rows `(N, ...)` behind these stages, on the device that the rows are on."""
    signal = Signal(rows)
    for stage in stages:
        signal = stage(signal)
    return signal.data


class WithStages(Network):
    """What reaches `encode` is what comes before `stages`; the rest is `network`'s.

    stages: those that compute each row by itself from its values alone, such as `standardize`.
    """

    def __init__(self, network: Network, stages: Sequence[Stage]):
        super().__init__()
        self.network, self.stages = network, tuple(stages)
        # Read of the instance, as of any network.
        self.input_name = network.input_name  # type: ignore[misc]

    @property
    def files(self) -> tuple[str, ...]:
        return self.network.files

    def encode(self, x: torch.Tensor) -> torch.Tensor:
        """Rows `(N, ...)` as the stages take them to the network's features `(N, F)`."""
        return self.network.encode(through(self.stages, x))

    def head(self, features: torch.Tensor) -> dict[str, torch.Tensor]:
        """The network's own outputs, from one recording's features `(S, F)`."""
        return self.network.head(features)

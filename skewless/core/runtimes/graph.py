"""What the runtimes have in common that run the network as a graph in a file, without its Python code."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch

from skewless.core.networks import Network
from skewless.core.networks.with_stages import WithStages
from skewless.core.runtimes.runtime import Runtime, RuntimeSettings
from skewless.core.stages import Stage


class GraphRuntime(Runtime):
    """A runtime whose files hold the network, its weights and the absorbed stages. title: what messages call it."""

    title: ClassVar[str]

    @classmethod
    @abstractmethod
    def write_graphs(
        cls, network: Network, folder: Path, settings: RuntimeSettings, rows: Iterator[torch.Tensor]
    ) -> list[Path]:
        """Write the files of a network that begins with the absorbed stages, and return their paths.

        rows: its inputs `(S_i, ...)` float32 for some recordings. Raises ImportError where a package is missing; otherwise as
        `write`.
        """

    @classmethod
    @abstractmethod
    def open(cls, folder: Path, device: torch.device, settings: RuntimeSettings) -> Runtime:
        """The runtime with what `write_graphs` wrote into the folder; raises ValueError as `load` does."""

    @classmethod
    def write(
        cls,
        network: Network,
        folder: Path,
        settings: RuntimeSettings,
        examples: Iterable[torch.Tensor],
        absorbed: Sequence[Stage] = (),
    ) -> list[Path]:
        """The graph or graphs of the network, as `write_graphs` writes them."""
        whole = WithStages(network, absorbed) if absorbed else network
        try:
            return cls.write_graphs(whole, folder, settings, (example.float() for example in examples))
        except ImportError as error:
            needed = ", ".join((*cls.packages, *cls.build_packages))
            raise ValueError(
                f"a graph for {cls.title} is written with {needed}: {error}; install them with pip"
            ) from error

    @classmethod
    def load(
        cls,
        archive_dir: Path,
        network: Mapping[str, Any],
        device: torch.device,
        settings: RuntimeSettings,
        absorbed: Sequence[Stage] = (),
    ) -> Runtime:
        """The archive's graphs. Raises ValueError when the package is not installed, or cannot use the device."""
        if cls.devices == ("cpu",) and device.type != "cpu":
            raise ValueError(
                f"runtime '{cls.name}' computes on the CPU, not on device '{device}'; for that choose runtime 'eager'"
            )
        return cls.open(archive_dir, device, settings)

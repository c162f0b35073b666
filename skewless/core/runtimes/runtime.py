"""What a runtime is."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch

from skewless.core.networks import Network
from skewless.core.numerics import TIERS, TOLERANCES
from skewless.core.stages import Stage


@dataclass(frozen=True)
class RuntimeSettings:
    """A runtime's parameters in a model.yaml.

    precision: the arithmetic, one of the runtime's `precisions`.
    micro_batch: how many rows go through the network at once; it bounds memory, whatever the requests.
    absorb: the pipeline's last stages, in order, that the runtime computes together with the network, such as
        ("replicate", "standardize"). What reaches it is what comes before them: fewer values to copy. Only stages that
        compute each row by itself, from its values alone, can be absorbed.
    """

    precision: str = "fp32"
    micro_batch: int = 32
    absorb: tuple[str, ...] = ()

    def __post_init__(self):
        if self.precision not in TIERS:
            raise ValueError(f"precision is {self.precision!r}, expected one of {', '.join(TIERS)}")
        if self.micro_batch < 1:
            raise ValueError(f"micro_batch is {self.micro_batch}, expected at least 1")


DEFAULTS = RuntimeSettings()


class Runtime(ABC):
    """Executes a network: recordings, each `(S_i, ...)` float32 or float16, to each one's outputs by name, on the CPU.

    One more runtime is one more file with such a class, and its line in RUNTIMES: `write` makes an archive's files where
    the archive is built, `load` opens them where it is served.

    name: as definitions call it. devices: the kinds that it computes on. precisions: those that it has. calibrated: those of them whose value ranges are taken from
    training recordings when the archive is built. packages: those that compute the outputs, beside the network's own, as
    pip names them. build_packages: those that only `write` needs.
    precision: of this one. tier: "exact" or "reduced", which sets the tolerance: how far an output may be from the one
    recorded at the build, and a probability from the evaluated one.
    """

    name: ClassVar[str]
    devices: ClassVar[tuple[str, ...]] = ("cpu", "cuda", "mps")
    precisions: ClassVar[tuple[str, ...]] = ("fp32",)
    calibrated: ClassVar[tuple[str, ...]] = ()
    packages: ClassVar[tuple[str, ...]] = ("torch",)
    build_packages: ClassVar[tuple[str, ...]] = ()

    settings: RuntimeSettings
    device: torch.device

    @classmethod
    @abstractmethod
    def write(
        cls,
        network: Network,
        folder: Path,
        settings: RuntimeSettings,
        examples: Iterable[torch.Tensor],
        absorbed: Sequence[Stage] = (),
    ) -> list[Path]:
        """Write what `load` will need of a trained network into an archive's folder, and return the files' paths.

        absorbed: the stages that go before the network, those that `settings.absorb` names.
        examples: for some recordings what those stages take, `(S_i, ...)`, computed as it is asked for. The first gives the
            shape of a row; a precision in `calibrated` takes its value ranges from all of them.
        The same network and examples give the same bytes. Raises ValueError for a network that this runtime cannot execute.
        """

    @classmethod
    @abstractmethod
    def load(
        cls,
        archive_dir: Path,
        network: Mapping[str, Any],
        device: torch.device,
        settings: RuntimeSettings,
        absorbed: Sequence[Stage] = (),
    ) -> Runtime:
        """The runtime with an unpacked archive's weights. Raises ValueError when they do not fit, or the device cannot be used."""

    def __call__(self, inputs: Sequence[torch.Tensor]) -> list[dict[str, torch.Tensor]]:
        """Recordings, each `(S_i, ...)` float32 or float16, to each one's outputs on the CPU. What one recording gets does not
        depend on the others. One of no rows, S_i = 0, has no outputs: the network has nothing to say of it."""
        computed = iter(self.compute([rows for rows in inputs if len(rows)]))
        return [next(computed) if len(rows) else {} for rows in inputs]

    @abstractmethod
    def compute(self, inputs: Sequence[torch.Tensor]) -> list[dict[str, torch.Tensor]]:
        """What the call gives for recordings of at least one row each."""

    @property
    def rows_at_once(self) -> int:
        """How many rows are worth waiting for before the runtime is called."""
        return self.settings.micro_batch

    @property
    def precision(self) -> str:
        return self.settings.precision

    @property
    def tier(self) -> str:
        return TIERS[self.precision]

    @property
    def tolerance(self) -> float:
        return TOLERANCES[self.tier]

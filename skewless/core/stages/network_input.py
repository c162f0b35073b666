"""From one-channel images to the network's input."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch

from skewless.core.stages.stage import Signal, Stage, Tolerance

_DTYPES = {"float16": torch.float16, "float32": torch.float32}


@dataclass(frozen=True)
class Cast(Stage, name="cast"):
    """Round to a narrower floating-point type, as a training cache on disk does. The output has that type."""

    unit: ClassVar[str] = "image value"
    tolerance: ClassVar[Tolerance] = Tolerance(1.4e-4, 0.013, "a value near a step may round to the next float16")

    dtype: Literal["float16"]

    def __call__(self, signal: Signal) -> Signal:
        return signal.of(signal.data.to(_DTYPES[self.dtype]))


@dataclass(frozen=True)
class Replicate(Stage, name="replicate"):
    """Repeat a one-channel image: `(S, H, W) -> (S, channels, H, W)`."""

    unit: ClassVar[str] = ""
    cheap: ClassVar[bool] = True

    channels: int

    def __post_init__(self):
        self.require(self.channels > 0, f"channels is {self.channels}, expected at least 1")

    def __call__(self, signal: Signal) -> Signal:
        return signal.of(signal.data.unsqueeze(1).repeat(1, self.channels, 1, 1))


@dataclass(frozen=True)
class Standardize(Stage, name="standardize"):
    """Map `input_range` to [0, 1], subtract `mean`, divide by `std`, per channel: `(S, C, H, W)` float32 out.

    `arithmetic` is the type in which the map to [0, 1] is computed; "float16" is up to 1.1e-3 away from "float32"
    in the result.
    """

    unit: ClassVar[str] = "network input"
    cheap: ClassVar[bool] = True
    tolerance: ClassVar[Tolerance] = Tolerance(3e-4, 0.03, "scaled decibels times 2.2")

    mean: tuple[float, ...]
    std: tuple[float, ...]
    input_range: tuple[float, ...] = (-1.0, 1.0)
    arithmetic: Literal["float32", "float16"] = "float32"

    def __post_init__(self):
        self.require(len(self.mean) == len(self.std), f"{len(self.mean)} means but {len(self.std)} standard deviations")
        self.require(len(self.std) > 0, "mean and std are empty, expected one number per channel")
        self.require(min(self.std) > 0, f"std is {list(self.std)}, expected positive numbers")
        low_high = len(self.input_range) == 2 and self.input_range[0] < self.input_range[1]
        self.require(low_high, f"input_range is {list(self.input_range)}, expected [low, high]")

    def __call__(self, signal: Signal) -> Signal:
        mean = torch.tensor(self.mean, device=signal.data.device).view(1, -1, 1, 1)
        std = torch.tensor(self.std, device=signal.data.device).view(1, -1, 1, 1)
        return signal.of((self.unit_range(signal.data) - mean) / std)

    def unit_range(self, data: torch.Tensor) -> torch.Tensor:
        """`input_range` mapped to [0, 1], in the type that `arithmetic` says."""
        low, high = self.input_range
        return (data.to(_DTYPES[self.arithmetic]) - low) / (high - low)

"""Stages of this model's own. pipeline.yaml names them as `stages.py:Class`; this file travels in the archive."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from skewless.core.stages import Signal, Stage, Tolerance


@dataclass(frozen=True)
class PreEmphasis(Stage, name="pre_emphasis"):
    """y[n] = x[n] - coefficient x[n - 1], which lifts high frequencies: waveform `(1, N)` float32 to `(1, N)`."""

    # What the values are, and how exactly another machine has to reproduce them.
    unit: ClassVar[str] = "full scale"
    tolerance: ClassVar[Tolerance] = Tolerance(4e-6, 4e-4, "a float32 difference of resampled samples")
    # Whose versions belong to the numbers.
    packages: ClassVar[tuple[str, ...]] = ("torch",)

    coefficient: float

    def __post_init__(self):
        self.require(0 <= self.coefficient < 1, f"coefficient is {self.coefficient}, expected a number in [0, 1)")

    def __call__(self, signal: Signal) -> Signal:
        x = signal.data
        return signal.of(torch.cat([x[:, :1], x[:, 1:] - self.coefficient * x[:, :-1]], dim=1))

"""The model as the peers run it: the archive's own pipeline and postprocessor, and the eager network."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import torch

from skewless.core.definition import Definition
from skewless.core.runtimes.eager import EagerRuntime
from skewless.core.runtimes.runtime import DEFAULTS

FOLDER = "SKEWLESS_BENCHMARK_ARCHIVE"  # environment variable: the unpacked archive


class EagerModel:
    """Encoded recordings to scores, in two steps, as servers with batching want them."""

    def __init__(self) -> None:
        folder = Path(os.environ[FOLDER])
        self.definition = Definition.read(folder)
        self.definition.precision.apply()
        self.runtime = EagerRuntime.load(folder, self.definition.network, torch.device("cpu"), DEFAULTS)

    def prepare(self, payload: bytes) -> torch.Tensor:
        """One recording to the network's input `(S, ...)`."""
        return self.definition.pipeline.run(payload).data

    def infer(self, inputs: Sequence[torch.Tensor]) -> list[list[float]]:
        """The scores of each recording; all rows go through the network as one flat batch."""
        return [list(self.definition.postprocessor.scores(outputs)) for outputs in self.runtime(inputs)]

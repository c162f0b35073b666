"""BentoML with the archive's pipeline, the eager network, and its adaptive batching with the documented defaults.

https://docs.bentoml.com/en/latest/get-started/adaptive-batching.html
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import bentoml

from benchmarks.peers.eager import EagerModel


@bentoml.service(traffic={"timeout": 120})
class Recordings:
    """One worker, BentoML's default."""

    def __init__(self) -> None:
        self.model = EagerModel()

    @bentoml.api(batchable=True)
    def predict(self, recordings: list[Path]) -> list[dict[str, Any]]:
        scores = self.model.infer([self.model.prepare(path.read_bytes()) for path in recordings])
        return [{"scores": each} for each in scores]

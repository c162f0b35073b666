"""A plain TorchServe handler, as TorchServe's documentation of BaseHandler has it: one recording after the other.

https://pytorch.org/serve/custom_service.html
"""

from __future__ import annotations

from typing import Any

import torch
from ts.torch_handler.base_handler import BaseHandler

from benchmarks.peers.eager import EagerModel


class PlainHandler(BaseHandler):
    """initialize, preprocess, inference, postprocess; BaseHandler.handle calls the last three."""

    def initialize(self, context: Any) -> None:
        self.model = EagerModel()
        self.context = context
        self.initialized = True

    def preprocess(self, data: list[dict[str, Any]]) -> list[torch.Tensor]:
        return [self.model.prepare(bytes(row.get("data") or row["body"])) for row in data]

    def inference(self, data: list[torch.Tensor], *args: Any, **kwargs: Any) -> list[list[float]]:
        return [self.model.infer([recording])[0] for recording in data]

    def postprocess(self, data: list[list[float]]) -> list[dict[str, Any]]:
        return [{"scores": scores} for scores in data]

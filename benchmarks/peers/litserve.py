"""LitServe with the archive's pipeline, the eager network, and batching as its documentation shows it.

https://lightning.ai/docs/litserve/features/batching
"""

from __future__ import annotations

import sys
from typing import Any

import litserve
import torch

from benchmarks.peers.eager import EagerModel


class Api(litserve.LitAPI):
    """LitServe calls decode_request for every request, batch and predict for what came together, then unbatch."""

    def setup(self, device: str) -> None:
        self.model = EagerModel()

    # Without a type for `request`: LitServe would take one for the shape of a JSON body.
    def decode_request(self, request) -> torch.Tensor:
        return self.model.prepare(request["data"].file.read())

    def batch(self, inputs: list[torch.Tensor]) -> list[torch.Tensor]:
        return list(inputs)

    def predict(self, x: list[torch.Tensor]) -> list[list[float]]:
        return self.model.infer(x)

    def unbatch(self, output: list[list[float]]) -> list[list[float]]:
        return output

    def encode_response(self, output: list[float]) -> dict[str, Any]:
        return {"scores": output}


if __name__ == "__main__":
    api = Api(max_batch_size=8, batch_timeout=0.1)
    server = litserve.LitServer(api, accelerator="cpu", timeout=120)
    server.run(host="127.0.0.1", port=int(sys.argv[1]), generate_client_file=False)

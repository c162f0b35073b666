"""Ray Serve with the archive's pipeline, the eager network, and `@serve.batch` with its documented defaults.

https://docs.ray.io/en/latest/serve/advanced-guides/dyn-req-batch.html
"""

from __future__ import annotations

import os
import sys
import threading
from typing import Any

import ray
from ray import serve
from starlette.requests import Request

from benchmarks.peers.eager import FOLDER, EagerModel

CORES = len(os.sched_getaffinity(0))


class Recordings:
    """One replica, Ray Serve's default."""

    def __init__(self) -> None:
        self.model = EagerModel()

    @serve.batch
    async def predict(self, payloads: list[bytes]) -> list[list[float]]:
        return self.model.infer([self.model.prepare(payload) for payload in payloads])

    async def __call__(self, request: Request) -> dict[str, Any]:
        if request.method == "GET":
            return {"ready": True}
        return {"scores": await self.predict(await request.body())}


if __name__ == "__main__":
    variables = {name: os.environ[name] for name in (FOLDER, "PYTHONPATH")}
    ray.init(
        num_cpus=CORES,
        _node_ip_address="127.0.0.1",
        include_dashboard=False,
        _temp_dir=os.environ["TMPDIR"],
        runtime_env={"env_vars": variables},
        object_store_memory=256 * 2**20,
    )
    serve.start(http_options={"host": "127.0.0.1", "port": int(sys.argv[1])})
    # Ray gives a replica as many threads as it has processors, one by default; and lets five requests into it at once, fewer
    # than a batch.
    deploy = serve.deployment(ray_actor_options={"num_cpus": CORES}, max_ongoing_requests=32)
    serve.run(deploy(Recordings).bind(), route_prefix="/predict")
    threading.Event().wait()

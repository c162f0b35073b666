"""The end of a server without the end of requests: what is under way is answered first.

TorchServe itself waits for gRPC calls when it is told to end, and resets REST connections within a tenth of a second, whatever they
wait for (measured, TorchServe 0.12). It does not say how many requests are under way. So this looks at what they need: a
request that has just come counts in TorchServe's metrics, one that waits is in a model's queue, and one that is being answered
uses a worker's processor time.
"""

from __future__ import annotations

import contextlib
import re
import time
from dataclasses import dataclass

import psutil
import requests

from skewless.errors import ServerError
from skewless.torchserve.server import Server, session

# No request, none waiting and no work for this long: nothing is under way. Longer than a scheduler keeps a process from its turn.
QUIET_S = 1.0
_LOOK_EVERY_S = 0.1
# A worker that waits for requests uses none; the kernel counts in steps of a hundredth of a second.
_IDLE_CPU_S = 0.03

_ARRIVED = re.compile(r"^ts_inference_requests_total\{.*\} ([0-9.eE+]+)$", re.MULTILINE)


@dataclass(frozen=True)
class _Look:
    """What is seen at one moment. cpu_s: processor time that the workers have used. busy: whether one is at it, or waits for a disk."""

    arrived: float
    waiting: int
    cpu_s: float
    busy: bool
    pids: frozenset[int]

    def quiet_since(self, before: _Look) -> bool:
        same = (self.arrived, self.pids) == (before.arrived, before.pids)
        return same and not self.waiting and not self.busy and self.cpu_s - before.cpu_s <= _IDLE_CPU_S


def drain(server: Server, limit_s: float) -> bool:
    """Return True as soon as nothing is under way, False when something still is after `limit_s` seconds, or cannot be seen.

    Requests that come meanwhile are answered, too: whoever sends them has to be told beforehand to send no more, by the readiness
    check. A body that is still being uploaded is not under way.
    """
    deadline = time.monotonic() + limit_s
    first, since = _look(server), time.monotonic()
    while True:
        if first and time.monotonic() - since >= QUIET_S:
            return True
        if time.monotonic() >= deadline:
            return False
        time.sleep(_LOOK_EVERY_S)
        now = _look(server)
        if first is None or now is None or not now.quiet_since(first):
            first, since = now, time.monotonic()


def _look(server: Server) -> _Look | None:
    """None where TorchServe does not answer."""
    try:
        with session() as connection:
            answer = connection.get(f"{server.metrics_url}/metrics", timeout=10.0)
        answer.raise_for_status()
        waiting = _waiting(server)
    except (requests.RequestException, ServerError):
        return None
    cpu_s, busy, pids = 0.0, False, set()
    for worker in server.workers():
        with contextlib.suppress(psutil.NoSuchProcess):
            times = worker.cpu_times()
            cpu_s += times.user + times.system
            busy |= worker.status() in (psutil.STATUS_RUNNING, psutil.STATUS_DISK_SLEEP)
            pids.add(worker.pid)
    return _Look(sum(map(float, _ARRIVED.findall(answer.text))), waiting, cpu_s, busy, frozenset(pids))


def _waiting(server: Server) -> int:
    """How many requests the models' queues hold."""
    return sum(
        int(
            server.manage("GET", f"/models/{model['name']}/{model['version']}").json()[0]["jobQueueStatus"][
                "pendingRequests"
            ]
        )
        for model in server.models()
    )

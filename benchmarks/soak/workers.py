"""A server's workers over time: which have died, and what each has in memory. Linux only."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass, field

import psutil
from scipy.stats import linregress

from benchmarks.processes import peak_bytes
from skewless.torchserve.server import Server

MOST_SAMPLES = 20_000  # of one worker; every second one is dropped then


@dataclass
class Worker:
    """One worker process of a model. samples: seconds and resident bytes; peak: the largest by the kernel's own mark.

    died_s: when it was first missed. idle: resident bytes before the first request.
    """

    model: str
    process: psutil.Process
    idle: int = 0
    peak: int = 0
    died_s: float | None = None
    samples: list[tuple[float, int]] = field(default_factory=list)

    @property
    def pid(self) -> int:
        return self.process.pid

    def look(self, now: float) -> bool:
        """Take a sample; False when the process has ended."""
        try:
            if self.process.status() == psutil.STATUS_ZOMBIE or not self.process.is_running():
                return False
            self.samples.append((now, self.process.memory_info().rss))
        except psutil.NoSuchProcess:
            return False
        self.peak = max(self.peak, peak_bytes(self.pid), self.samples[-1][1])
        if len(self.samples) > MOST_SAMPLES:
            del self.samples[::2]
        return True


def slope(samples: Sequence[tuple[float, float]]) -> tuple[float, float] | None:
    """The samples' slope per second by least squares, with its standard error; None for fewer than ten.

    The error is that of independent samples. Those of one process are not, so it is too small.
    """
    if len(samples) < 10:
        return None
    times, values = zip(*samples, strict=True)
    fit = linregress(times, values)
    return float(fit.slope), float(fit.stderr)


class Watch:
    """All workers of a server, those that took the place of others too. `look` is called about once a second."""

    def __init__(self, server: Server, models: Sequence[tuple[str, str]]) -> None:
        """models: names and versions. Raises ServerError when the server does not answer."""
        self._server = server
        self._models = models
        self._lock = threading.Lock()
        self.workers = [worker for name, version in models for worker in self._ask(name, version)]
        self._wanted = {name: len(self.living(name)) for name, _ in models}
        for worker in self.workers:
            worker.look(0.0)
            worker.idle = worker.samples[-1][1]

    def living(self, model: str) -> list[Worker]:
        return [worker for worker in self.workers if worker.model == model and worker.died_s is None]

    def look(self, now: float) -> list[Worker]:
        """Take a sample of every worker, find those that replace others, and return those that have ended since."""
        with self._lock:
            dead = [worker for worker in self.workers if worker.died_s is None and not worker.look(now)]
            for worker in dead:
                worker.died_s = now
            for name, version in self._models:
                if len(self.living(name)) < self._wanted[name]:
                    # The ended ones, too: TorchServe may still list them.
                    known = {worker.process for worker in self.workers}
                    self.workers += [new for new in self._ask(name, version) if new.process not in known]
            return dead

    def _ask(self, name: str, version: str) -> list[Worker]:
        (described,) = self._server.manage("GET", f"/models/{name}/{version}").json()
        found = []
        for row in described["workers"]:
            try:
                process = psutil.Process(int(row["pid"]))
                # A process id that has gone to somebody else is none of the server's.
                if self._server.pid in {parent.pid for parent in process.parents()}:
                    found.append(Worker(name, process))
            except (psutil.NoSuchProcess, ValueError):
                # One that is being started has no process id yet.
                continue
        return found

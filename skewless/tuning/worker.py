"""What runs while it is measured: one worker in this process, or several at once, each in a process of its own."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import cycle, islice
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Protocol

import torch

from skewless.core.definition import Definition
from skewless.core.request import Request, RequestError
from skewless.core.service import Inferred, ModelService, Prepared
from skewless.errors import CheckFailedError

MICRO_BATCHES = (1, 2, 4, 8, 16, 32)


@dataclass(frozen=True)
class Setup:
    """What a worker loads. folders: by runtime, unpacked archives that differ in it alone. references: files to answer.
    threads: of one worker."""

    folders: Mapping[str, Path]
    references: tuple[Path, ...]
    threads: int


@dataclass(frozen=True)
class Task:
    """Answer everything `passes` times with one runtime and one micro-batch."""

    runtime: str
    micro_batch: int
    passes: int


@dataclass(frozen=True)
class Done:
    """A task's start and end, in seconds of the machine's monotonic clock, and the scores of every recording."""

    started: float
    ended: float
    scores: tuple[tuple[float, ...], ...]


class Worker:
    """Every runtime, loaded as a server's worker loads it, and the references as the pipeline prepares them.

    A pass answers the references, which come at once as in a full batch, and then, where references have several rows, one
    recording of as many rows as the largest micro-batch, alone: the references are often short, and a micro-batch larger
    than a recording is never filled. Where they have one row each, they are repeated up to that many instead.

    rows: of one pass. faults: the runtimes that cannot be loaded, with the reason.
    Raises ValueError for a reference that cannot be read.
    """

    def __init__(self, setup: Setup):
        faults: dict[str, str] = {}
        self._services: dict[str, ModelService] = {}
        for name, folder in setup.folders.items():
            definition = Definition.read(folder)
            replace(definition.precision, threads=setup.threads).apply()
            try:
                runtime = definition.load_runtime(torch.device("cpu"))
            except ValueError as error:
                faults[name] = str(error)
                continue
            self._services[name] = ModelService(definition, runtime, metrics={})
        self.faults: Mapping[str, str] = faults
        self._calls = self._load(setup.references)
        self.rows = sum(len(each.signal.data) for call in self._calls for each in call)

    def run(self, task: Task) -> Done | str:
        """The reason, where the runtime fails."""
        service = self._services[task.runtime]
        service.runtime.settings = replace(service.runtime.settings, micro_batch=task.micro_batch)
        started = time.monotonic()
        for _ in range(task.passes):
            inferred = [each for call in self._calls for each in service.infer(iter(call))]
        ended = time.monotonic()
        if failed := next((each for each in inferred if isinstance(each, RequestError)), None):
            cause = failed.__cause__
            return f"{type(cause).__name__}: {cause}" if cause else failed.message
        scores = [service.postprocessor.scores(each.outputs) for each in inferred if isinstance(each, Inferred)]
        return Done(started, ended, tuple(scores))

    def _load(self, references: tuple[Path, ...]) -> list[list[Prepared]]:
        """What the network is called with, one list per call of the service."""
        if not self._services:
            return []
        service = next(iter(self._services.values()))
        prepared: list[Prepared] = []
        for path, each in zip(references, service.prepare([Request(p.read_bytes()) for p in references]), strict=True):
            if isinstance(each, RequestError):
                raise ValueError(f"reference {path} cannot be read: {each.message}")
            prepared.append(each)
        wanted = max(MICRO_BATCHES)
        if all(len(each.signal.data) == 1 for each in prepared):
            return [list(islice(cycle(prepared), max(wanted, len(prepared))))]
        rows = torch.cat([each.signal.data for each in prepared])
        longest = rows[torch.arange(wanted) % len(rows)]
        return [prepared, [replace(prepared[0], signal=prepared[0].signal.of(longest))]]


class Crew(Protocol):
    """Workers that run the same task at once. rows, faults: as one worker has them."""

    rows: int
    faults: Mapping[str, str]

    def run(self, task: Task) -> list[Done | str]:
        """What each worker has done."""


@contextlib.contextmanager
def crew_of(count: int, setup: Setup) -> Iterator[Crew]:
    """One worker in this process, or `count` in processes of their own, which end on leaving."""
    if count > 1:
        with _Processes(count, setup) as processes:
            yield processes
        return
    threads = torch.get_num_threads()
    try:
        yield _Alone(setup)
    finally:
        torch.set_num_threads(threads)


class _Alone:
    def __init__(self, setup: Setup):
        self._worker = Worker(setup)
        self.rows, self.faults = self._worker.rows, self._worker.faults

    def run(self, task: Task) -> list[Done | str]:
        return [self._worker.run(task)]


class _Processes:
    def __init__(self, count: int, setup: Setup):
        # Threads, which torch has, do not survive a fork.
        context = multiprocessing.get_context("spawn")
        self._members = []
        try:
            for _ in range(count):
                ours, theirs = context.Pipe()
                process = context.Process(target=_serve, args=(theirs, setup), daemon=True)
                process.start()
                theirs.close()
                self._members.append((process, ours))
            ready = [self._receive(number) for number in range(count)]
        except BaseException:
            self.__exit__()
            raise
        self.rows, self.faults = ready[0]

    def run(self, task: Task) -> list[Done | str]:
        for _, connection in self._members:
            connection.send(task)
        return [self._receive(number, task) for number in range(len(self._members))]

    def __enter__(self) -> _Processes:
        return self

    def __exit__(self, *_: object) -> None:
        for process, connection in self._members:
            connection.close()
            process.join(timeout=5)
            if process.is_alive():
                process.kill()
                process.join()

    def _receive(self, number: int, task: Task | None = None) -> Any:
        process, connection = self._members[number]
        try:
            return connection.recv()
        except EOFError:
            process.join()
            raise CheckFailedError(
                f"worker {number + 1} of {len(self._members)} ended with exit code {process.exitcode} "
                f"{'while it loaded' if task is None else f'while it ran {task.runtime}, micro-batch {task.micro_batch}'}; if "
                "its reason is not above, memory was short: choose fewer --workers"
            ) from None


def _serve(connection: Connection, setup: Setup) -> None:
    """The life of one process: load, then run tasks until the other end closes."""
    # What libraries print would stand in the command's result.
    os.dup2(2, 1)
    worker = Worker(setup)
    connection.send((worker.rows, worker.faults))
    with contextlib.suppress(EOFError, KeyboardInterrupt):
        while True:
            connection.send(worker.run(connection.recv()))

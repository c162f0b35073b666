"""Closed-loop load: so many callers, each sending its next upload once it has its answer. Every answer is checked."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from benchmarks.uploads import Upload
from skewless.core.cascade import apart

Scores = Sequence[float]


class WrongAnswer(Exception):
    """An answer that is no prediction, or another one than expected. The message says which."""


@dataclass(frozen=True)
class Lane:
    """One way to ask one server.

    send: an upload to its scores; raises WrongAnswer for anything but a prediction. May be called by several threads.
    expected: by the upload's kind, the scores that every answer is held to within `tolerance`.
    reference: by kind, the scores that training's pipeline and the runtime's own network give in process; deviations are
        reported from these.
    cpu_seconds, peak_bytes: of the server's processes; no memory where the network runs in this process.
    most: callers at once that it is measured with.
    """

    server: str
    protocol: str
    send: Callable[[Upload], Scores]
    expected: dict[str, Scores]
    reference: dict[str, Scores]
    tolerance: float
    cpu_seconds: Callable[[], float]
    peak_bytes: Callable[[], int | None]
    most: int = 10_000

    @property
    def name(self) -> str:
        return f"{self.server}, {self.protocol}"


@dataclass(frozen=True)
class Load:
    """A load: which uploads, and how many callers at once."""

    name: str
    uploads: Sequence[Upload]
    concurrency: int


@dataclass
class Cell:
    """One lane under one load in one round.

    latencies_s: by kind. elapsed_s: from the first request to the last answer. cpu_s: of the server's processes in that
    time. peak_bytes: the servers' high-water mark at the end, which no cell lowers. failure: why the cell has no figures.
    """

    round: int
    server: str
    protocol: str
    load: str
    concurrency: int
    requests: int = 0
    segments: int = 0
    elapsed_s: float = 0.0
    cpu_s: float = 0.0
    peak_bytes: int | None = None
    max_deviation: float = 0.0
    latencies_s: dict[str, list[float]] = field(default_factory=dict)
    failure: str | None = None

    @property
    def name(self) -> str:
        return f"{self.server}, {self.protocol}"


def deviation(scores: Scores, expected: Scores) -> float:
    """The largest difference of a score, infinite where one is not a number. Raises WrongAnswer when there are not as many."""
    if len(scores) != len(expected):
        raise WrongAnswer(f"answered {len(scores)} scores, expected {len(expected)}")
    return apart(scores, expected)


def check(lane: Lane, upload: Upload, scores: Scores) -> float:
    """How far an answer is from the reference. Raises WrongAnswer when it is not the expected one."""
    wrong = deviation(scores, lane.expected[upload.kind])
    if not wrong <= lane.tolerance:
        raise WrongAnswer(
            f"{upload.kind}: answered {list(scores)}, expected {list(lane.expected[upload.kind])} within {lane.tolerance:g}"
        )
    return deviation(scores, lane.reference[upload.kind])


def run_cell(lane: Lane, load: Load, seconds: float, segments: dict[str, int], number: int) -> Cell:
    """Load a lane for at least `seconds`, then until the uploads' turn is complete and every answer is there.

    Whole turns only, so that all lanes did the same work per request.
    segments: rows that the network computes, by kind. number: the round's.
    """
    cell = Cell(number, lane.server, lane.protocol, load.name, load.concurrency)
    lock, given = threading.Lock(), 0
    cpu, started = lane.cpu_seconds(), time.perf_counter()

    def next_upload() -> Upload | None:
        nonlocal given
        with lock:
            turn_is_complete = given and given % len(load.uploads) == 0
            if cell.failure or (turn_is_complete and time.perf_counter() - started >= seconds):
                return None
            given += 1
            return load.uploads[(given - 1) % len(load.uploads)]

    def caller() -> None:
        while upload := next_upload():
            try:
                sent = time.perf_counter()
                scores = lane.send(upload)
                taken = time.perf_counter() - sent
                apart = check(lane, upload, scores)
            except Exception as error:
                kind = "" if isinstance(error, WrongAnswer) else f"{type(error).__name__}: "
                with lock:
                    cell.failure = cell.failure or f"{kind}{error}"
                return
            with lock:
                cell.latencies_s.setdefault(upload.kind, []).append(taken)
                cell.segments += segments[upload.kind]
                cell.max_deviation = max(cell.max_deviation, apart)

    callers = [threading.Thread(target=caller) for _ in range(load.concurrency)]
    for each in callers:
        each.start()
    for each in callers:
        each.join()
    cell.elapsed_s = time.perf_counter() - started
    cell.cpu_s, cell.peak_bytes = lane.cpu_seconds() - cpu, lane.peak_bytes()
    cell.requests = sum(map(len, cell.latencies_s.values()))
    return cell

"""What a worker records of every file that it answers: counts for a metrics endpoint, and a journal with a line per file.

Recording never fails an answer and never waits for a disk: what cannot be recorded is counted and left out.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import time
from bisect import bisect_left
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from queue import Full, Queue
from threading import Thread
from typing import TYPE_CHECKING, Any

from skewless.core.files import atomic
from skewless.core.request import BatchRequest, Request, RequestError

if TYPE_CHECKING:  # whoever reads a journal needs no torch
    from skewless.core.postprocess import Postprocessor
    from skewless.core.service import ModelService, Response

# A folder for the journal; without it there is none. Set by whoever starts the server.
JOURNAL = "SKEWLESS_JOURNAL"
# How many of the last uploads to keep beside the journal, to compare two versions on; without it, none.
KEEP_UPLOADS = "SKEWLESS_KEEP_UPLOADS"
KEPT = "kept"  # the folder of these uploads, in the journal's

# The histogram of the evaluation's scores in an archive's metrics, and its bins where there is none.
HISTOGRAM = "score_histogram"
EDGES = tuple(number / 20 for number in range(21))

MAX_JOURNAL_BYTES = 64 * 2**20  # of one file
KEPT_JOURNALS = 2  # full files that a worker keeps, and that are kept of all workers before it
_MAX_ID = 200  # characters of a request's id
_MAX_WAITING = 4096  # lines that wait for the disk
_PAUSE_S = 0.05
_MAX_UPLOADS_WAITING = 8
_MAX_UPLOAD_BYTES = 8 * 2**20

# What is wrong with a file that is refused, by the status that it gets.
_KINDS = {200: "answered", 400: "malformed", 413: "too_large", 415: "unsupported", 503: "no_time"}

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Answered:
    """One answered file: a line of the journal.

    time: when it was answered, in seconds since 1970. id: the request's X-Request-Id, or None. sha256: of the file; None for a
    request that had none. status: what an HTTP answer says. score: the probability that the decision was made on; None, as
    choice is, where there was no decision. choice: the name of the chosen class. truncated: whether only the start of the
    recording counted; None where the model has no such thing. seconds: that the worker took for the batch that the file came
    in.
    """

    time: float
    model: str
    version: str
    id: str | None
    sha256: str | None
    status: int
    score: float | None
    choice: str | None
    threshold: float
    truncated: bool | None
    seconds: float


@dataclass(frozen=True)
class File:
    """One file of a request with its answer. kind: of the answer, such as "answered" or "too_large"."""

    payload: bytes | None
    status: int
    kind: str
    body: Mapping[str, Any]


def files_of(request: Request | BatchRequest | RequestError, response: Response) -> Iterator[File]:
    """Every file of a request; a request that was refused as a whole counts as one."""
    if isinstance(request, RequestError):
        yield File(None, response.status, "request" if response.status < 500 else "fault", response.body)
        return
    if isinstance(request, Request):
        given: Sequence[bytes | RequestError] = [request.payload]
        bodies = [response.body]
    else:
        given = list(request.files.values())
        # Where the answer as a whole could not be written, that is every file's answer.
        bodies = list(response.body.get("results", dict.fromkeys(request.files, response.body)).values())
    for each, body in zip(given, bodies, strict=True):
        status = body.get("code", 200)
        payload = None if isinstance(each, RequestError) else each
        yield File(payload, status, _KINDS.get(status, "fault"), body)


def decided(postprocessor: Postprocessor, body: Mapping[str, Any]) -> tuple[float, str]:
    """The probability that an answer was decided on, and the chosen class: of two classes the probability of the second, of
    more that of the chosen one."""
    scores, chosen = postprocessor.read(body)
    return scores[0] if len(scores) == 1 else scores[chosen], postprocessor.classes[chosen]


class Bins:
    """The bins of a histogram of scores, each known by its upper edge.

    edges: rising; a score belongs to the first bin whose upper edge is not below it.
    """

    def __init__(self, edges: Sequence[float] = EDGES):
        self.names = [f"{edge:g}" for edge in edges[1:]]
        self._inner = list(edges[1:-1])

    def __call__(self, score: float) -> str:
        return self.names[bisect_left(self._inner, score)]


class Telemetry:
    """Records what a service answered. counts of `record` are those of one call, to be added to what is exported.

    model, version: by which all is labelled. journal: None for no journal.
    """

    def __init__(self, service: ModelService, model: str, version: str, journal: Journal | None = None):
        self._service, self._model, self._version = service, model, version
        self._journal = journal
        self.reference: Mapping[str, Any] | None = service.metrics.get(HISTOGRAM)
        self.bins = Bins(self.reference["edges"] if self.reference else EDGES)

    def record(
        self,
        requests: Sequence[Request | BatchRequest | RequestError],
        responses: Sequence[Response],
        headers: Sequence[Mapping[str, Any]],
        seconds: float,
    ) -> Counter[tuple[str, ...]]:
        """Write the journal's lines, and return how often each thing was seen: ("files", status, kind), ("scores", bin),
        ("decisions", class), ("truncated",)."""
        counts: Counter[tuple[str, ...]] = Counter()
        now = time.time()
        for request, response, header in zip(requests, responses, headers, strict=True):
            asked = getattr(request, "threshold", None)
            for file in files_of(request, response):
                counts["files", str(file.status), file.kind] += 1
                score = choice = truncated = None
                if file.status == 200:
                    score, choice = decided(self._service.postprocessor, file.body)
                    truncated = file.body.get("truncated")
                    counts["scores", self.bins(score)] += 1
                    counts["decisions", choice] += 1
                    counts["truncated",] += bool(truncated)
                if self._journal is None:
                    continue
                line = Answered(
                    time=now,
                    model=self._model,
                    version=self._version,
                    id=_id_of(header),
                    sha256=None if file.payload is None else hashlib.sha256(file.payload).hexdigest(),
                    status=file.status,
                    score=score,
                    choice=choice,
                    threshold=self._service.threshold if asked is None else asked,
                    truncated=truncated,
                    seconds=seconds,
                )
                self._journal.write(line, file.payload)
        return counts


def _id_of(headers: Mapping[str, Any]) -> str | None:
    for name, value in headers.items():
        if name.lower() == "x-request-id" and isinstance(value, str):
            return value[:_MAX_ID]
    return None


class Journal:
    """Lines of `Answered` in a file of this process, written by a thread of its own.

    The file is FOLDER/MODEL-VERSION-PID.jsonl. One that has `max_bytes` becomes ...jsonl.1, the one before it ...jsonl.2, and
    so on to KEPT_JOURNALS. Of processes that have ended, so many bytes are kept, the newest.

    keep: how many of the last uploads to keep in FOLDER/kept, each under its SHA-256, without those over 8 MiB.
    lost: lines that could not be written, because the disk was full or too slow.
    """

    def __init__(self, folder: Path, model: str, version: str, keep: int = 0, max_bytes: int = MAX_JOURNAL_BYTES):
        self._kept, self._keep, self._max_bytes = folder / KEPT, keep, max_bytes
        self._start = Path(f"{model}-{version}-").name
        self._path = folder / f"{self._start}{os.getpid()}.jsonl"
        self._waiting: Queue[tuple[Answered, bytes | None]] = Queue(_MAX_WAITING)
        self._thread: Thread | None = None
        self._cut = False
        self.lost = 0

    @classmethod
    def of_environment(cls, model: str, version: str) -> Journal | None:
        """The journal that this process is to write, as the environment has it; None for none."""
        if not (folder := os.environ.get(JOURNAL)):
            return None
        keep = os.environ.get(KEEP_UPLOADS, "0")
        if not keep.isdecimal():
            raise ValueError(f"{KEEP_UPLOADS} is {keep!r}, expected how many uploads to keep, such as 100")
        return cls(Path(folder), model, version, int(keep))

    def write(self, line: Answered, payload: bytes | None = None) -> None:
        """Take a line, to be written soon; one that finds too many others waiting is lost."""
        if self._thread is None:
            self._thread = Thread(target=self._work, name="journal", daemon=True)
            self._thread.start()
        if not self._keep or self._waiting.qsize() >= _MAX_UPLOADS_WAITING or len(payload or b"") > _MAX_UPLOAD_BYTES:
            payload = None
        try:
            self._waiting.put_nowait((line, payload))
        except Full:
            self.lost += 1

    def flush(self) -> None:
        """Wait until all that was taken is written, or lost."""
        self._waiting.join()

    def _work(self) -> None:
        failing = False
        while True:
            taken = [self._waiting.get()]
            # One write for many lines: each wakes this thread, which holds up whoever computes.
            time.sleep(_PAUSE_S)
            taken += [self._waiting.get_nowait() for _ in range(self._waiting.qsize())]
            written = False
            try:
                self._write(b"".join(json.dumps(vars(line)).encode() + b"\n" for line, _ in taken))
                written = True
                for line, payload in taken:
                    if payload and line.sha256:
                        self._keep_upload(line.sha256, payload)
                failing = False
            except Exception:
                self.lost += 0 if written else len(taken)
                if not failing:
                    _log.exception("the journal cannot be written; what it should have is lost until it can")
                failing = True
            finally:
                for _ in taken:
                    self._waiting.task_done()

    def _write(self, lines: bytes) -> None:
        if not self._path.exists():
            self._path.parent.mkdir(mode=0o700, exist_ok=True)
            self._remove_old()
        elif self._path.stat().st_size + len(lines) > self._max_bytes:
            self._rotate()
        # The line before may have been cut, by a full disk.
        data = (b"\n" if self._cut else b"") + lines
        with open(self._path, "ab", buffering=0) as file:
            self._cut = True
            self._cut = file.write(data) < len(data)
        if self._cut:
            raise OSError("only a part of a line was written")

    def _rotate(self) -> None:
        names = [self._path, *(self._path.with_name(f"{self._path.name}.{n + 1}") for n in range(KEPT_JOURNALS))]
        for older, newer in zip(names[:0:-1], names[-2::-1], strict=True):
            with contextlib.suppress(FileNotFoundError):
                newer.replace(older)

    def _remove_old(self) -> None:
        """Remove the oldest files of ended processes of this version, beyond what is kept."""
        found = []
        for path in self._path.parent.glob(f"{self._start}*.jsonl*"):
            process = path.name.removeprefix(self._start).partition(".")[0]
            if process.isdecimal() and not _is_alive(int(process)):
                with contextlib.suppress(FileNotFoundError):  # another worker removes them, too
                    found.append((path.stat().st_mtime, path.stat().st_size, path))
        kept = 0
        for _, size, path in sorted(found, reverse=True):
            kept += size
            if kept > KEPT_JOURNALS * self._max_bytes:
                path.unlink(missing_ok=True)

    def _keep_upload(self, sha256: str, payload: bytes) -> None:
        self._kept.mkdir(mode=0o700, exist_ok=True)
        target = self._kept / sha256
        if not target.exists():
            with atomic(target) as unfinished:
                unfinished.write_bytes(payload)
        found = []
        for path in self._kept.iterdir():
            with contextlib.suppress(FileNotFoundError):  # another worker removes them, too
                found.append((path.stat().st_mtime, path))
        for _, path in sorted(found, reverse=True)[self._keep :]:
            path.unlink(missing_ok=True)


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True

"""What the files of one request may take together: processor time, seconds of sound, and a part of their batch's time."""

from __future__ import annotations

import math
from collections.abc import Callable
from threading import Lock
from time import monotonic, thread_time

from skewless.core.request import Limits, RequestError


class Budget:
    """What one request has left of its limits, shared by the threads that read its files.

    A server answers a batch when all of it is done, and kills the worker that takes too long for it, with everybody's
    requests: so the time that each request may take has an end.

    ends: when the batch has to be over, by time.monotonic; `math.inf` where nobody waits for a batch.
    """

    def __init__(self, limits: Limits, ends: float = math.inf):
        self._limits, self._ends = limits, ends
        self._read_s = self._duration_s = 0.0
        self._lock = Lock()

    @classmethod
    def of_batch(cls, limits: Limits, requests: int) -> list[Budget]:
        """One for each request of a batch that begins now."""
        ends = monotonic() + limits.max_batch_s
        return [cls(limits, ends) for _ in range(requests)]

    @property
    def left_s(self) -> float:
        """Seconds until the batch has to be over, at least 0."""
        return max(0.0, self._ends - monotonic())

    def late(self) -> RequestError | None:
        """What a file is told that the batch has no time left for."""
        if self.left_s > 0:
            return None
        return RequestError(
            503,
            f"this server had no time left for this file: the requests that it came with took {self._limits.max_batch_s:g} s, "
            "the most that they may take together; send it again",
        )

    def reading(self) -> Callable[[], None]:
        """For the thread that reads one file, to be called now and then: counts the thread's processor time since the last
        call.

        It raises RequestError: 413 when the request's files have taken more than `max_read_s`, 503 when the batch has no
        time left.
        """
        last = thread_time()

        def check() -> None:
            nonlocal last
            now = thread_time()
            with self._lock:
                self._read_s += now - last
                taken = self._read_s
            last = now
            if taken > self._limits.max_read_s:
                raise RequestError(
                    413,
                    f"reading took more than {self._limits.max_read_s:g} s of processor time, the most that one request may take; "
                    "send a shorter excerpt or fewer files",
                )
            if late := self.late():
                raise late

        return check

    def add(self, duration_s: float) -> RequestError | None:
        """Count a recording of so many seconds, or say why it is refused. Asked in the order of the request's files, so that
        the same request has the same ones refused."""
        left = self._limits.max_duration_s - self._duration_s
        # A microsecond more, because sums of parts are rounded.
        if duration_s > left + 1e-6:
            return RequestError(
                413,
                f"the recording has {duration_s:g} s, and the files before it in the request leave {left:g} of the "
                f"{self._limits.max_duration_s:g} s that all recordings of one request may have together; send it in a request of "
                "its own",
            )
        self._duration_s += duration_s
        return None

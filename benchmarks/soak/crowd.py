"""The callers of one server, canaries and hostile ones, and what each of them saw."""

from __future__ import annotations

import itertools
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from random import Random
from typing import Any

from benchmarks.load import WrongAnswer
from benchmarks.soak.canaries import WAYS, Archive
from benchmarks.soak.defects import Defect, Defects, is_busy, verdict
from benchmarks.soak.hostile import Plan
from benchmarks.soak.messages import NO_ANSWER, Message, Wire
from benchmarks.soak.workers import Watch
from skewless.errors import ServerError
from skewless.torchserve.client import Client
from skewless.torchserve.server import Server

LOOK_S = 1.0  # between two looks at the workers
REMEMBERED = 2000  # answered requests, among which are the suspects when a canary goes wrong
SUSPECTED_S = 2.0  # before a worker is missed: what was answered earlier did not kill it
BACKLOG_S = 10.0  # by which callers that keep a pace may be late and still catch up

WARM_UP, ALONE, COMPANY, CROWD = "warm-up", "canaries alone", "canaries in company", "hostile crowd"


@dataclass
class Pace:
    """Lets callers go on at a rate of so many per second together; None holds nobody."""

    rate: float | None
    _next: float = 0.0
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def wait(self, over: threading.Event) -> bool:
        """Wait for one's turn; False when it is over before that."""
        if self.rate is None:
            return not over.is_set()
        with self._lock:
            now = time.monotonic()
            turn = max(self._next, now - BACKLOG_S)
            self._next = turn + 1 / self.rate
        return not over.wait(max(0.0, turn - now))


@dataclass(frozen=True)
class Canary:
    """One canary's fate. outcome: "right", "wrong", "busy" (503: too much to do) or "unanswered". ended: seconds of the soak."""

    ended: float
    model: str
    way: str
    outcome: str
    seconds: float
    apart: float = 0.0


@dataclass(frozen=True)
class Sent:
    """One hostile request that was answered, or not. status: as in Answer."""

    ended: float
    kind: str
    group: str
    status: int
    seconds: float


@dataclass
class Phase:
    """A part of the soak: who called, and what came of it. began and ended in seconds of the soak."""

    name: str
    began: float = 0.0
    ended: float = 0.0
    canaries: list[Canary] = field(default_factory=list)
    sent: list[Sent] = field(default_factory=list)
    over: threading.Event = field(default_factory=threading.Event)


@dataclass
class Crowd:
    """The callers of one server, and what they have seen so far. `run` is one phase of them."""

    server: Server
    archives: Sequence[Archive]
    plan: Plan
    client: Client
    wire: Wire
    watch: Watch
    defects: Defects
    bounds: Mapping[str, float]
    phases: list[Phase] = field(default_factory=list)
    _begun: float = field(default_factory=time.monotonic)
    _numbers: itertools.count = field(default_factory=itertools.count)
    _lock: threading.Lock = field(default_factory=threading.Lock)
    _under_way: dict[int, tuple[float, Message]] = field(default_factory=dict)
    _answered: deque[tuple[float, float, Message]] = field(default_factory=lambda: deque(maxlen=REMEMBERED))
    _broken_off: threading.Event = field(default_factory=threading.Event)

    def now(self) -> float:
        """Seconds since the soak began."""
        return time.monotonic() - self._begun

    def run(
        self,
        name: str,
        canaries: int,
        hostile: int,
        seconds: float,
        progress: Callable[[float], object],
        canary_pace: float | None = None,
        hostile_pace: float | None = None,
    ) -> Phase:
        """So many callers of each sort for `seconds`, and until all are answered; with hostile ones and a plan that has an end,
        no longer than that. Raises ServerError when TorchServe itself ends."""
        phase = Phase(name, began=self.now())
        self.phases.append(phase)
        paces = Pace(canary_pace), Pace(hostile_pace)
        with ThreadPoolExecutor(canaries + hostile) as pool:
            try:
                hostiles = [pool.submit(self._send_hostile, phase, paces[1]) for _ in range(hostile)]
                callers = [
                    *hostiles,
                    *(pool.submit(self._ask_canaries, phase, paces[0], (n, canaries)) for n in range(canaries)),
                ]
                while self.now() - phase.began < seconds and not (hostiles and all(each.done() for each in hostiles)):
                    self._look_while(callers)
                    progress(self.now() - phase.began)
                phase.over.set()
                while not all(each.done() for each in callers):
                    self._look_while(callers)
            except BaseException:
                # Whoever waits for an answer of this server waits no longer.
                self._broken_off.set()
                phase.over.set()
                self.server.stop()
                raise
            finally:
                phase.ended = self.now()
        return phase

    def _look_while(self, callers: Sequence[Future[None]]) -> None:
        for caller in callers:
            if caller.done():
                caller.result()
        time.sleep(LOOK_S)
        self.look()

    def look(self) -> None:
        """Look at the workers; raises ServerError when TorchServe itself has ended."""
        now = self.now()
        if self.server.process() is None:
            self._add("server died", "", "", "TorchServe itself ended", self._suspects(None, now - SUSPECTED_S))
            raise ServerError("TorchServe itself ended")
        for worker in self.watch.look(now):
            reason = f"worker process {worker.pid} ended"
            self._add("worker died", "", worker.model, reason, self._suspects(worker.model, now - LOOK_S - SUSPECTED_S))

    def check_memory(self) -> None:
        """Hold the workers' largest memory against the bounds."""
        for worker in self.watch.workers:
            bound = self.bounds.get(worker.model)
            if bound is not None and worker.peak > 1e6 * bound:
                reason = f"process {worker.pid} had {worker.peak / 1e6:.0f} MB, at most {bound:g} are stated"
                self._add("memory", "", worker.model, reason, [])

    def _ask_canaries(self, phase: Phase, pace: Pace, place: tuple[int, int]) -> None:
        turns = [(a, way, n) for a in self.archives for way in WAYS for n in range(len(a.references.entries))]
        Random(self.plan.seed).shuffle(turns)
        for archive, way, number in itertools.islice(itertools.cycle(turns), place[0], None, place[1]):
            if not pace.wait(phase.over):
                return
            canary = self.ask(archive, way, number)
            if self._broken_off.is_set():
                return
            phase.canaries.append(canary)

    def ask(self, archive: Archive, way: str, number: int) -> Canary:
        """Ask one canary; what is wrong with its answer is a defect."""
        began, outcome, apart = self.now(), "right", 0.0
        started = time.perf_counter()
        try:
            answer, apart = WAYS[way](self.client, archive, number)
        except WrongAnswer as error:
            outcome, status, reason = "wrong", 200, str(error)
        else:
            status, reason = answer.status, f"{answer.status}: {answer.body.get('message')}"
            if status != 200:
                outcome = "busy" if is_busy({"code": status, **answer.body}) else "unanswered"
        seconds = time.perf_counter() - started
        if outcome in ("wrong", "unanswered") and not self._broken_off.is_set():
            what = "wrong canary" if outcome == "wrong" else "canary unanswered"
            self._add(what, f"canary: {way}", archive.name, reason, self._suspects(archive.name, began), status)
        return Canary(self.now(), archive.name, way, outcome, seconds, apart)

    def _send_hostile(self, phase: Phase, pace: Pace) -> None:
        while pace.wait(phase.over):
            with self._lock:
                number = next(self._numbers)
            if self.plan.order and number >= len(self.plan.order):
                return
            message = self.plan.message(number)
            began = self.now()
            with self._lock:
                self._under_way[number] = began, message
            answer = self.wire.send(message)
            with self._lock:
                del self._under_way[number]
                self._answered.append((began, self.now(), message))
            if self._broken_off.is_set():
                return
            phase.sent.append(Sent(self.now(), message.kind, message.group, answer.status, answer.seconds))
            if reason := verdict(message, answer):
                what = "no answer" if answer.status == NO_ANSWER else "wrong status"
                self._add(what, message.kind, message.model, reason, [message], answer.status, answer.body)

    def _suspects(self, model: str | None, since: float) -> list[Message]:
        """The hostile requests to a model that were under way at any time since then."""
        with self._lock:
            found = [message for _, ended, message in self._answered if ended >= since]
            found += [message for _, message in self._under_way.values()]
        return [message for message in found if model in (None, message.model)]

    def _add(
        self,
        what: str,
        kind: str,
        model: str,
        reason: str,
        suspects: Sequence[Message],
        status: int | None = None,
        body: Mapping[str, Any] | None = None,
    ) -> None:
        self.defects.add(Defect(what, kind, model, reason, self.now(), self.plan.seed, status, body), suspects)

    @property
    def asked(self) -> int:
        """Requests so far, of both sorts."""
        return sum(len(phase.canaries) + len(phase.sent) for phase in self.phases)

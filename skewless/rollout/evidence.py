"""What is known of two versions: the requests that the gateway logged, and the answers that the workers' journals have.

Both are read while they are being written and rotated. What cannot be read, such as a line that a full disk cut, is counted.
"""

from __future__ import annotations

import gzip
import json
import math
import os
from collections import defaultdict, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeVar

from skewless.core.telemetry import HISTOGRAM, KEPT, Answered
from skewless.errors import UsageError
from skewless.torchserve.archive import METRICS, Archive
from skewless.torchserve.server import GATEWAY, JOURNAL
from skewless.torchserve.store import archives

ACCESS_LOG = Path(GATEWAY, "access.jsonl")
STATE = "state.json"

# Over gRPC, what is no fault of the caller's: UNKNOWN, DEADLINE_EXCEEDED, RESOURCE_EXHAUSTED, INTERNAL, UNAVAILABLE, DATA_LOSS.
_GRPC_FAULTS = {2, 4, 8, 13, 14, 15}
# What a worker answers to a file that it cannot take.
REFUSED = {400, 413, 415}

T = TypeVar("T")
Arm = Literal["baseline", "candidate", "shadow"]


@dataclass(frozen=True, slots=True)
class Sent:
    """One request that reached the gateway, or a copy of one.

    client: who sent it, as a hash; empty where that is not known. grpc: by which protocol. seconds: that the server took, with its
    queue; None where no server answered.
    """

    time: float
    id: str
    client: str
    arm: Arm
    grpc: bool
    failed: bool
    seconds: float | None


class Pair(NamedTuple):
    """The same bytes answered by both versions."""

    baseline: Answered
    candidate: Answered

    @property
    def flipped(self) -> bool:
        """Whether the two decide otherwise; so do an answer and a refusal. A failure decides nothing: it counts as a failed request."""
        return self.baseline.choice != self.candidate.choice and max(self.baseline.status, self.candidate.status) < 500

    @property
    def dp(self) -> float | None:
        """How far the two probabilities are apart; None where one of the two was refused."""
        if self.baseline.score is None or self.candidate.score is None:
            return None
        return abs(self.baseline.score - self.candidate.score)


@dataclass(frozen=True)
class Evidence:
    """Two versions of a model since a moment.

    source: "gateway", or "journal" where no gateway logged anything: then a request that killed its worker is not known of.
    sent: requests of the three arms, by time. answered: what each arm's workers answered, by time; of clients that named a
        version themselves, nothing. classes: the model's. histograms: of the archives' evaluations, by version, where they have
        one. unreadable: lines of logs that are not what they should be.
    """

    state_dir: Path
    model: str
    baseline: str
    candidate: str
    source: Literal["gateway", "journal"]
    sent: tuple[Sent, ...]
    answered: dict[Arm, tuple[Answered, ...]]
    classes: tuple[str, ...]
    histograms: dict[str, dict[str, Any]]
    unreadable: int

    @classmethod
    def gather(cls, state_dir: str | Path, model: str, baseline: str, candidate: str, since: float = 0.0) -> Evidence:
        """Read the logs of a server's state directory. since: in seconds since 1970. Raises UsageError for a folder that is no
        server's."""
        state_dir = Path(state_dir)
        unreadable = 0

        def lines(paths: Iterable[Path], make: Callable[[dict[str, Any]], T | None]) -> list[T]:
            nonlocal unreadable
            found = []
            for line in _lines(paths, since):
                try:
                    made = make(json.loads(line))
                except (ValueError, KeyError, TypeError):
                    unreadable += 1
                    continue
                if made is not None:
                    found.append(made)
            return found

        versions: dict[Arm, str] = {"baseline": baseline, "candidate": candidate, "shadow": candidate}
        log = state_dir / ACCESS_LOG
        sent = lines(_rotated(log), lambda line: _sent(line, model, versions, since))
        names = [f"{model}-{version}-*.jsonl*" for version in (baseline, candidate)]
        journals = sorted({path for name in names for path in (state_dir / JOURNAL).glob(name)})
        answered = lines(journals, lambda line: _answered(line, model, (baseline, candidate), since))
        source: Literal["gateway", "journal"] = "gateway" if log.exists() else "journal"
        if source == "journal":
            sent = [_as_sent(each, baseline) for each in answered]
        classes, histograms = _of_archives(state_dir, model, (baseline, candidate))
        sent.sort(key=lambda each: each.time)
        answered.sort(key=lambda each: each.time)
        return cls(
            state_dir=state_dir,
            model=model,
            baseline=baseline,
            candidate=candidate,
            source=source,
            sent=tuple(sent),
            answered=_by_arm(answered, sent, baseline),
            classes=classes or tuple(sorted({each.choice for each in answered if each.choice is not None})),
            histograms=histograms,
            unreadable=unreadable,
        )

    def after(self, time: float) -> Evidence:
        """The part from a moment on."""
        return replace(
            self,
            sent=tuple(each for each in self.sent if each.time >= time),
            answered={arm: tuple(each for each in found if each.time >= time) for arm, found in self.answered.items()},
        )

    def requests(self, arm: Arm) -> list[Sent]:
        """The requests of an arm, by time. One failed, too, when the worker's journal says so: of a request with several files, or
        over gRPC, where TorchServe answers OK to all that reaches a worker."""
        faults = [each for each in self.answered[arm] if each.status >= 500]
        named = {each.id for each in faults if each.id}
        ours = (each for each in self.sent if each.arm == arm)
        found = [replace(each, failed=True) if each.id in named else each for each in ours]
        # A fault without an id is that of the request that was logged next.
        unnamed = deque(each.time for each in faults if not each.id)
        for place, each in enumerate(found):
            if unnamed and each.grpc and not each.failed and each.time >= unnamed[0]:
                unnamed.popleft()
                found[place] = replace(each, failed=True)
        return found

    def copies(self) -> list[tuple[Sent, Sent]]:
        """The baseline's requests of which the candidate got a copy, each with the copy, by time of the copy."""
        ours = {each.id: each for each in self.requests("baseline")}
        return [(ours[each.id], each) for each in self.requests("shadow") if each.id in ours]

    def files(self, unit: Literal["client", "request"]) -> list[tuple[bool, Answered]]:
        """The split's answered files, by time, each with whether the candidate answered it.

        unit: "request" for all; "client" for the first file of every client. Who sent a file over gRPC is not known: each counts.
        """
        arms: tuple[Arm, ...] = ("baseline", "candidate")
        found = [(arm == "candidate", each) for arm in arms for each in self.answered[arm]]
        found.sort(key=lambda pair: pair[1].time)
        if unit == "request":
            return found
        clients = {each.id: each.client for each in self.sent if each.client and each.arm != "shadow"}
        seen: set[str] = set()
        first = []
        for theirs, each in found:
            client = clients.get(each.id or "")
            if client is None or client not in seen:
                first.append((theirs, each))
            if client is not None:
                seen.add(client)
        return first

    def pairs(self) -> list[Pair]:
        """Files that the baseline answered and of which the candidate got a copy, by time of the candidate's answer."""
        waiting: dict[tuple[str | None, str], list[Answered]] = defaultdict(list)
        for each in self.answered["baseline"]:
            if each.sha256 is not None:
                waiting[each.id, each.sha256].append(each)
        found = []
        for each in self.answered["shadow"]:
            if each.sha256 is not None and (twins := waiting.get((each.id, each.sha256))):
                found.append(Pair(twins.pop(0), each))
        return found

    def kept(self, sha256: str) -> bytes | None:
        """An upload's bytes, where they were kept."""
        try:
            return (self.state_dir / JOURNAL / KEPT / sha256).read_bytes()
        except FileNotFoundError:
            return None


def archive_of(state_dir: Path, model: str, version: str) -> Path | None:
    """A version's archive in the store of the server whose folder this is; None where it is not there any more."""
    try:
        store = Path(json.loads((state_dir / STATE).read_text(encoding="utf-8"))["model_store"])
    except FileNotFoundError:
        # The server has ended; its journal is still there.
        return None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UsageError(f"{state_dir / STATE} is not what `skewless serve start` writes: {error}") from error
    # By its usual name first: a store may have many, and each has to be opened.
    for path in sorted(archives(store), key=lambda path: path.name != f"{model}-{version}.mar"):
        try:
            with Archive(path) as archive:
                if archive.name_and_version() == (model, version):
                    return path
        except UsageError:
            # Not one that could be served; `skewless serve models` says why.
            continue
    return None


def _of_archives(
    state_dir: Path, model: str, versions: Sequence[str]
) -> tuple[tuple[str, ...], dict[str, dict[str, Any]]]:
    classes: tuple[str, ...] = ()
    histograms = {}
    for version in versions:
        if (path := archive_of(state_dir, model, version)) is None:
            continue
        with Archive(path) as archive:
            metrics = archive.json_object(METRICS) if METRICS in archive else {}
        classes = classes or tuple((metrics.get("evaluation") or {}).get("classes", ()))
        if HISTOGRAM in metrics:
            histograms[version] = metrics[HISTOGRAM]
    return classes, histograms


def _rotated(path: Path) -> list[Path]:
    return sorted(path.parent.glob(f"{path.name}*"))


def _lines(paths: Iterable[Path], since: float) -> Iterator[bytes]:
    """The finished lines of files that others write to and rename."""
    seen = set()
    for path in paths:
        try:
            with path.open("rb") as raw:
                status = os.fstat(raw.fileno())
                # Renamed since the folder was listed, it would be read twice.
                if status.st_ino in seen or status.st_mtime < since:
                    continue
                seen.add(status.st_ino)
                file = gzip.GzipFile(fileobj=raw) if path.suffix == ".gz" else raw
                for line in file:
                    # The last line of a file may still be being written.
                    if line.endswith(b"\n") and line.strip():
                        yield line
        except FileNotFoundError:
            continue


def _sent(line: dict[str, Any], model: str, versions: dict[Arm, str], since: float) -> Sent | None:
    arm = line["arm"]
    if line["model"] != model or line["time"] < since or arm not in versions or line["version"] != versions[arm]:
        return None
    failed = line["status"] >= 500 or line["grpc_status"] in _GRPC_FAULTS
    grpc = line["protocol"] == "grpc"
    return Sent(line["time"], line["id"], line["client"], arm, grpc, failed, line["upstream_s"])


def _answered(line: dict[str, Any], model: str, versions: tuple[str, str], since: float) -> Answered | None:
    answered = Answered(**line)
    wanted = answered.model == model and answered.version in versions and answered.time >= since
    return answered if wanted else None


def _as_sent(answered: Answered, baseline: str) -> Sent:
    arm: Arm = "baseline" if answered.version == baseline else "candidate"
    return Sent(answered.time, answered.id or "", "", arm, False, answered.status >= 500, answered.seconds)


def _by_arm(answered: list[Answered], sent: list[Sent], baseline: str) -> dict[Arm, tuple[Answered, ...]]:
    """Each answer with the arm that its request went to."""
    arms: dict[tuple[str, bool], Arm] = {(each.id, each.arm == "baseline"): each.arm for each in sent}
    copies = [each for each in sent if each.arm == "shadow"]
    # A worker answers before the gateway logs. An answer over gRPC has no id to tell the shadow's by.
    begin, end = (
        (copies[0].time - (copies[0].seconds or 0) - 1, copies[-1].time + 1) if copies else (math.inf, -math.inf)
    )
    found: dict[Arm, list[Answered]] = {"baseline": [], "candidate": [], "shadow": []}
    for each in answered:
        ours = each.version == baseline
        arm: Arm | None
        if each.id is None:
            arm = "baseline" if ours else "shadow" if begin <= each.time <= end else "candidate"
        else:
            arm = arms.get((each.id, ours))
        if arm is not None:
            found[arm].append(each)
    return {arm: tuple(each) for arm, each in found.items()}

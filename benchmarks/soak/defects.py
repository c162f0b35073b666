"""What counts as a defect of a server under a hostile crowd, and where each is kept so that it can be repeated."""

from __future__ import annotations

import json
import re
import shutil
import threading
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from benchmarks.soak.messages import GOOD, GRPC, HTTP, LEFT, NO_ANSWER, Message, is_json
from skewless.core.files import atomic
from skewless.torchserve.client import Answer

# How many are kept with the bytes of their requests: of one sort, in all, and in bytes. All are counted.
KEPT_OF_A_SORT, KEPT, KEPT_BYTES = 3, 100, 300_000_000
LISTED = 1000

# What Netty's form decoder raises, which TorchServe answers with a 500 before any handler sees the request. The last one is of
# a form whose boundary is empty.
FORM_PARSER = ("ErrorDataDecoderException", "NotEnoughDataDecoderException", "StringIndexOutOfBoundsException")


def _files(answer: Answer) -> dict[str, Any]:
    """Where several files were asked about, each one's body by its name."""
    results = answer.body.get("results")
    return {name: body for name, body in results.items() if isinstance(body, dict)} if isinstance(results, dict) else {}


def is_busy(body: Mapping[str, Any]) -> bool:
    """Whether this is a 503 that says that the server has too much to do: its queue is full, or its time was up."""
    words = f"{body.get('type')} {body.get('message')}"
    return body.get("code") == 503 and ("ServiceUnavailableException" in words or "no time left" in words)


def verdict(message: Message, answer: Answer) -> str | None:
    """What is wrong with an answer, None when nothing is.

    A server owes an answer to every request that is one, and no answer may say that the server failed: no 5xx but a 503
    for too much to do and the 500 of TorchServe's own form parser.
    """
    if answer.status == LEFT:
        return None
    if answer.status == NO_ANSWER:
        return f"no answer: {answer.body.get('message')}" if message.owed else None
    if answer.status == 500 and _is_form(message) and answer.body.get("type") in FORM_PARSER:
        return None
    if message.protocol == GRPC and not message.owed and answer.body.get("type") == "UNKNOWN":
        return None
    if answer.status >= 500 and not is_busy({"code": answer.status, **answer.body}):
        return f"{answer.status}: {answer.body.get('message')}"
    if answer.status == 200 and not is_json(answer):
        return f"200 without a JSON object: {str(answer.body.get('message'))[:100]}"
    files = _files(answer)
    for body in files.values():
        code = body.get("code")
        if isinstance(code, int) and code >= 500 and not is_busy(body):
            return f"{code} for one file of several: {body.get('message')}"
    if message.refused and answer.status == 200:
        asked = [body for name, body in files.items() if name != GOOD] or [answer.body]
        if any("code" not in body for body in asked):
            return "200 to what has to be refused"
    return None


def _is_form(message: Message) -> bool:
    """Whether TorchServe reads the request as a form, as it does without a content type."""
    head = message.data.partition(b"\r\n\r\n")[0].lower()
    kinds = re.findall(rb"^content-type: *([^;\r]*)", head, re.MULTILINE)
    return message.protocol == HTTP and (not kinds or b"form" in kinds[0])


@dataclass(frozen=True)
class Defect:
    """One defect. what: "wrong status", "no answer", "wrong canary", "canary unanswered", "worker died", "memory", "server died".

    seconds: since the soak began. kept: the folder with the requests that are suspected, or None.
    """

    what: str
    kind: str
    model: str
    reason: str
    seconds: float
    seed: int
    status: int | None = None
    body: Mapping[str, Any] | None = None
    kept: str | None = None

    @property
    def sort(self) -> str:
        """Defects of one sort differ in numbers only."""
        return f"{self.what} {self.kind} {self.model} {re.sub('[0-9.]+', '0', self.reason)[:60]}"


class Defects:
    """Counts defects and keeps some of them under `folder`, one folder each. May be used by several threads."""

    def __init__(self, folder: Path) -> None:
        """Removes what an earlier run kept there."""
        self.listed: list[Defect] = []
        self.counts: Counter[str] = Counter()
        self._folder = folder
        self._sorts: Counter[str] = Counter()
        self._kept = self._bytes = 0
        self._lock = threading.Lock()
        for old in folder.glob("[0-9][0-9][0-9]"):
            if (old / "defect.json").is_file():
                shutil.rmtree(old)

    def __len__(self) -> int:
        return sum(self.counts.values())

    def add(self, defect: Defect, suspects: Sequence[Message]) -> None:
        """suspects: the request, or those that may have caused it."""
        with self._lock:
            self.counts[defect.what] += 1
            self._sorts[defect.sort] += 1
            size = sum(len(each.data) for each in suspects)
            keeps = (
                suspects
                and self._sorts[defect.sort] <= KEPT_OF_A_SORT
                and self._kept < KEPT
                and self._bytes + size <= KEPT_BYTES
            )
            if keeps:
                self._kept += 1
                self._bytes += size
                defect = self._keep(defect, suspects, self._folder / f"{self._kept:03}")
            if len(self.listed) < LISTED:
                self.listed.append(defect)

    def _keep(self, defect: Defect, suspects: Sequence[Message], folder: Path) -> Defect:
        folder.mkdir(parents=True, exist_ok=True)
        for number, message in enumerate(suspects, start=1):
            message.write(folder, f"request-{number:02}")
        known = {**asdict(defect), "kept": str(folder)}
        with atomic(folder / "defect.json") as unfinished:
            unfinished.write_text(json.dumps(known, indent=2) + "\n", encoding="utf-8")
        return Defect(**known)


def kept_messages(path: Path) -> list[Message]:
    """The requests of a defect's folder, or of one request's .json file. Raises ValueError where there are none."""
    files = sorted(path.glob("request-*.json")) if path.is_dir() else [path]
    if not files:
        raise ValueError(f"{path} holds no request-*.json, expected a folder such as runs/soak/defects/001")
    return [Message.read(file) for file in files]

"""Who did what to a server's versions, and when: lines of JSON that are only ever appended."""

from __future__ import annotations

import fcntl
import json
import os
import pwd
import socket
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from skewless.errors import ServerError
from skewless.terminal import printable

AUDIT = "audit.jsonl"  # in the state directory
ACTOR = "SKEWLESS_ACTOR"

# Outcomes. REFUSED: nothing was tried, because it was asked for wrongly. FAILED: it was tried. INTERRUPTED: by a signal.
DONE, REFUSED, FAILED, INTERRUPTED = "done", "refused", "failed", "interrupted"


@dataclass(frozen=True)
class Audit:
    """The audit log of the server of a state directory.

    A line is one JSON object: `time` (ISO 8601, UTC), `actor` (the environment variable SKEWLESS_ACTOR, or user@host),
    `action`, `model`, `version`, `digest` (of the archive), `outcome` and `detail`; the last of these may be null. Whoever
    can write the state directory can change the log, so copy it elsewhere where that matters.
    """

    state_dir: Path

    @property
    def path(self) -> Path:
        """The log's file."""
        return self.state_dir / AUDIT

    def record(
        self,
        action: str,
        outcome: str,
        *,
        model: str,
        version: str | None = None,
        digest: str | None = None,
        detail: str | None = None,
    ) -> None:
        """Append a line, which is on the disk when this returns. Raises ServerError where it cannot be written."""
        entry = {
            "time": datetime.now(UTC).isoformat(timespec="milliseconds"),
            "actor": actor(),
            "action": action,
            "model": model,
            "version": version,
            "digest": digest,
            "outcome": outcome,
            "detail": detail,
        }
        line = json.dumps(entry).encode() + b"\n"
        try:
            descriptor = os.open(self.path, os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o600)
            try:
                # So that nobody's line follows another's beginning.
                fcntl.flock(descriptor, fcntl.LOCK_EX)
                size = os.fstat(descriptor).st_size
                if size and os.pread(descriptor, 1, size - 1) != b"\n":
                    # A full disk took only the beginning of the last line.
                    line = b"\n" + line
                written = os.write(descriptor, line)
                os.fsync(descriptor)
            finally:
                os.close(descriptor)
        except OSError as error:
            raise ServerError(f"{self.path} cannot be written: {error.strerror}; make room there") from error
        if written < len(line):
            raise ServerError(f"{self.path} took {written} of a line's {len(line)} bytes; make room there")

    def read(self, model: str | None = None) -> tuple[list[dict[str, Any]], int]:
        """The entries, oldest first, of one model if it is given; and how many lines are none, such as one that was cut."""
        try:
            lines = self.path.read_bytes().splitlines()
        except FileNotFoundError:
            return [], 0
        entries, unreadable = [], 0
        for line in filter(None, lines):
            try:
                entry = json.loads(line)
            except ValueError:
                entry = None
            if not isinstance(entry, dict):
                unreadable += 1
            elif model in (None, entry.get("model")):
                entries.append(entry)
        return entries, unreadable


def actor() -> str:
    """Who acts: SKEWLESS_ACTOR, such as a pipeline's name, or user@host."""
    if named := os.environ.get(ACTOR):
        return named
    try:
        user = pwd.getpwuid(os.getuid()).pw_name
    except KeyError:
        # A container may run under a number that has no name.
        user = str(os.getuid())
    return f"{user}@{socket.gethostname()}"


def as_text(entries: list[dict[str, Any]]) -> str:
    """A line for each entry; what would move a terminal's cursor is escaped."""
    lines = []
    for entry in entries:
        digest = str(entry.get("digest") or "")[:12]
        what = [entry.get(name) for name in ("time", "actor", "action", "model", "version")]
        shown = [str(part) for part in [*what, digest, entry.get("outcome")] if part]
        detail = f": {entry['detail']}" if entry.get("detail") else ""
        lines.append(printable("  ".join(shown) + detail))
    return "\n".join(lines)

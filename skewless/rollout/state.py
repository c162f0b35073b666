"""A rollout: which of two versions answers whose requests, from the first ones to all or back to none.

Its state is `rollouts/MODEL.json` in the server's state directory. The gateway follows that file. Every action on one
rollout happens alone: a second operator is refused meanwhile.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import re
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, fields, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

from skewless.core.files import atomic
from skewless.errors import ServerError, UsageError
from skewless.torchserve import versions
from skewless.torchserve.audit import DONE, FAILED, INTERRUPTED, REFUSED, Audit
from skewless.torchserve.server import ROLLOUTS, Server

# The gateway's split has this many parts.
PARTS = 1000
# As its length is written into a call's message in one byte.
LONGEST_VERSION = 127

Phase = Literal["shadow", "split", "promoted", "aborted"]
RUNNING: tuple[Phase, ...] = ("shadow", "split")
_PHASES = (*RUNNING, "promoted", "aborted")
_NAME = re.compile(r"[A-Za-z0-9_.-]+")


@dataclass(frozen=True)
class Entry:
    """One action on a rollout. time: ISO 8601, UTC. percent: of the clients, for the candidate from then on."""

    time: str
    action: str
    percent: float
    why: str


@dataclass(frozen=True)
class Rollout:
    """A model's rollout.

    percent: 0 to 100, of the clients whose requests the candidate answers. shadow: whether the candidate gets a copy of the
    others. step: the place in the policy's steps, from 0. started: ISO 8601, UTC. policy: its file; None for the defaults.
    pending: what was begun and may not be done yet; doing it again is harmless.
    """

    model: str
    baseline: str
    candidate: str
    percent: float
    shadow: bool
    phase: Phase
    step: int
    started: str
    policy: str | None
    history: tuple[Entry, ...]
    pending: Literal["promote", "abort"] | None = None

    @property
    def running(self) -> bool:
        """Whether it has not been promoted or aborted."""
        return self.phase in RUNNING

    @property
    def since(self) -> str:
        """When the present split began: ISO 8601, UTC."""
        return self.history[-1].time

    def acted(self, action: str, why: str, **changes: Any) -> Rollout:
        """This rollout after an action, with an entry in its history."""
        after = replace(self, **changes)
        return replace(after, history=(*self.history, Entry(_now(), action, after.percent, why)))

    @classmethod
    def read(cls, state_dir: Path, model: str) -> Rollout | None:
        """A model's last rollout; None where it never had one. Raises UsageError for a damaged file."""
        file = _file(state_dir, model)
        try:
            found = json.loads(file.read_text(encoding="utf-8"))
            found["history"] = tuple(Entry(**entry) for entry in found["history"])
            rollout = cls(**{each.name: found[each.name] for each in fields(cls)})
        except FileNotFoundError:
            return None
        except (ValueError, KeyError, TypeError) as error:
            raise UsageError(
                f"{file} cannot be read as the state of a rollout: {error}; put back a copy of it, or remove it, which ends "
                "the rollout with everything at the default version"
            ) from error
        if rollout.model != model or rollout.phase not in _PHASES or not _is_percent(rollout.percent):
            raise UsageError(f"{file} is not the state of a rollout of {model}; remove it, which ends the rollout")
        if not all(_NAME.fullmatch(version) for version in (rollout.baseline, rollout.candidate)):
            raise UsageError(f"{file} has versions that no archive can have; remove it, which ends the rollout")
        return rollout

    def write(self, state_dir: Path) -> None:
        """Replace the file. Raises ServerError where that is not possible."""
        file = _file(state_dir, self.model)
        try:
            file.parent.mkdir(mode=0o700, exist_ok=True)
            with atomic(file) as unfinished:
                unfinished.write_text(json.dumps(asdict(self), indent=2) + "\n", encoding="utf-8")
        except OSError as error:
            raise ServerError(f"{file} cannot be written: {error.strerror}; make room there") from error


def rollouts(state_dir: Path) -> list[Rollout]:
    """The last rollout of every model that had one, by name. Raises UsageError for a damaged file."""
    names = sorted(file.stem for file in (state_dir / ROLLOUTS).glob("*.json") if not file.name.startswith("."))
    found = (Rollout.read(state_dir, name) for name in names)
    return [rollout for rollout in found if rollout]


def current(state_dir: Path, model: str) -> Rollout:
    """The rollout that runs. Raises UsageError where none does."""
    rollout = Rollout.read(state_dir, model)
    if rollout is None:
        raise UsageError(f"{model} has no rollout; start one with `skewless rollout start {model} --candidate VERSION`")
    if not rollout.running:
        raise UsageError(
            f"the rollout of {model} {rollout.candidate} is over: {rollout.phase} at {rollout.since}; start another one with "
            f"`skewless rollout start {model} --candidate VERSION`"
        )
    return rollout


def start(
    server: Server, model: str, candidate: str, percent: float, shadow: bool, policy: Path | None, step: int = 0
) -> Rollout:
    """Begin a rollout beside the default version. Raises UsageError for what cannot be compared with it."""
    percent = checked_percent(percent)
    with _acting(server.state_dir, "rollout start", model, candidate, f"{percent:g} %{', shadow' if shadow else ''}"):
        rows = {row["version"]: row for row in server.models() if row["name"] == model}
        if not rows:
            raise UsageError(
                f"no model {model} is registered; register its archives first, see `skewless serve status`"
            )
        if candidate not in rows:
            raise UsageError(
                f"{model} {candidate} is not registered; registered: {', '.join(rows)}. Register its archive first, without "
                "--default"
            )
        (baseline,) = (version for version, row in rows.items() if row["default"])
        if candidate == baseline:
            raise UsageError(
                f"{model} {candidate} is the default version already, which a candidate is compared with; name another one"
            )
        if too_long := [each for each in (baseline, candidate) if len(each) > LONGEST_VERSION]:
            raise UsageError(
                f"the version {too_long[0]:.40}... is {len(too_long[0])} characters long; expected {LONGEST_VERSION} or fewer"
            )
        if "READY" not in rows[candidate]["workers"]:
            states = ", ".join(rows[candidate]["workers"]) or "none"
            raise UsageError(f"{model} {candidate} has no worker that is ready ({states}); see `skewless serve status`")
        before = Rollout.read(server.state_dir, model)
        if before and before.running:
            raise UsageError(
                f"a rollout of {model} {before.candidate} is running already, at {before.percent:g} %; promote or abort it first"
            )
        if not percent and not shadow:
            raise UsageError("--percent is 0 without --shadow: the candidate would get nothing; give one of the two")
        now = _now()
        phase: Phase = "split" if percent else "shadow"
        # An absolute path: whoever goes on with the rollout may do so from another folder.
        file = str(policy.resolve()) if policy else None
        history = (Entry(now, "start", percent, "asked for"),)
        rollout = Rollout(model, baseline, candidate, percent, shadow, phase, step, now, file, history)
        rollout.write(server.state_dir)
    return rollout


def move(
    state_dir: Path, model: str, percent: float, why: str, shadow: bool = False, step: int | None = None
) -> Rollout:
    """Let the candidate answer `percent` of the clients from now on. Raises UsageError where no rollout runs."""
    percent = checked_percent(percent)
    with _acting(state_dir, "rollout step", model, None, f"{percent:g} %, {why}"):
        rollout = _not_ending(current(state_dir, model))
        phase: Phase = "split" if percent else "shadow"
        rollout = rollout.acted(
            "step",
            why,
            percent=percent,
            # Without a share of the clients, the shadow is what is left of a rollout.
            shadow=shadow or not percent,
            phase=phase,
            step=rollout.step if step is None else step,
        )
        rollout.write(state_dir)
    return rollout


def promote(server: Server, model: str, why: str) -> Rollout:
    """Send everybody to the candidate, make it the default version, and end the rollout.

    What was interrupted is done again by the next call. Raises UsageError where no rollout runs.
    """
    with _acting(server.state_dir, "rollout promote", model, None, why):
        rollout = current(server.state_dir, model)
        if rollout.pending == "abort":
            raise UsageError(f"aborting the rollout of {model} has begun; end it with `skewless rollout abort {model}`")
        # The intention first: a promotion that is interrupted from here on is completed, not forgotten.
        begun = replace(rollout, percent=100.0, shadow=False, phase="split", pending="promote")
        begun.write(server.state_dir)
        versions.set_default(server, model, rollout.candidate)
        ended = begun.acted("promote", why, phase="promoted", pending=None)
        ended.write(server.state_dir)
    return ended


def abort(state_dir: Path, connect: Callable[[], Server], model: str, why: str) -> Rollout:
    """Send everybody to the baseline, see that it is the default version, and end the rollout.

    connect: gives the server, and is called when the way back is decided: with a server that is away, everybody goes to the
    baseline as soon as it is there again, and the next call ends the rollout. It ends an interrupted promotion, too. Raises
    UsageError where no rollout runs.
    """
    with _acting(state_dir, "rollout abort", model, None, why):
        rollout = current(state_dir, model)
        begun = replace(rollout, percent=0.0, shadow=False, pending="abort")
        begun.write(state_dir)
        server = connect()
        rows = [row for row in server.models() if row["name"] == model and row["default"]]
        if [row["version"] for row in rows] != [rollout.baseline]:
            versions.set_default(server, model, rollout.baseline)
        ended = begun.acted("abort", why, phase="aborted", pending=None)
        ended.write(state_dir)
    return ended


def routes(state_dir: Path) -> str:
    """What the gateway follows: a line for each model whose versions are chosen by a rollout."""
    lines = []
    for rollout in rollouts(state_dir):
        if rollout.running:
            parts = round(rollout.percent * PARTS / 100)
            shadow = "shadow" if rollout.shadow else "-"
            lines.append(f"rollout {rollout.model} {rollout.baseline} {rollout.candidate} {parts} {shadow}\n")
    return "".join(lines)


def checked_percent(percent: float) -> float:
    """`percent`, if the gateway can split so. Raises UsageError."""
    if not _is_percent(percent):
        raise UsageError(f"percent is {percent:g}; expected 0 to 100, in steps of {100 / PARTS:g}")
    return float(percent)


def _is_percent(percent: float) -> bool:
    parts = percent * PARTS / 100
    return 0 <= percent <= 100 and abs(parts - round(parts)) < 1e-6


def _not_ending(rollout: Rollout) -> Rollout:
    if rollout.pending:
        raise UsageError(
            f"the rollout of {rollout.model} is about to end ({rollout.pending}), and that was interrupted; end it with "
            f"`skewless rollout {rollout.pending} {rollout.model}`"
        )
    return rollout


def _file(state_dir: Path, model: str) -> Path:
    if not _NAME.fullmatch(model) or model.startswith("."):
        raise UsageError(
            f"{model!r:.100} is no model's name; expected letters, digits, _ . and -, without a dot in front"
        )
    return state_dir / ROLLOUTS / f"{model}.json"


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="milliseconds")


@contextlib.contextmanager
def _acting(state_dir: Path, action: str, model: str, version: str | None, detail: str) -> Iterator[None]:
    """Alone with a model's rollout, and with a line in the audit log. Raises UsageError where another one acts."""
    outcome, said = DONE, detail
    try:
        with _alone(state_dir, model):
            yield
    except BaseException as error:
        outcome = REFUSED if isinstance(error, UsageError) else FAILED if isinstance(error, Exception) else INTERRUPTED
        said = f"{detail}: {error}" if isinstance(error, Exception) else detail
        raise
    finally:
        Audit(state_dir).record(action, outcome, model=model, version=version, detail=said)


@contextlib.contextmanager
def _alone(state_dir: Path, model: str) -> Iterator[None]:
    file = _file(state_dir, model).with_suffix(".lock")
    with exclusive(
        file,
        f"somebody else is changing the rollout of {model} at this moment; look at "
        f"`skewless rollout status {model}`, and try again if it is still wanted",
    ):
        yield


@contextlib.contextmanager
def exclusive(file: Path, refusal: str) -> Iterator[None]:
    """Held by one process at a time, until it ends at the latest. Raises UsageError(refusal) where another one holds it."""
    try:
        file.parent.mkdir(mode=0o700, exist_ok=True)
        descriptor = os.open(file, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise ServerError(f"{file} cannot be written: {error.strerror}; make room there") from error
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise UsageError(refusal) from error
        yield
    finally:
        os.close(descriptor)

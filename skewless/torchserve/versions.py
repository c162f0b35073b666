"""What a server is meant to serve. Every action on its versions is recorded, so that a restart brings them back.

The record is `versions.json` in the server's state directory: of each model the default version, and of each version its
archive, state, workers and digest. Actions on one server happen one after the other, whoever asks for them, and each leaves a
line in the audit log. What goes past these functions, to TorchServe's management API itself, is not recorded.
"""

from __future__ import annotations

import contextlib
import copy
import fcntl
import json
import os
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from pydantic import ConfigDict, TypeAdapter, ValidationError

from skewless.core.files import atomic
from skewless.errors import ServerError, UsageError
from skewless.torchserve.archive import Archive
from skewless.torchserve.audit import DONE, FAILED, INTERRUPTED, REFUSED, Audit
from skewless.torchserve.server import RECORD, ROLLOUTS, Server
from skewless.torchserve.store import UNPROVED, archives, by_version

_RUNNING = ("shadow", "split")  # phases of a rollout

# registered: somebody asked for it. retired: somebody took it away. store: `serve run` found it in the model store.
State = Literal["registered", "retired", "store"]


@dataclass(frozen=True)
class Recorded:
    """One version. archive: the file's name in the model store. workers: None for the archive's own setting. digest:
    `Archive.digest()`; None where the version was registered by other means."""

    archive: str
    state: State
    workers: int | None = None
    digest: str | None = None
    __pydantic_config__ = ConfigDict(extra="forbid")


@dataclass
class Model:
    """One model. default: the version that is to answer requests that name none; None where nobody has chosen."""

    default: str | None = None
    versions: dict[str, Recorded] = field(default_factory=dict)
    __pydantic_config__ = ConfigDict(extra="forbid")


_FORMAT = TypeAdapter(dict[str, Model])


@dataclass
class Record:
    """What the server of a state directory has had, by model."""

    models: dict[str, Model] = field(default_factory=dict)

    @classmethod
    def read(cls, state_dir: Path) -> Record:
        """The record of a state directory; empty where there is none. Raises UsageError for a file that is no record."""
        path = state_dir / RECORD
        try:
            return cls(_FORMAT.validate_json(path.read_bytes()))
        except FileNotFoundError:
            return cls()
        except (OSError, ValidationError) as error:
            why = error.errors()[0]["msg"] if isinstance(error, ValidationError) else error
            raise UsageError(
                f"{path} cannot be read as the record of a server's versions: {why}; put back a copy of it, or start with "
                "`skewless serve start --forget`, which forgets what was registered"
            ) from error

    def write(self, state_dir: Path) -> None:
        """Replace the file. Raises ServerError where that is not possible."""
        path = state_dir / RECORD
        try:
            with atomic(path) as unfinished:
                unfinished.write_bytes(_FORMAT.dump_json(self.models, indent=2) + b"\n")
                unfinished.chmod(0o600)
        except OSError as error:
            raise ServerError(f"{path} cannot be written: {error.strerror}; make room there") from error

    def of(self, name: str, version: str) -> Recorded | None:
        """What is recorded of one version."""
        return self.models.get(name, Model()).versions.get(version)

    def keep(self, name: str, version: str, recorded: Recorded) -> None:
        """Record one version."""
        self.models.setdefault(name, Model()).versions[version] = recorded

    def default(self, name: str) -> str | None:
        """The recorded default version of a model."""
        return self.models.get(name, Model()).default

    def versions(self, name: str) -> list[str]:
        """Every version of a model that the server has had."""
        return list(self.models.get(name, Model()).versions)

    def check_content(self, name: str, version: str, digest: str) -> None:
        """Raise UsageError where the server has had other content under a name and version."""
        known = self.of(name, version)
        if known and known.digest and known.digest != digest:
            raise UsageError(
                f"this server has had {name} {version} with other content (digest {known.digest[:12]} then, {digest[:12]} "
                "now); build the archive with a new version"
            )

    def states(self, running: bool) -> dict[tuple[str, str], tuple[str, str]]:
        """By name and version: the archive, and how it stands where it is not registered. running: whether a server runs."""
        words = {"registered": "left out" if running else "recorded", "retired": "retired"}
        return {
            (name, version): (recorded.archive, words[recorded.state])
            for name, model in self.models.items()
            for version, recorded in model.versions.items()
            if recorded.state in words
        }


@dataclass
class Restored:
    """What `restore` could not bring back. left_out: reasons, by archive. stand_ins: of a model whose recorded default did
    not load, what serves instead, in words."""

    left_out: dict[str, str] = field(default_factory=dict)
    stand_ins: dict[str, str] = field(default_factory=dict)


def register(
    server: Server,
    archive: str | Path,
    workers: int | None = None,
    default: bool = False,
    timeout: float = 600.0,
) -> dict:
    """As `Server.register`, recorded; returns its row with the archive's `digest`.

    The version that is recorded as the default one becomes it again, where it did not load when the server was started.
    Raises UsageError, too, for other content under a name and version that this server has had.
    """
    archive = Path(archive).resolve()
    with _acting(server, "register", archive.name) as act:
        with Archive(archive) as opened:
            act.model, act.version = opened.name_and_version()
            act.digest = opened.digest()
        act.record.check_content(act.model, act.version, act.digest)
        again = _row(server, act.model, act.version)
        default = default or (again is None and act.record.default(act.model) == act.version)
        act.detail = "as the default version" if default else None
        row = server.register(archive, workers, default, timeout)
        # One that is not proved may be gone in a moment, and its version free for other content.
        if not archive.name.endswith(UNPROVED):
            known = act.record.of(act.model, act.version)
            workers = known.workers if again and known else workers
            _follow(act, server, Recorded(archive.name, "registered", workers, act.digest), chosen=default)
    return row | {"digest": act.digest}


def set_default(server: Server, name: str, version: str) -> dict:
    """Make a registered version the one that answers requests that name none; returns its row of `Server.models()`.

    Raises UsageError for a version that is not registered.
    """
    with _acting(server, "default", name, version) as act:
        row = _registered(server, act)
        server.set_default(name, version)
        _follow(act, server, _recorded(act.record, row), chosen=True)
    return row | {"default": True}


def scale(server: Server, name: str, version: str, workers: int) -> dict:
    """As `Server.scale`, recorded. Raises UsageError, too, for a version that is not registered."""
    with _acting(server, "scale", name, version) as act:
        act.detail = f"workers: {workers}"
        row = _registered(server, act)
        scaled = server.scale(name, version, workers)
        _follow(act, server, replace(_recorded(act.record, row), workers=workers))
    return scaled


def retire(server: Server, name: str, version: str) -> None:
    """Unregister a version, and leave it out when the server is started again; its archive stays in the store.

    Raises UsageError for a version that is not there, for the default one, for one that a running rollout uses, and for the
    last one of its model.
    """
    with _acting(server, "retire", name, version) as act:
        row, known = _row(server, name, version), act.record.of(name, version)
        act.digest = known.digest if known else None
        # One that did not load when the server was started is recorded only.
        if row is None and (known is None or known.state == "retired"):
            raise _unknown(server, name, version)
        others = [each["version"] for each in _rows(server, name) if each["version"] != version]
        if row and not others:
            raise UsageError(
                f"{name} {version} is the only version of {name}; register another one first, or stop the server"
            )
        if (row and row["default"]) or act.record.default(name) == version:
            raise UsageError(
                f"{name} {version} is the default version; choose another one first, with "
                f"`skewless versions default {name} {others[-1] if others else 'VERSION'}`"
            )
        _check_no_rollout(server.state_dir, name, version)
        if row:
            server.unregister(name, version)
            known = _recorded(act.record, row)
        assert known is not None
        act.record.keep(name, version, replace(known, state="retired"))


def withdraw(server: Server, name: str, version: str) -> None:
    """Unregister a version that was registered to be proved, and that nobody was meant to use yet."""
    with _acting(server, "withdraw", name, version):
        server.unregister(name, version)


def restore(server: Server, restored: Restored, whole_store: bool = False) -> None:
    """Register what is recorded, with its workers, and make the recorded versions the default ones.

    An archive that does not load is left out, and so is one whose content is not what was recorded: `restored` receives the
    reason at once, and the record stays as it is. A model whose default is not recorded, or does not load, has the highest
    version that does. whole_store: register every other archive of the model store, too, except those that were retired.
    Raises UsageError for a damaged record, ServerError when TorchServe ends.
    """
    with _one_at_a_time(server.state_dir):
        record = Record.read(server.state_dir)
        before = copy.deepcopy(record)
        by_model: dict[str, list[_Wanted]] = {}
        for each in _wanted(server, record, restored, whole_store):
            by_model.setdefault(each.name, []).append(each)
        for name, wanted in sorted(by_model.items()):
            chosen = record.default(name)
            loaded: list[str] = []
            for each in sorted(wanted, key=lambda each: (each.version != chosen, by_version(each.path))):
                # The chosen one comes first, and stays; without it each next one is higher.
                if _restore_one(server, record, restored, each, default=chosen not in loaded):
                    loaded.append(each.version)
            if chosen and chosen not in loaded:
                instead = f"{loaded[-1]} answers instead" if loaded else "no other version is there"
                restored.stand_ins[name] = (
                    f"{name} {chosen} is recorded as the default version, but was left out; {instead}, until it loads or "
                    "another one is chosen"
                )
        if record != before:
            with _only_told():
                record.write(server.state_dir)


def forget(server: Server) -> None:
    """Forget what was registered, scaled and default, and every digest. The audit log stays, with a line for each model."""
    with _one_at_a_time(server.state_dir):
        path = server.state_dir / RECORD
        if not path.exists():
            return
        try:
            names = sorted(Record.read(server.state_dir).models)
        except UsageError:
            names = ["a record that could not be read"]
        path.unlink()
        for name in names:
            Audit(server.state_dir).record("forget", DONE, model=name)


# --- one action -------------------------------------------------------------------------------------------------------


@dataclass
class _Action:
    """What is being done: its line in the audit log, and the record, which is written when it has succeeded."""

    record: Record
    model: str
    version: str | None
    digest: str | None = None
    detail: str | None = None


@contextlib.contextmanager
def _acting(server: Server, what: str, model: str, version: str | None = None) -> Iterator[_Action]:
    """Alone among the actions on a server: read the record, do the block, write the record, and a line into the audit log."""
    audit = Audit(server.state_dir)
    with _one_at_a_time(server.state_dir):
        act = _Action(Record(), model, version)
        try:
            act.record = Record.read(server.state_dir)
            before = copy.deepcopy(act.record)
            yield act
            if act.record != before:
                try:
                    act.record.write(server.state_dir)
                except ServerError as error:
                    raise ServerError(
                        f"{what} of {act.model} {act.version} is done, but a restart does not know of it: {error}"
                    ) from error
        except BaseException as error:
            detail = ": ".join(filter(None, (act.detail, str(error) if isinstance(error, Exception) else None)))
            with _only_told():
                audit.record(
                    what,
                    _outcome(error),
                    model=act.model,
                    version=act.version,
                    digest=act.digest,
                    detail=detail or None,
                )
            raise
        try:
            audit.record(what, DONE, model=act.model, version=act.version, digest=act.digest, detail=act.detail)
        except ServerError as error:
            raise ServerError(
                f"{what} of {act.model} {act.version} is done, but not in the audit log: {error}"
            ) from error


def _outcome(error: BaseException) -> str:
    if isinstance(error, UsageError):
        return REFUSED
    return FAILED if isinstance(error, Exception) else INTERRUPTED


@contextlib.contextmanager
def _only_told() -> Iterator[None]:
    """Print that something could not be written, where something else matters more."""
    try:
        yield
    except ServerError as error:
        print(error, file=sys.stderr)


@contextlib.contextmanager
def _one_at_a_time(state_dir: Path) -> Iterator[None]:
    """Held by one thread of one process at a time, per state directory, for as long as its action takes."""
    # The folder itself, so that a disk that has become full or read-only hinders nobody.
    descriptor = os.open(state_dir, os.O_RDONLY | os.O_DIRECTORY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            print("waiting for another action on this server to end", file=sys.stderr, flush=True)
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def _follow(act: _Action, server: Server, recorded: Recorded, chosen: bool = False) -> None:
    """Record the version of an action as registered, and the model's default as it is now."""
    assert act.version is not None
    act.record.keep(act.model, act.version, recorded)
    model = act.record.models[act.model]
    rows = {row["version"]: row for row in _rows(server, act.model)}
    if chosen:
        model.default = act.version
    # A default that was left out when the server was started stays recorded, until another one is chosen.
    elif model.default is None or model.default in rows:
        model.default = next((version for version, row in rows.items() if row["default"]), model.default)
    if default := rows.get(model.default or ""):
        act.record.keep(act.model, default["version"], _recorded(act.record, default))


def _recorded(record: Record, row: Mapping[str, Any]) -> Recorded:
    """What is to be recorded of a version that is registered. row: of `Server.models()`."""
    known = record.of(row["name"], row["version"])
    return replace(known, state="registered") if known else Recorded(row["archive"], "registered")


def _rows(server: Server, name: str) -> list[dict]:
    # Without what a retraining is still proving: only that retraining may touch it.
    return [row for row in server.models() if row["name"] == name and not row["archive"].endswith(UNPROVED)]


def _row(server: Server, name: str, version: str) -> dict | None:
    return next((row for row in _rows(server, name) if row["version"] == version), None)


def _registered(server: Server, act: _Action) -> dict:
    """The row of the version of an action. Raises UsageError where it is not registered."""
    assert act.version is not None
    row = _row(server, act.model, act.version)
    if row is None:
        raise _unknown(server, act.model, act.version)
    known = act.record.of(act.model, act.version)
    act.digest = known.digest if known else None
    return row


def _unknown(server: Server, name: str, version: str) -> UsageError:
    there = ", ".join(f"{row['name']} {row['version']}" for row in server.models()) or "none"
    return UsageError(f"{name} {version} is not registered; registered: {there}")


def _check_no_rollout(state_dir: Path, name: str, version: str) -> None:
    """Raise UsageError where a rollout that has not ended uses a version."""
    path = state_dir / ROLLOUTS / f"{name}.json"
    try:
        rollout = json.loads(path.read_bytes())
        running = rollout["phase"] in _RUNNING and version in (rollout["baseline"], rollout["candidate"])
    except FileNotFoundError:
        return
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise UsageError(f"whether a rollout uses {name} {version} cannot be read in {path}: {error!r}") from error
    if running:
        raise UsageError(
            f"{name} {version} is part of a rollout that has not ended; end it first, with `skewless rollout promote {name}` "
            f"or `skewless rollout abort {name}`"
        )


# --- a start ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Wanted:
    name: str
    version: str
    path: Path
    workers: int | None = None


def _wanted(server: Server, record: Record, restored: Restored, whole_store: bool) -> Iterator[_Wanted]:
    """The archives to register, in no order."""
    recorded = set()
    for name, model in record.models.items():
        for version, each in model.versions.items():
            if each.state == "registered":
                recorded.add(each.archive)
                yield _Wanted(name, version, server.model_store / each.archive, each.workers)
    for path in archives(server.model_store) if whole_store else ():
        if path.name in recorded:
            continue
        try:
            with Archive(path) as archive:
                name, version = archive.name_and_version()
        except UsageError as error:
            _leave_out(server, restored, _Wanted(path.name, "", path), error)
            continue
        known = record.of(name, version)
        if known is None or known.state != "retired":
            yield _Wanted(name, version, path)


def _restore_one(server: Server, record: Record, restored: Restored, wanted: _Wanted, default: bool) -> bool:
    """Register one archive; whether that worked."""
    known = record.of(wanted.name, wanted.version) or Recorded(wanted.path.name, "store")
    digest = known.digest
    try:
        if not wanted.path.exists():
            raise UsageError(
                f"{wanted.path} is gone; put it back, or leave it out for good with "
                f"`skewless versions retire {wanted.name} {wanted.version}`"
            )
        with Archive(wanted.path) as archive:
            found, digest = archive.name_and_version(), archive.digest()
        if found != (wanted.name, wanted.version):
            raise UsageError(f"it holds {' '.join(found)}, and {wanted.name} {wanted.version} was registered from it")
        record.check_content(wanted.name, wanted.version, digest)
        server.register(wanted.path, wanted.workers, default)
    except ServerError as error:
        if server.process() is None:
            raise
        _leave_out(server, restored, wanted, error, digest)
        return False
    record.keep(wanted.name, wanted.version, replace(known, archive=wanted.path.name, digest=digest))
    with _only_told():
        Audit(server.state_dir).record("restore", DONE, model=wanted.name, version=wanted.version, digest=digest)
    return True


def _leave_out(
    server: Server, restored: Restored, wanted: _Wanted, error: ServerError, digest: str | None = None
) -> None:
    restored.left_out[wanted.path.name] = str(error)
    print(f"{wanted.path.name} is left out: {error}", file=sys.stderr, flush=True)
    with _only_told():
        Audit(server.state_dir).record(
            "restore",
            _outcome(error),
            model=wanted.name,
            version=wanted.version or None,
            digest=digest,
            detail=str(error),
        )

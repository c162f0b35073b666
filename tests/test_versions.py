"""Versions: the audit log, the record, and a real TorchServe that is killed and comes back as it was."""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import os
import shutil
import signal
import stat
import subprocess
import sys
import time
import zipfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import pytest

from benchmarks.faults import fill, small_disk
from skewless.errors import LoadError, ServerError, UsageError
from skewless.torchserve import audit as audit_module
from skewless.torchserve import versions
from skewless.torchserve.archive import MANIFEST, SIGNATURE, Archive
from skewless.torchserve.audit import Audit, as_text
from skewless.torchserve.client import Client
from skewless.torchserve.server import MARKER, Server
from skewless.torchserve.versions import Model, Record, Recorded, Restored
from tests.conftest import ROOT, call_skewless, run_skewless
from tests.test_server import ECHO, make_archive

# --- an archive's digest ----------------------------------------------------------------------------------------------


FILES = {MANIFEST: '{"model": {"modelName": "echo", "modelVersion": "1.0"}}', "a.txt": "one", "b/c.txt": "two" * 100}


def zipped(path: Path, files: dict[str, str], compression: int = zipfile.ZIP_STORED, year: int = 2020) -> str:
    """The digest of an archive of these files, in this order."""
    with zipfile.ZipFile(path, "w", compression) as file:
        for name, content in files.items():
            file.writestr(zipfile.ZipInfo(name, (year, 1, 1, 0, 0, 0)), content, compression)
    with Archive(path) as archive:
        return archive.digest()


def test_a_digest_is_that_of_the_files_however_they_are_zipped(tmp_path: Path):
    path = tmp_path / "echo.mar"
    digest = zipped(path, FILES)
    assert len(digest) == 64 and zipped(path, FILES) == digest
    assert zipped(path, dict(reversed(FILES.items()))) == digest
    assert zipped(path, FILES, zipfile.ZIP_DEFLATED, 2025) == digest
    assert zipped(tmp_path / "other.mar", FILES | {"b/": ""}) == digest
    assert zipped(path, FILES | {SIGNATURE: "signed"}) == zipped(path, FILES | {SIGNATURE: "by another"}) == digest


def test_a_digest_knows_every_change_of_a_file(tmp_path: Path):
    renamed = {("a2.txt" if name == "a.txt" else name): content for name, content in FILES.items()}
    swapped = FILES | {"a.txt": FILES["b/c.txt"], "b/c.txt": FILES["a.txt"]}
    changed = [
        FILES | {"a.txt": "One"},
        FILES | {"more.txt": ""},
        {name: content for name, content in FILES.items() if name != "a.txt"},
        renamed,
        swapped,
        # Lines of the text that is hashed, as a file's name would have them.
        FILES | {f"b/{SIGNATURE}": "signed"},
    ]
    digests = [zipped(tmp_path / "echo.mar", files) for files in (FILES, *changed)]
    assert len(set(digests)) == len(digests)


# --- the audit log ----------------------------------------------------------------------------------------------------


def test_an_action_is_one_line_that_only_its_owner_reads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    audit = Audit(tmp_path)
    before = datetime.now(UTC).replace(microsecond=0)
    monkeypatch.delenv("SKEWLESS_ACTOR", raising=False)
    audit.record("register", "done", model="echo", version="1.0", digest="d" * 64)
    monkeypatch.setenv("SKEWLESS_ACTOR", "pipeline 7\x1b[2J")
    audit.record("default", "failed", model="tiny", detail="first line\nsecond line, \ud800")
    assert stat.S_IMODE(audit.path.stat().st_mode) == 0o600
    assert audit.path.read_bytes().count(b"\n") == 2
    (first, second), unreadable = audit.read()
    assert unreadable == 0
    assert list(first) == ["time", "actor", "action", "model", "version", "digest", "outcome", "detail"]
    assert before <= datetime.fromisoformat(first["time"]) <= datetime.now(UTC)
    assert first["actor"].endswith(f"@{os.uname().nodename}") and first["detail"] is None
    assert (second["actor"], second["version"], second["digest"]) == ("pipeline 7\x1b[2J", None, None)
    assert audit.read("tiny") == ([second], 0)
    # A terminal gets no control characters from whoever named himself so.
    shown = as_text([first, second])
    assert len(shown.splitlines()) == 2
    assert "echo  1.0  dddddddddddd  done" in shown and "pipeline 7\\x1b[2J" in shown and "first line\\nsecond" in shown


def test_a_log_that_was_cut_keeps_its_other_lines(tmp_path: Path):
    audit = Audit(tmp_path)
    audit.record("register", "done", model="echo")
    with audit.path.open("ab") as file:
        file.write(b'{"time": "20')
    audit.record("retire", "done", model="echo")
    entries, unreadable = audit.read()
    assert ([entry["action"] for entry in entries], unreadable) == (["register", "retire"], 1)
    shown = call_skewless("versions", "log", "--state-dir", tmp_path)
    assert (shown.returncode, shown.stdout.splitlines()[-1]) == (0, "1 of its lines cannot be read")
    found = json.loads(call_skewless("versions", "log", "none", "--state-dir", tmp_path, "--json").stdout)
    assert found == {"entries": [], "unreadable": 1}


def write_lines(state_dir: Path, number: int) -> None:
    for _ in range(50):
        Audit(state_dir).record("register", "done", model=f"m{number}", detail="x" * 5000)


def test_lines_of_several_processes_stay_whole(tmp_path: Path):
    processes = [
        multiprocessing.get_context("fork").Process(target=write_lines, args=(tmp_path, number)) for number in range(4)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
        assert process.exitcode == 0
    entries, unreadable = Audit(tmp_path).read()
    assert unreadable == 0
    assert sorted(entry["model"] for entry in entries) == sorted(f"m{number}" for number in range(4) for _ in range(50))


def test_a_log_that_cannot_be_written_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    with pytest.raises(ServerError, match=r"audit\.jsonl cannot be written: No such file or directory"):
        Audit(tmp_path / "none").record("register", "done", model="echo")
    with monkeypatch.context() as patch:
        patch.setattr(audit_module.os, "write", lambda descriptor, line: len(line) - 1)
        with pytest.raises(ServerError, match=r"took \d+ of a line's \d+ bytes; make room"):
            Audit(tmp_path).record("register", "done", model="echo")


# --- the record -------------------------------------------------------------------------------------------------------


def test_a_record_is_read_as_it_was_written(tmp_path: Path):
    assert Record.read(tmp_path) == Record()
    record = Record({"echo": Model("1.0", {"1.0": Recorded("echo-1.0.mar", "registered", 2, "d" * 64)})})
    record.keep("tiny", "3.0", Recorded("tiny-3.0.mar", "store"))
    record.write(tmp_path)
    assert Record.read(tmp_path) == record
    assert [path.name for path in tmp_path.iterdir()] == ["versions.json"]
    assert record.states(running=True) == {("echo", "1.0"): ("echo-1.0.mar", "left out")}


@pytest.mark.parametrize(
    "text",
    ["", "[]", '{"echo": {"default": "1.0"', '{"echo": {"versions": {"1.0": {"archive": "a", "state": "gone"}}}}'],
)
def test_a_damaged_record_is_told(tmp_path: Path, text: str):
    (tmp_path / "versions.json").write_text(text)
    with pytest.raises(UsageError, match=r"versions\.json cannot be read .* `skewless serve start --forget`"):
        Record.read(tmp_path)


# --- actions, without TorchServe --------------------------------------------------------------------------------------


class Registry:
    """A server, as far as the actions ask it. fails: versions that do not load. calls: what it was asked to do."""

    def __init__(self, folder: Path, fails: tuple[str, ...] = ()):
        self.model_store, self.state_dir = folder / "store", folder / "state"
        for path in (self.model_store, self.state_dir):
            path.mkdir(exist_ok=True)
        self.fails = fails
        self.rows: list[dict] = []
        self.calls: list[tuple] = []

    def archive(self, version: str, name: str = "echo", content: str = "") -> Path:
        path = self.model_store / f"{name}-{version}.mar"
        manifest = json.dumps({"model": {"modelName": name, "modelVersion": version}})
        zipped(path, {MANIFEST: manifest, "content": content})
        return path

    def process(self) -> object:
        return self

    def models(self) -> list[dict]:
        return self.rows

    def register(self, archive: Path, workers: int | None, default: bool, timeout: float = 0) -> dict:
        with Archive(archive) as opened:
            name, version = opened.name_and_version()
        self.calls.append(("register", version, workers, default))
        if version in self.fails:
            raise LoadError("the self-test failed")
        row = {"name": name, "version": version, "archive": archive.name, "default": False, "workers": ["READY"]}
        self.rows.append(row)
        if default or not any(each["default"] for each in self.rows if each["name"] == name):
            self.set_default(name, version)
        return row

    def set_default(self, name: str, version: str) -> None:
        for row in self.rows:
            if row["name"] == name:
                row["default"] = row["version"] == version

    def scale(self, name: str, version: str, workers: int) -> dict:
        self.calls.append(("scale", version, workers))
        return next(row for row in self.rows if row["version"] == version)

    def unregister(self, name: str, version: str) -> None:
        self.rows = [row for row in self.rows if (row["name"], row["version"]) != (name, version)]

    def restarted(self, whole_store: bool = False, fails: tuple[str, ...] = ()) -> tuple[list[tuple], Restored]:
        """What another server in the same folder serves, as (version, default), and what it could not bring back."""
        self.rows, self.calls, self.fails, restored = [], [], fails, Restored()
        versions.restore(self, restored, whole_store)
        return [(row["version"], row["default"]) for row in self.rows], restored

    def log(self) -> list[tuple]:
        return [(each["action"], each["version"], each["outcome"]) for each in Audit(self.state_dir).read()[0]]


@pytest.fixture
def registry(tmp_path: Path) -> Registry:
    return Registry(tmp_path)


def test_what_was_registered_scaled_and_default_comes_back(registry: Registry):
    for version in ("1.0", "2.0", "10.0"):
        versions.register(registry, registry.archive(version), workers=3 if version == "2.0" else None)
    versions.set_default(registry, "echo", "10.0")
    versions.set_default(registry, "echo", "2.0")
    versions.scale(registry, "echo", "10.0", 4)
    assert registry.log() == [
        *[("register", version, "done") for version in ("1.0", "2.0", "10.0")],
        *[("default", version, "done") for version in ("10.0", "2.0")],
        ("scale", "10.0", "done"),
    ]
    served, restored = registry.restarted()
    # The default one comes first, so that nothing else is the default meanwhile.
    assert served == [("2.0", True), ("1.0", False), ("10.0", False)]
    assert [call[1:3] for call in registry.calls] == [("2.0", 3), ("1.0", None), ("10.0", 4)]
    assert restored == Restored()
    assert registry.restarted(whole_store=True)[0] == served


def test_a_first_version_stays_the_default_beside_others(registry: Registry):
    """Nobody said --default: what answered stays what answers."""
    versions.register(registry, registry.archive("1.0"))
    versions.register(registry, registry.archive("2.0"))
    assert registry.restarted()[0] == registry.restarted(whole_store=True)[0] == [("1.0", True), ("2.0", False)]


def test_without_a_choice_the_highest_of_the_store_is_the_default(registry: Registry):
    registry.archive("1.0"), registry.archive("9.0")
    assert registry.restarted(whole_store=True)[0] == [("1.0", False), ("9.0", True)]
    registry.archive("10.0")
    assert registry.restarted(whole_store=True)[0] == [("1.0", False), ("9.0", False), ("10.0", True)]
    # `serve start` brings back what somebody registered, and that nobody did.
    assert registry.restarted()[0] == []
    # From here on somebody has chosen.
    registry.restarted(whole_store=True)
    versions.set_default(registry, "echo", "9.0")
    registry.archive("11.0")
    assert registry.restarted(whole_store=True)[0] == [("9.0", True), ("1.0", False), ("10.0", False), ("11.0", False)]


def test_a_version_registered_beside_the_store_does_not_take_over_at_a_restart(registry: Registry):
    registry.archive("1.0")
    registry.restarted(whole_store=True)
    versions.register(registry, registry.archive("2.0"))
    served = [("1.0", True), ("2.0", False)]
    assert registry.restarted(whole_store=True)[0] == registry.restarted()[0] == served


def test_what_was_served_from_the_store_has_taken_its_version(registry: Registry):
    registry.archive("1.0")
    assert registry.restarted(whole_store=True)[0] == [("1.0", True)]
    with pytest.raises(UsageError, match=r"has had echo 1\.0 with other content"):
        versions.register(registry, registry.archive("1.0", content="other"))
    assert "has had echo 1.0 with other content" in registry.restarted(True)[1].left_out["echo-1.0.mar"]


def test_a_retired_version_stays_away_until_it_is_registered(registry: Registry):
    for version in ("1.0", "2.0", "3.0"):
        versions.register(registry, registry.archive(version))
    versions.set_default(registry, "echo", "2.0")
    versions.retire(registry, "echo", "3.0")
    assert [row["version"] for row in registry.rows] == ["1.0", "2.0"]
    assert registry.restarted()[0] == registry.restarted(whole_store=True)[0] == [("2.0", True), ("1.0", False)]
    versions.register(registry, registry.model_store / "echo-3.0.mar")
    assert registry.restarted()[0] == [("2.0", True), ("1.0", False), ("3.0", False)]


@pytest.mark.parametrize("phase", ["shadow", "split", "promoted", "aborted"])
def test_a_version_of_a_running_rollout_is_not_retired(registry: Registry, phase: str):
    for version in ("1.0", "2.0", "3.0"):
        versions.register(registry, registry.archive(version))
    (registry.state_dir / "rollouts").mkdir()
    rollout = registry.state_dir / "rollouts" / "echo.json"
    rollout.write_text(json.dumps({"phase": phase, "baseline": "1.0", "candidate": "2.0"}))
    versions.retire(registry, "echo", "3.0")
    if phase in ("shadow", "split"):
        with pytest.raises(
            UsageError, match=r"echo 2\.0 is part of a rollout that has not ended; .* rollout abort echo"
        ):
            versions.retire(registry, "echo", "2.0")
    else:
        rollout.write_text("{")
        with pytest.raises(UsageError, match=r"cannot be read in .*echo\.json"):
            versions.retire(registry, "echo", "2.0")
        rollout.write_text(json.dumps({"phase": phase, "baseline": "1.0", "candidate": "2.0"}))
        versions.retire(registry, "echo", "2.0")


def test_what_cannot_be_is_refused_and_noted(registry: Registry):
    versions.register(registry, registry.archive("1.0"))
    with pytest.raises(UsageError, match=r"echo 1\.0 is the only version of echo"):
        versions.retire(registry, "echo", "1.0")
    versions.register(registry, registry.archive("2.0"))
    before = (registry.rows.copy(), Record.read(registry.state_dir))
    with pytest.raises(UsageError, match=r"1\.0 is the default version; .* `skewless versions default echo 2\.0`"):
        versions.retire(registry, "echo", "1.0")
    for act in (versions.retire, versions.set_default, lambda *which: versions.scale(*which, 2)):
        with pytest.raises(UsageError, match=r"echo 3\.0 is not registered; registered: echo 1\.0, echo 2\.0"):
            act(registry, "echo", "3.0")
    (registry.model_store / "cut.mar").write_bytes(b"no archive")
    with pytest.raises(UsageError, match="is not a model archive"):
        versions.register(registry, registry.model_store / "cut.mar")
    registry.fails = ("4.0",)
    with pytest.raises(LoadError, match="the self-test failed"):
        versions.register(registry, registry.archive("4.0"), default=True)
    assert (registry.rows, Record.read(registry.state_dir)) == before
    assert registry.log()[1:] == [
        ("retire", "1.0", "refused"),
        ("register", "2.0", "done"),
        ("retire", "1.0", "refused"),
        ("retire", "3.0", "refused"),
        ("default", "3.0", "refused"),
        ("scale", "3.0", "refused"),
        ("register", None, "refused"),
        ("register", "4.0", "failed"),
    ]
    last = Audit(registry.state_dir).read()[0][-1]
    assert last["detail"] == "as the default version: the self-test failed" and len(last["digest"]) == 64


def test_other_content_under_a_version_is_refused(registry: Registry):
    versions.register(registry, registry.archive("1.0"))
    versions.register(registry, registry.archive("2.0"))
    versions.retire(registry, "echo", "2.0")
    second = registry.archive("2.0", content="other")
    with pytest.raises(
        UsageError, match=r"has had echo 2\.0 with other content .* build the archive with a new version"
    ):
        versions.register(registry, second)
    # The same content, zipped again, is the same.
    registry.archive("2.0")
    versions.register(registry, second)
    # One that never loaded has taken no version.
    registry.fails = ("3.0",)
    with pytest.raises(LoadError):
        versions.register(registry, registry.archive("3.0", content="does not load"))
    registry.fails = ()
    versions.register(registry, registry.archive("3.0", content="mended"))
    # A restart does not serve it either.
    registry.archive("3.0", content="changed behind its back")
    served, restored = registry.restarted(whole_store=True)
    assert served == [("1.0", True), ("2.0", False)]
    assert "has had echo 3.0 with other content" in restored.left_out["echo-3.0.mar"]


def test_a_recorded_default_that_does_not_load_comes_back_when_it_does(registry: Registry):
    for version in ("1.0", "2.0", "3.0"):
        versions.register(registry, registry.archive(version))
    versions.set_default(registry, "echo", "2.0")
    served, restored = registry.restarted(fails=("2.0",))
    assert served == [("1.0", False), ("3.0", True)]
    assert restored.left_out == {"echo-2.0.mar": "the self-test failed"}
    assert restored.stand_ins["echo"].startswith(
        "echo 2.0 is recorded as the default version, but was left out; 3.0 answers instead, until it loads"
    )
    # What is done meanwhile does not forget it.
    registry.fails = ()
    versions.register(registry, registry.archive("4.0"))
    versions.scale(registry, "echo", "1.0", 2)
    assert registry.restarted()[0] == [("2.0", True), ("1.0", False), ("3.0", False), ("4.0", False)]
    registry.restarted(fails=("2.0",))
    registry.fails = ()
    assert versions.register(registry, registry.model_store / "echo-2.0.mar")["default"]
    # Unless another one is chosen.
    registry.restarted(fails=("2.0",))
    with pytest.raises(UsageError, match=r"2\.0 is the default version"):
        versions.retire(registry, "echo", "2.0")
    versions.set_default(registry, "echo", "1.0")
    versions.retire(registry, "echo", "2.0")
    assert registry.restarted()[0] == [("1.0", True), ("3.0", False), ("4.0", False)]


def test_an_archive_that_is_gone_or_another_keeps_no_other_away(registry: Registry):
    for version in ("1.0", "2.0", "3.0"):
        versions.register(registry, registry.archive(version))
    versions.register(registry, registry.archive("1.0", "tiny"))
    (registry.model_store / "echo-1.0.mar").unlink()
    shutil.copy(registry.model_store / "tiny-1.0.mar", registry.model_store / "echo-2.0.mar")
    served, restored = registry.restarted()
    assert served == [("3.0", True), ("1.0", True)]
    assert (
        "is gone; put it back, or leave it out for good with `skewless versions retire echo 1.0`"
        in (restored.left_out["echo-1.0.mar"])
    )
    assert "it holds tiny 1.0, and echo 2.0 was registered from it" in restored.left_out["echo-2.0.mar"]
    assert set(restored.stand_ins) == {"echo"}
    assert ("restore", "1.0", "refused") in registry.log() and ("restore", "3.0", "done") in registry.log()


def test_a_server_that_ends_during_a_restore_is_told(registry: Registry, monkeypatch: pytest.MonkeyPatch):
    versions.register(registry, registry.archive("1.0"))
    monkeypatch.setattr(registry, "process", lambda: None)
    with pytest.raises(LoadError):
        registry.restarted(fails=("1.0",))


def test_what_is_forgotten_is_free_again_and_noted(registry: Registry):
    versions.register(registry, registry.archive("1.0"))
    versions.forget(registry)
    assert registry.restarted()[0] == []
    versions.register(registry, registry.archive("1.0", content="other"))
    (registry.state_dir / "versions.json").write_text("{")
    versions.forget(registry)
    versions.forget(registry)
    assert [entry for entry in registry.log() if entry[0] == "forget"] == [("forget", None, "done")] * 2


def test_an_action_that_cannot_be_recorded_says_so(registry: Registry, monkeypatch: pytest.MonkeyPatch, capsys):
    for version in ("1.0", "2.0"):
        versions.register(registry, registry.archive(version))

    def full(*_: object, **__: object) -> None:
        raise ServerError("no space left")

    with monkeypatch.context() as patch:
        patch.setattr(Record, "write", full)
        with pytest.raises(
            ServerError, match=r"default of echo 2\.0 is done, but a restart does not know of it: no space"
        ):
            versions.set_default(registry, "echo", "2.0")
        assert registry.rows[1]["default"]
    with monkeypatch.context() as patch:
        patch.setattr(Audit, "record", full)
        with pytest.raises(ServerError, match=r"default of echo 2\.0 is done, but not in the audit log: no space left"):
            versions.set_default(registry, "echo", "2.0")
        # A refusal stays what it is.
        with pytest.raises(UsageError, match=r"2\.0 is the default version"):
            versions.retire(registry, "echo", "2.0")
        assert capsys.readouterr().err == "no space left\n"
    assert Record.read(registry.state_dir).default("echo") == "2.0"


def test_actions_of_several_at_once_come_one_after_the_other(registry: Registry, monkeypatch: pytest.MonkeyPatch):
    for version in ("1.0", "2.0"):
        versions.register(registry, registry.archive(version))
    inside: list[str] = []

    def slow(name: str, version: str, workers: int) -> dict:
        inside.append("begun")
        assert inside.count("begun") - inside.count("ended") == 1
        time.sleep(0.05)
        inside.append("ended")
        return registry.rows[0]

    monkeypatch.setattr(registry, "scale", slow)
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda workers: versions.scale(registry, "echo", "1.0", workers), range(1, 9)))
    details = [each["detail"] for each in Audit(registry.state_dir).read()[0] if each["action"] == "scale"]
    assert sorted(details) == [f"workers: {number}" for number in range(1, 9)]
    # The last line is what is recorded.
    assert f"workers: {Record.read(registry.state_dir).of('echo', '1.0').workers}" == details[-1]


def test_an_interrupted_action_is_noted_and_holds_nothing(registry: Registry, monkeypatch: pytest.MonkeyPatch):
    versions.register(registry, registry.archive("1.0"))

    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(registry, "scale", interrupted)
        with pytest.raises(KeyboardInterrupt):
            versions.scale(registry, "echo", "1.0", 2)
    assert registry.log()[-1] == ("scale", "1.0", "interrupted")
    versions.scale(registry, "echo", "1.0", 2)
    assert registry.log()[-1] == ("scale", "1.0", "done")


# --- a real TorchServe ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Place:
    """A store and a state directory, for commands as an operator gives them."""

    folder: Path

    @property
    def store(self) -> Path:
        return self.folder / "store"

    @property
    def state(self) -> Path:
        return self.folder / "state"

    def skewless(self, *arguments: object, actor: str = "ada") -> subprocess.CompletedProcess[str]:
        environment = {"SKEWLESS_ACTOR": actor}
        return run_skewless(*arguments, "--state-dir", self.state, check=False, environment=environment)

    def start(self, *options: str) -> subprocess.CompletedProcess[str]:
        return self.skewless("serve", "start", "--model-store", self.store, "--ports", "free", *options)

    def served(self) -> dict[str, tuple[bool, int]]:
        """Of each version whether it is the default one, and its workers, all of which are ready."""
        rows = Server.attach(self.state).models()
        assert all(set(row["workers"]) == {"READY"} for row in rows), rows
        return {row["version"]: (row["default"], len(row["workers"])) for row in rows}

    def answers(self) -> set[str]:
        """The versions that answer a request without one, by REST and gRPC."""
        with Client(Server.attach(self.state)) as client:
            answers = client.predict_rest("echo", b"audio"), client.predict_grpc("echo", b"audio")
            return {answer.body["version"] for answer in answers}

    def kill(self) -> None:
        server = Server.attach(self.state)
        os.kill(server.pid, signal.SIGKILL)
        deadline = time.monotonic() + 60
        while server.process():
            assert time.monotonic() < deadline
            time.sleep(0.1)


@pytest.fixture
def place(tmp_path: Path) -> Iterator[Place]:
    made = Place(tmp_path)
    made.store.mkdir()
    try:
        yield made
    finally:
        with contextlib.suppress(UsageError):
            Server.attach(made.state).stop()


@pytest.mark.chain
def test_a_killed_server_comes_back_as_it_was(place: Place):
    for version in ("1.0", "2.0"):
        make_archive(place.store, version, ECHO)
    assert place.start().returncode == 0
    for version in ("1.0", "2.0"):
        done = place.skewless("versions", "register", place.store / f"echo-{version}.mar")
        assert done.returncode == 0, done.stderr
    scaled = place.skewless("versions", "scale", "echo", "2.0", "--workers", 2)
    assert (scaled.returncode, scaled.stdout) == (0, "echo 2.0: workers READY, READY\n")
    done = place.skewless("versions", "default", "echo", "2.0", actor="ben")
    assert (done.returncode, done.stdout) == (0, "echo 2.0 is the default version\n")
    served = {"1.0": (False, 1), "2.0": (True, 2)}
    assert (place.served(), place.answers()) == (served, {"2.0"})

    place.kill()
    done = place.start()
    assert done.returncode == 0, done.stderr
    assert (place.served(), place.answers()) == (served, {"2.0"})
    found = json.loads(place.skewless("versions", "list", "--json").stdout)["versions"]
    assert [(row["version"], row["state"]) for row in found] == [("1.0", "registered"), ("2.0", "default")]

    # Its default is gone: what is left serves, and the exit code says so.
    place.kill()
    (place.store / "echo-2.0.mar").unlink()
    done = place.start("--json")
    assert done.returncode == 1
    shown = json.loads(done.stdout)
    assert "echo-2.0.mar is gone" in shown["left_out"]["echo-2.0.mar"]
    assert "1.0 answers instead" in shown["stand_ins"]["echo"]
    assert (place.served(), place.answers()) == ({"1.0": (True, 1)}, {"1.0"})
    assert Record.read(place.state).default("echo") == "2.0"

    logged = json.loads(place.skewless("versions", "log", "echo", "--json").stdout)["entries"]
    assert [(each["actor"], each["action"], each["version"], each["outcome"]) for each in logged][:6] == [
        ("ada", "register", "1.0", "done"),
        ("ada", "register", "2.0", "done"),
        ("ada", "scale", "2.0", "done"),
        ("ben", "default", "2.0", "done"),
        ("ada", "restore", "2.0", "done"),
        ("ada", "restore", "1.0", "done"),
    ]
    # And with nothing, if that is what is wanted.
    Server.attach(place.state).stop()
    assert (place.start("--forget").returncode, place.served()) == (0, {})


@pytest.mark.chain
def test_a_rollback_outlives_the_container(place: Place):
    """`serve run`, TorchServe killed, and again: the highest version of the store does not take over."""
    for version in ("1.0", "2.0"):
        make_archive(place.store, version, ECHO)
    command = [
        sys.executable,
        "-m",
        "skewless",
        "serve",
        "run",
        "--state-dir",
        place.state,
        "--model-store",
        place.store,
    ]

    @contextlib.contextmanager
    def running(name: str, code: int) -> Iterator[None]:
        with (place.folder / name).open("w") as out:
            process = subprocess.Popen([*command, "--ports", "free", "--json"], cwd=ROOT, stdout=out)
        try:
            deadline = time.monotonic() + 120
            while not (place.folder / name).read_text().endswith("}\n"):
                assert process.poll() is None and time.monotonic() < deadline
                time.sleep(0.1)
            yield
            assert process.wait(60) == code
        finally:
            process.terminate()
            process.wait(60)

    with running("first", 1):
        assert (place.served(), place.answers()) == ({"1.0": (False, 1), "2.0": (True, 1)}, {"2.0"})
        assert place.skewless("versions", "default", "echo", "1.0").returncode == 0
        place.kill()
    make_archive(place.store, "3.0", ECHO)
    with running("second", 1):
        assert place.answers() == {"1.0"}
        assert place.skewless("versions", "retire", "echo", "2.0").returncode == 0
        place.kill()
    with running("third", 1):
        assert (place.served(), place.answers()) == ({"1.0": (True, 1), "3.0": (False, 1)}, {"1.0"})
        place.kill()


@pytest.mark.chain
def test_two_operators_at_once_wait_for_each_other(place: Place):
    flag = place.folder / "flag"
    make_archive(place.store, "1.0", ECHO)
    make_archive(
        place.store, "2.0", f"import os, time\nwhile not os.path.exists({str(flag)!r}): time.sleep(0.05)\n{ECHO}"
    )
    assert place.start().returncode == 0
    assert place.skewless("register", place.store / "echo-1.0.mar").returncode == 0
    base = [sys.executable, "-m", "skewless"]
    where = ["--state-dir", str(place.state)]

    def operator(name: str, *arguments: str) -> subprocess.Popen[str]:
        environment = os.environ | {"SKEWLESS_ACTOR": name}
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        return subprocess.Popen([*base, *arguments, *where], cwd=ROOT, env=environment, **pipes)

    server = Server.attach(place.state)
    archive = str(place.store / "echo-2.0.mar")
    with operator("ada", "register", archive) as ada:
        try:
            deadline = time.monotonic() + 60
            while len(server.models()) < 2:
                assert time.monotonic() < deadline
                time.sleep(0.1)
            with operator("ben", "versions", "default", "echo", "2.0") as ben:
                assert ben.stderr.readline() == "waiting for another action on this server to end\n"
                assert ada.poll() is None and place.answers() == {"1.0"}
                flag.touch()
                assert (ada.wait(60), ben.wait(60)) == (0, 0)
        finally:
            flag.touch()
    assert place.answers() == {"2.0"}
    entries = Audit(place.state).read("echo")[0][-2:]
    assert [(each["actor"], each["action"], each["version"], each["outcome"]) for each in entries] == [
        ("ada", "register", "2.0", "done"),
        ("ben", "default", "2.0", "done"),
    ]


@pytest.mark.chain
def test_a_scaling_that_fails_leaves_the_workers_that_there_were(place: Place):
    """Its first worker loads; the next ones find that they should not."""
    flag = place.folder / "flag"
    code = f"import os\nassert not os.path.exists({str(flag)!r}), 'no second worker'\n{ECHO}"
    make_archive(place.store, "1.0", code)
    assert place.start().returncode == 0
    assert place.skewless("register", place.store / "echo-1.0.mar").returncode == 0
    flag.touch()
    done = place.skewless("versions", "scale", "echo", "1.0", "--workers", 2)
    assert (done.returncode, "the worker wrote down no reason" in done.stderr) == (1, True), done.stderr
    assert place.served() == {"1.0": (True, 1)}
    assert Record.read(place.state).of("echo", "1.0").workers is None
    done = place.skewless("versions", "scale", "echo", "1.0", "--workers", 0)
    assert (done.returncode, "workers is 0; expected 1 or more" in done.stderr) == (2, True)


@pytest.mark.chain
def test_a_rollback_on_a_full_disk_is_done_and_told(tmp_path: Path):
    try:
        with small_disk(tmp_path / "disk", 24) as disk:
            place = Place(disk)
            place.store.mkdir()
            for version in ("1.0", "2.0"):
                make_archive(place.store, version, ECHO)
            assert place.start().returncode == 0
            try:
                for version in ("1.0", "2.0"):
                    assert place.skewless("register", "--default", place.store / f"echo-{version}.mar").returncode == 0
                recorded = (place.state / "versions.json").read_bytes()
                filler = fill(disk)
                done = place.skewless("versions", "default", "echo", "1.0")
                assert (done.returncode, "is done, but a restart does not know of it" in done.stderr) == (1, True), done
                assert "No space left on device" in done.stderr and place.answers() == {"1.0"}
                assert (place.state / "versions.json").read_bytes() == recorded
                filler.unlink()
                assert place.skewless("versions", "default", "echo", "1.0").returncode == 0
                assert Record.read(place.state).default("echo") == "1.0"
            finally:
                Server.attach(place.state).stop()
    except PermissionError as error:
        pytest.skip(str(error))


@pytest.mark.chain
def test_a_damaged_record_stops_the_start_and_is_kept(place: Place):
    place.state.mkdir()
    (place.state / MARKER).touch()
    (place.state / "versions.json").write_text("{")
    done = place.start()
    assert (done.returncode, "cannot be read as the record of a server's versions" in done.stderr) == (2, True)
    assert (place.state / "versions.json").read_text() == "{"
    with pytest.raises(UsageError, match="no server is running"):
        Server.attach(place.state)

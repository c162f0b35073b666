"""Retraining: what is merged, what a poller reads. The whole way is in test_archives.py, with a real server."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import subprocess
import sys
import time
import zipfile
from pathlib import Path
from types import SimpleNamespace

import pytest

import skewless.torchserve.retrain as module
from skewless.errors import LoadError, ServerError, UsageError
from skewless.packaging.build import Built
from skewless.packaging.reservation import Reservation, reserved, version_file
from skewless.torchserve.audit import Audit
from skewless.torchserve.retrain import (
    STATUS,
    Status,
    check_version,
    merged,
    next_version,
    read_status,
    reserve_folder,
    reserve_version,
)
from skewless.torchserve.store import archives, listing
from skewless.torchserve.versions import Record, Recorded
from skewless.training.config import Config
from skewless.training.manifest import ManifestError
from tests.conftest import ROOT, call_skewless


def corpus(folder: Path, rows: list[tuple[str, str, str, str]]) -> tuple[Path, Path]:
    folder.mkdir()
    lines = ["file_path,label,split,group"]
    for name, *rest in rows:
        (folder / name).write_bytes(f"{folder}/{name}".encode())
        lines.append(",".join((name, *rest)))
    (folder / "manifest.csv").write_text("\n".join(lines) + "\n")
    return folder / "manifest.csv", folder


def test_manifests_are_merged_whatever_their_files_are_called(tmp_path: Path):
    first = corpus(tmp_path / "old", [("a.wav", "good", "train", "ada"), ("b.wav", "poor", "test", "ben")])
    second = corpus(tmp_path / "new", [("a.wav", "poor", "train", "cem")])
    rows = merged([first, second], ("poor", "good"))
    assert [(r.path.parent.name, r.label, r.split, r.group) for r in rows] == [
        ("old", 1, "train", "ada"),
        ("old", 0, "test", "ben"),
        ("new", 0, "train", "cem"),
    ]
    assert [r.file_path for r in rows] == ["1/a.wav", "1/b.wav", "2/a.wav"]
    with pytest.raises(
        ManifestError,
        match=r"old/a\.wav of manifest 1 and .*old/a\.wav of manifest 2 are the same recording, .*list it in one of them",
    ):
        merged([first, first], ("poor", "good"))
    (tmp_path / "old" / "b.wav").write_bytes((tmp_path / "old" / "a.wav").read_bytes())
    with pytest.raises(
        ManifestError, match=r"a\.wav and .*b\.wav are the same recording, byte for byte, in the splits train and test"
    ):
        merged([first], ("poor", "good"))


def record(state_dir: Path, version: str) -> None:
    """As a server whose `talent` had such a version, which is gone by now."""
    had = Record()
    had.keep("talent", version, Recorded(f"talent-{version}.mar", "retired"))
    had.write(state_dir)


def test_a_version_is_refused_before_the_training(tmp_path: Path):
    (tmp_path / "talent-3.0.mar").write_bytes(b"")
    models = [{"name": "talent", "version": "2.0"}]
    server = SimpleNamespace(models=lambda: models, model_store=tmp_path, state_dir=tmp_path)
    record(tmp_path, "3.5")
    check_version(server, "talent", "4.0-b")
    for version, message in (
        ("2.0", "exists already"),
        ("3.0", "exists already"),
        ("3.5", "exists already"),
        ("../4", "expected digits and letters"),
    ):
        with pytest.raises(UsageError, match=message):
            check_version(server, "talent", version)


def test_a_singer_stays_on_one_side_over_all_manifests(tmp_path: Path):
    first = corpus(tmp_path / "old", [("a.wav", "good", "test", "ada")])
    second = corpus(tmp_path / "new", [("c.wav", "poor", "train", "ada")])
    with pytest.raises(ManifestError, match="group 'ada' is in split train here and in test elsewhere"):
        merged([first, second], ("poor", "good"))


def test_the_next_version_is_above_all_that_there_are(tmp_path: Path):
    (tmp_path / "talent-3.1.mar").write_bytes(b"")
    models = [{"name": "talent", "version": "1.0"}, {"name": "orca", "version": "9.0"}]
    server = SimpleNamespace(models=lambda: models, model_store=tmp_path, state_dir=tmp_path)
    assert next_version(server, "talent") == "4.0"
    record(tmp_path, "6.2")
    assert next_version(server, "talent") == "7.0"
    assert next_version(server, "orca") == "10.0"
    assert next_version(server, "portrait") == "1.0"


def test_a_status_is_read_as_it_was_written(tmp_path: Path):
    Status("2.0", os.getpid()).write(tmp_path, progress=40, step="training", message="epoch 3")
    read = read_status(tmp_path)
    assert (read.state, read.progress, read.step, read.message) == ("running", 40, "training", "epoch 3")
    assert [p.name for p in tmp_path.iterdir()] == [STATUS]


def test_a_process_that_is_gone_has_failed(tmp_path: Path):
    with subprocess.Popen([sys.executable, "-c", "pass"]) as process:
        process.wait()
    Status("2.0", process.pid).write(tmp_path, step="training")
    assert read_status(tmp_path).state == "failed"
    # The same number, given to a process that is younger than the status.
    Status("2.0", os.getpid(), started=time.time() - 10**7).write(tmp_path, step="training")
    assert read_status(tmp_path).state == "failed"
    assert "during 'training'" in read_status(tmp_path).message


def test_no_status_and_a_broken_one_are_told(tmp_path: Path):
    with pytest.raises(UsageError, match="no retraining was started there"):
        read_status(tmp_path)
    (tmp_path / STATUS).write_text(json.dumps({"state": "running"}))
    with pytest.raises(UsageError, match="not a retraining's status"):
        read_status(tmp_path)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("status",), "--out"),
        (("status", "--out", "nowhere"), "no retraining was started there"),
        (("start", "archive/talent"), "--manifest"),
        (("start", "archive/talent", "--manifest", "nowhere.csv"), "nowhere.csv"),
    ],
)
def test_wrong_arguments_exit_with_2(arguments: tuple[str, ...], message: str, tmp_path: Path):
    given = () if arguments[0] == "status" else ("--state-dir", tmp_path)
    result = call_skewless("retrain", *arguments, *given)
    assert result.returncode == 2, result.stderr
    assert message in result.stderr and "Traceback" not in result.stderr


# --- what is served, wherever a retraining ends -----------------------------------------------------------------------


class Registry:
    """A server, as far as retraining asks it. seen: the store's archives that a restart would serve, at each step."""

    def __init__(self, folder: Path):
        self.model_store, self.state_dir = folder / "store", folder / "state"
        self.model_store.mkdir()
        self.state_dir.mkdir()
        self.rows: list[dict] = []
        self.seen: list[list[str]] = []

    def models(self) -> list[dict]:
        return self.rows

    def register(self, archive: Path, workers: int | None, default: bool, timeout: float) -> dict:
        assert archive.is_file() and archive.parent == self.model_store
        self.seen.append([path.name for path in archives(self.model_store)])
        self.rows.append(
            {"name": "talent", "version": "2.0", "default": default, "archive": archive.name, "workers": []}
        )
        return self.rows[-1]

    def unregister(self, name: str, version: str) -> None:
        (row,) = [row for row in self.rows if (row["name"], row["version"]) == (name, version)]
        self.rows.remove(row)


def retrain(folder: Path, server: Registry, monkeypatch: pytest.MonkeyPatch, **stand_ins) -> dict:
    """Training, evaluation, building and the smoke test stand aside here: what matters is what becomes of the archive."""

    def build(archive, checkpoint, evaluation, version, out, **_):
        out.mkdir()
        with zipfile.ZipFile(out / f"talent-{version}.mar", "w") as file:
            file.writestr(
                "MAR-INF/MANIFEST.json", f'{{"model": {{"modelName": "talent", "modelVersion": "{version}"}}}}'
            )
        return Built(out / f"talent-{version}.mar", ())

    row = SimpleNamespace(path="gRPC", passed=True, max_dp=0.0)
    usual = {
        "fit": lambda *_, **__: {},
        "evaluate": lambda *_: {},
        "build_archive": build,
        "smoke_test": lambda *_: [row],
    }
    for name, stand_in in (usual | stand_ins).items():
        monkeypatch.setattr(module, name, stand_in)
    archive = ROOT / "archive" / "talent"
    return module.retrain(archive, [], Config(), "2.0", folder / "run", server, folder / "cache")


def test_an_archive_appears_in_the_store_once_it_is_proved(tmp_path: Path, monkeypatch):
    server = Registry(tmp_path)
    result = retrain(tmp_path, server, monkeypatch)
    assert (result["archive"], result["default"]) == ("talent-2.0.mar", False)
    # It was registered twice: hidden, to be proved, and then as what it is called.
    assert server.seen == [[], ["talent-2.0.mar"]]
    assert [row["archive"] for row in server.rows] == ["talent-2.0.mar"]
    assert [path.name for path in server.model_store.iterdir()] == ["talent-2.0.mar"]
    # What was only being proved is in the log and not in the record.
    entries, _ = Audit(server.state_dir).read("talent")
    assert [(entry["action"], entry["version"], entry["outcome"]) for entry in entries] == [
        ("register", "2.0", "done"),
        ("withdraw", "2.0", "done"),
        ("register", "2.0", "done"),
    ]
    assert Record.read(server.state_dir).of("talent", "2.0").archive == "talent-2.0.mar"


@pytest.mark.parametrize("fault", ["register", "smoke", "publish"])
def test_a_failed_retraining_leaves_nothing_that_would_be_served(tmp_path: Path, monkeypatch, fault: str):
    server, register = Registry(tmp_path), Registry.register
    refused = {"register": 0, "publish": 1}.get(fault)

    def refuse(self: Registry, archive: Path, *others) -> dict:
        if len(self.seen) == refused:
            raise LoadError("the self-test failed")
        return register(self, archive, *others)

    monkeypatch.setattr(Registry, "register", refuse)
    row = SimpleNamespace(path="gRPC", passed=fault != "smoke", max_dp=1.0)
    with pytest.raises(ServerError):
        retrain(tmp_path, server, monkeypatch, smoke_test=lambda *_: [row])
    assert (list(server.model_store.iterdir()), server.rows) == ([], [])
    assert Record.read(server.state_dir) == Record()
    status = read_status(tmp_path / "run")
    steps = {"register": "registering", "smoke": "proving what is served", "publish": "publishing"}
    assert (status.state, status.step) == ("failed", steps[fault])
    assert ("smoke test failed for gRPC" if fault == "smoke" else "self-test failed") in status.message


def test_a_failure_is_told_though_its_server_is_gone(tmp_path: Path, monkeypatch):
    server = Registry(tmp_path)

    def gone() -> list[dict]:
        raise ServerError("no connection")

    def prove(*_: object) -> None:
        server.models = gone
        raise ServerError("the smoke test failed")

    with pytest.raises(ServerError, match="the smoke test failed; unregistering it failed, too: no connection"):
        retrain(tmp_path, server, monkeypatch, smoke_test=prove)
    assert list(server.model_store.iterdir()) == []


def test_an_archive_that_someone_else_put_there_is_left_alone(tmp_path: Path, monkeypatch):
    server = Registry(tmp_path)

    def prove(*_: object) -> list:
        (server.model_store / "talent-2.0.mar").write_bytes(b"another")
        return []

    with pytest.raises(ServerError, match=r"talent-2\.0\.mar was put there meanwhile"):
        retrain(tmp_path, server, monkeypatch, smoke_test=prove)
    assert [path.read_bytes() for path in server.model_store.iterdir()] == [b"another"]
    assert server.rows == []


def kill(*_: object, **__: object) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.parametrize("step", ["build_archive", "register", "smoke_test", "unregister"])
def test_a_killed_retraining_leaves_nothing_that_a_restart_would_serve(tmp_path: Path, monkeypatch, step: str):
    server = Registry(tmp_path)

    def killed() -> None:
        stand_ins = {step: kill} if step in ("build_archive", "smoke_test") else {}
        if not stand_ins:
            setattr(server, step, kill)
        _, held = reserve_version(server, "talent", "2.0")
        folder = reserve_folder(tmp_path / "run")
        retrain(tmp_path, server, monkeypatch, **stand_ins)
        folder.release()
        held.release()

    process = multiprocessing.get_context("fork").Process(target=killed)
    process.start()
    process.join(60)
    assert process.exitcode == -signal.SIGKILL
    left = [path.name for path in server.model_store.iterdir() if path.suffix == ".mar"]
    assert left == ([] if step == "build_archive" else [".talent-2.0.unproved.mar"])
    assert archives(server.model_store) == [] and listing(server.model_store) == []
    assert next_version(server, "talent") == "1.0"

    # The next one may have the same version and folder, and removes what is left: also from the server.
    server.rows = [{"name": "talent", "version": "2.0", "archive": name, "default": False} for name in left]
    version, held = reserve_version(server, "talent", "2.0")
    reserve_folder(tmp_path / "run").release()
    held.release()
    assert (version, server.rows, list(server.model_store.iterdir())) == ("2.0", [], [])


def test_what_is_being_proved_is_listed_as_such(tmp_path: Path):
    row = {"name": "talent", "version": "2.0", "archive": ".talent-2.0.unproved.mar", "default": False, "workers": []}
    (listed,) = listing(tmp_path, [row])
    assert (listed.version, listed.problem) == ("2.0", "not proved yet")


# --- two at once ------------------------------------------------------------------------------------------------------


def reserve_and_wait(store: Path, taken: multiprocessing.Queue, done: multiprocessing.Event) -> None:
    server = SimpleNamespace(models=list, model_store=store, state_dir=store)
    taken.put(reserve_version(server, "talent")[0])
    done.wait(60)


def test_retrainings_at_once_choose_different_versions(tmp_path: Path):
    context = multiprocessing.get_context("fork")
    taken, done = context.Queue(), context.Event()
    processes = [context.Process(target=reserve_and_wait, args=(tmp_path, taken, done)) for _ in range(4)]
    for process in processes:
        process.start()
    try:
        assert sorted(taken.get(timeout=60) for _ in processes) == ["1.0", "2.0", "3.0", "4.0"]
        server = SimpleNamespace(models=list, model_store=tmp_path, state_dir=tmp_path)
        with pytest.raises(UsageError, match=r"another process is building or retraining talent 3\.0; choose another"):
            reserve_version(server, "talent", "3.0")
        with (
            pytest.raises(UsageError, match="another process is building or retraining"),
            reserved(tmp_path, "talent", "1.0"),
        ):
            pass
    finally:
        # Without a word to them: the kernel frees what they had.
        for process in processes:
            process.kill()
            process.join()
    assert reserve_version(server, "talent", "3.0")[0] == "3.0"
    assert reserve_version(server, "talent")[0] == "1.0"


def test_one_run_has_a_folder(tmp_path: Path):
    out = tmp_path / "run"
    held = reserve_folder(out)
    with pytest.raises(UsageError, match=r"a retraining is running in .*; choose another --version or --out"):
        reserve_folder(out)
    Status("2.0", os.getpid()).write(out, state="failed")
    held.release()
    reserve_folder(out).release()
    Status("2.0", os.getpid()).write(out, state="succeeded")
    with pytest.raises(UsageError, match="already holds a retraining"):
        reserve_folder(out)
    (tmp_path / "notes").write_text("precious")
    with pytest.raises(UsageError, match="holds other files, such as notes"):
        reserve_folder(tmp_path)
    with pytest.raises(UsageError, match="cannot be made"):
        reserve_folder(tmp_path / "notes")


def test_a_reservation_is_passed_on_without_a_gap(tmp_path: Path):
    path = version_file(tmp_path, "talent", "2.0")
    held = Reservation.take(path)
    assert held and Reservation.take(path) is None
    line = [sys.executable, "-c", "import sys; sys.stdin.read()"]
    with subprocess.Popen(line, stdin=subprocess.PIPE, pass_fds=[held.descriptor]) as process:
        held.hand_over()
        assert Reservation.take(path) is None
        process.kill()
    again = Reservation.take(path)
    assert again
    passed = Reservation.inherited(path, os.dup(again.descriptor))
    again.hand_over()
    assert Reservation.take(path) is None
    passed.release()
    assert list(tmp_path.iterdir()) == []
    with open(ROOT / "README.md") as other, pytest.raises(UsageError, match="is no reservation of"):
        Reservation.inherited(path, other.fileno())

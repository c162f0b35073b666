"""What dies, fills up or is interrupted hurts nobody else: a real TorchServe, its workers, its disk and its folder."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from pathlib import Path

import psutil
import pytest
import torch

from benchmarks import faults
from benchmarks.faults import Callers, Canaries, altered, fill, remount, small_disk
from skewless.errors import ServerError, UsageError
from skewless.evaluation.evaluate import evaluate
from skewless.packaging.build import build_archive
from skewless.torchserve import server as module
from skewless.torchserve.client import Client
from skewless.torchserve.server import MARKER, Server
from skewless.training.checkpoint import load_checkpoint
from skewless.training.manifest import read_manifest
from tests.conftest import ROOT, call_skewless, until
from tests.test_server import ECHO, make_archive
from tests.tiny_model import make

# --- whose folder it is -----------------------------------------------------------------------------------------------


def contents(folder: Path) -> dict[str, tuple[int, bytes | None]]:
    """Every path below a folder, and its own, with permissions and bytes."""
    paths = [folder, *sorted(folder.rglob("*"))]
    return {str(path): (path.stat().st_mode, path.read_bytes() if path.is_file() else None) for path in paths}


@pytest.fixture
def foreign(tmp_path: Path) -> Path:
    """A folder that has what a server would remove, and that is not a server's."""
    folder = tmp_path / "project"
    (folder / "tmp").mkdir(parents=True)
    folder.chmod(0o755)
    for name in ("config.properties", "tmp/notes.txt", "README.md"):
        (folder / name).write_text("precious")
    return folder


def start(state_dir: object, store: Path) -> subprocess.CompletedProcess[str]:
    store.mkdir(exist_ok=True)
    return call_skewless("serve", "start", "--state-dir", state_dir, "--model-store", store, "--ports", "free")


def test_a_folder_of_others_is_refused_and_left_as_it_is(foreign: Path, tmp_path: Path):
    before = contents(foreign)
    for command in ("start", "run"):
        store = tmp_path / "store"
        store.mkdir(exist_ok=True)
        done = call_skewless("serve", command, "--state-dir", foreign, "--model-store", store, "--ports", "free")
        assert done.returncode == 2, done.stderr
        assert f"{foreign} holds files of others, such as README.md" in done.stderr
        assert "choose a new or an empty folder as --state-dir" in done.stderr
        assert contents(foreign) == before
    for command in ("stop", "token"):
        assert call_skewless("serve", command, "--state-dir", foreign).returncode == 2
        assert contents(foreign) == before


@pytest.mark.parametrize("state_dir", [".", "/", "home"])
def test_the_checkout_the_root_and_the_home_are_no_state_directories(
    state_dir: str, foreign: Path, tmp_path, monkeypatch
):
    def touched(*_: object, **__: object) -> None:
        raise AssertionError(f"{state_dir} was about to be changed")

    monkeypatch.setenv("HOME", str(foreign))
    for name in ("chmod", "unlink", "mkdir", "write_text"):
        monkeypatch.setattr(module.Path, name, touched)
    monkeypatch.setattr(module.shutil, "rmtree", touched)
    chosen = Path.home() if state_dir == "home" else state_dir
    done = call_skewless("serve", "start", "--state-dir", chosen, "--model-store", ROOT / "archive", "--ports", "free")
    assert done.returncode == 2, done.stderr
    assert "holds files of others" in done.stderr and "Traceback" not in done.stderr


def test_a_file_is_no_state_directory(tmp_path: Path):
    (tmp_path / "notes").write_text("precious")
    done = start(tmp_path / "notes", tmp_path / "store")
    assert (done.returncode, f"{tmp_path / 'notes'} is a file" in done.stderr) == (2, True)
    assert (tmp_path / "notes").read_text() == "precious"


def test_another_programs_state_file_is_told_apart(tmp_path: Path):
    (tmp_path / "state.json").write_text('{"pid": 1}')
    for command in ("stop", "token"):
        done = call_skewless("serve", command, "--state-dir", tmp_path)
        assert (done.returncode, "is not what `skewless serve start` writes" in done.stderr) == (2, True)
        assert "Traceback" not in done.stderr
    assert start(tmp_path, tmp_path.parent / "store").returncode == 2
    assert [path.name for path in tmp_path.iterdir()] == ["state.json"]


def test_what_is_ours_is_claimed(tmp_path: Path):
    """New, empty, marked, and what a server of before the marker left behind."""
    (tmp_path / "empty").mkdir()
    (tmp_path / "marked").mkdir()
    for name in (MARKER, "notes.txt"):
        (tmp_path / "marked" / name).write_text("")
    (tmp_path / "unmarked" / "logs").mkdir(parents=True)
    (tmp_path / "unmarked" / "load-errors").mkdir()
    (tmp_path / "unmarked" / "lock").write_text("")
    for name in ("new", "empty", "marked", "unmarked"):
        module._claim(tmp_path / name)
        assert (tmp_path / name / MARKER).is_file()
        assert (tmp_path / name).stat().st_mode & 0o777 == 0o700


# --- a real server ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store with one small trained model, `tiny` 1.0, whose worker takes two requests at once."""
    folder = tmp_path_factory.mktemp("faults")
    model = make(folder)
    config = model.archive / "model-config.yaml"
    config.write_text(config.read_text().replace("batchSize: 4", "batchSize: 2"))
    rows = read_manifest(model.manifest, model.manifest.parent, model.definition.classes)
    checkpoint, cpu = load_checkpoint(model.checkpoint), torch.device("cpu")
    evaluate(model.definition, checkpoint, model.checkpoint, rows, "test", folder / "evaluation", cpu)
    build_archive(model.archive, model.checkpoint, folder / "evaluation", "1.0", folder / "store")
    return folder / "store"


@pytest.fixture(scope="module")
def archive(store: Path) -> Path:
    return store / "tiny-1.0.mar"


@pytest.fixture(scope="module")
def canaries(archive: Path) -> Canaries:
    return Canaries.of(archive)


@pytest.fixture(scope="module")
def running(store: Path, archive: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    started = Server.start(store, tmp_path_factory.mktemp("server"), ports="free")
    try:
        started.register(archive, default=True)
        yield started
    finally:
        started.stop()


@pytest.mark.chain
def test_a_killed_worker_loses_only_what_it_was_working_on(running: Server, canaries: Canaries):
    row = faults.killed_workers(running, canaries, kills=2, every_s=0.0)
    assert row.sound, row


@pytest.mark.chain
def test_a_served_version_does_not_need_its_file(running: Server, canaries: Canaries):
    row = faults.changed_archive(running, canaries)
    assert row.sound, row


@pytest.mark.chain
def test_an_altered_archive_is_refused_with_a_reason(running: Server, canaries: Canaries):
    row = faults.refused_archives(running, canaries)
    assert row.sound, row
    assert "a bit flipped: Failed to save model: changed.mar: the archive is damaged (" in row.sees, row
    assert "self-test: stage 'network' is not as built" in row.sees, row


@pytest.mark.chain
def test_a_worker_short_of_memory_leaves_its_neighbours_right(running: Server, canaries: Canaries):
    row, answer = faults.short_of_memory(running, canaries, 0, faults.long_recording(59, rate=96000))
    assert row.sound, row
    assert answer.status >= 400


@pytest.mark.chain
def test_a_killed_server_is_started_again_in_its_folder(store: Path, archive: Path, canaries: Canaries, tmp_path: Path):
    first = Server.start(store, tmp_path / "state", ports="free")
    first.register(archive)
    row, again = faults.killed_server(first, canaries)
    try:
        assert row.sound, row
        assert again.state_dir == first.state_dir and again.pid != first.pid
    finally:
        again.stop()


@pytest.mark.chain
def test_a_full_disk_stops_no_answer(archive: Path, canaries: Canaries, tmp_path: Path):
    try:
        with small_disk(tmp_path / "disk", 24) as disk:
            row = faults.full_disk(archive, canaries, disk)
    except PermissionError as error:
        pytest.skip(str(error))
    assert row.sound, row
    assert "has 0 MB free" in row.sees, row


def test_a_disk_without_room_is_told_and_nothing_is_left(tmp_path: Path):
    try:
        with small_disk(tmp_path / "disk", 1) as disk:
            fill(disk)
            done = start(disk / "state", tmp_path / "store")
            assert (done.returncode, "cannot be written: No space left on device" in done.stderr) == (2, True), done
            (disk / "filler").unlink()
            remount(disk, "ro")
            done = start(disk / "state", tmp_path / "store")
            assert (done.returncode, "cannot be written: Read-only file system" in done.stderr) == (2, True), done
    except PermissionError as error:
        pytest.skip(str(error))


@pytest.mark.chain
def test_a_disk_that_hangs_stops_no_answer(archive: Path, canaries: Canaries, tmp_path: Path):
    """Logs that nobody takes, as on a disk that does not answer any more: pipes that are opened and not read."""
    logs = tmp_path / "state" / "logs"
    module._claim(logs.parent)
    logs.mkdir()
    opened = []
    for name in ("ts_log.log", "access_log.log", "model_log.log"):
        os.mkfifo(logs / name)
        opened.append(os.open(logs / name, os.O_RDONLY | os.O_NONBLOCK))
    served = Server.start(archive.parent, logs.parent, ports="free")
    try:
        served.register(archive)
        with Callers(served, canaries) as callers:
            # A pipe takes 64 KiB, and each request logs about one.
            callers.wait_for(200)
        assert (callers.seen.wrong, callers.seen.lost) == (0, 0), callers.seen
        assert served.status()["health"] == "Healthy"
    finally:
        for descriptor in opened:
            os.close(descriptor)
        served.stop()


@pytest.mark.chain
def test_tokens_outlive_a_full_disk(running: Server, archive: Path, tmp_path: Path, monkeypatch):
    """TorchServe keeps its keys in one file only: a renewal that it cannot write would end them all."""
    try:
        with small_disk(tmp_path / "disk", 24) as disk:
            served = Server.start(archive.parent, disk / "state", ports="free")
            try:
                old = served.token("inference")
                filler = fill(disk)
                with monkeypatch.context() as patch:
                    patch.setattr(module, "RENEW_BEFORE_S", 2 * 3600.0)
                    with pytest.raises(ServerError, match="No space left on device"):
                        served.token("inference")
                assert served.token("inference") == old
                assert served.status()["health"] == "Healthy"
                filler.unlink()
                with monkeypatch.context() as patch:
                    patch.setattr(module, "RENEW_BEFORE_S", 2 * 3600.0)
                    assert served.token("inference") != old
                assert served.status()["health"] == "Healthy"
            finally:
                served.stop()
    except PermissionError as error:
        pytest.skip(str(error))


@pytest.mark.chain
def test_a_disk_that_becomes_read_only_stops_no_answer(running: Server, canaries: Canaries, monkeypatch):
    """For what is opened from now on: the kernel allows no more while a server has its logs open."""
    folder = str(running.state_dir)
    if subprocess.run(["mount", "--bind", folder, folder], capture_output=True, check=False).returncode != 0:
        pytest.skip("mounting is not allowed here")
    try:
        subprocess.run(["mount", "-o", "remount,bind,ro", folder], check=True)
        with Callers(running, canaries, 4) as callers:
            callers.wait_for(12)
        assert (callers.seen.wrong, callers.seen.lost) == (0, 0), callers.seen
        monkeypatch.setattr(module, "RENEW_BEFORE_S", 2 * 3600.0)
        with pytest.raises(ServerError, match=r"cannot be written: Read-only file system; make room"):
            running.token("inference")
    finally:
        subprocess.run(["umount", folder], check=True)


@pytest.mark.chain
@pytest.mark.parametrize("hours", [-5, 5])
def test_a_clock_that_jumps_ends_no_service(running: Server, canaries: Canaries, hours: int, monkeypatch):
    """Ours only: TorchServe's own clock stays. Past a token's end every call renews it; before its beginning none does."""

    class Jumped(datetime):
        @classmethod
        def now(cls, tz=None):
            return datetime.now(tz) + timedelta(hours=hours)

    before = running.token("inference")
    monkeypatch.setattr(module, "datetime", Jumped)
    # One: where the two clocks differ, as they do on one machine only here, each renewal ends the token of the next caller.
    with Callers(running, canaries, 1) as callers:
        callers.wait_for(3)
    assert (callers.seen.wrong, callers.seen.lost) == (0, 0), callers.seen
    assert running.models()
    monkeypatch.undo()
    assert (running.token("inference") == before) is (hours < 0)
    expires = datetime.fromisoformat(
        json.loads((running.state_dir / "key_file.json").read_text())["inference"]["expiration time"]
    )
    assert timedelta(minutes=50) < expires - datetime.now(UTC) <= timedelta(minutes=60)


# --- registrations ----------------------------------------------------------------------------------------------------

SLOW = "import time\ntime.sleep(60)\n" + ECHO


def waiting_for(flag: Path) -> str:
    """A handler that loads once the file is there."""
    return f"import os, time\nwhile not os.path.exists({str(flag)!r}): time.sleep(0.05)\n" + ECHO


def workers(server: Server) -> list[int]:
    return [each.pid for each in module._workers(server.state_dir)]


@pytest.mark.chain
def test_a_registration_holds_up_no_connection(running: Server, tmp_path: Path):
    """TorchServe's connections share a few threads: one that waits for a registration would keep every fourth waiting."""
    waiting = make_archive(running.model_store, "waiting", waiting_for(tmp_path / "flag"))
    before = len(running.models())
    with ThreadPoolExecutor(1) as pool:
        registered = pool.submit(running.register, waiting)
        try:
            until(lambda: registered.done() or len(running.models()) > before)
            for _ in range(16):
                with Client(running) as client:
                    assert client.ping_rest(timeout=20.0).status == 200
            assert not registered.done()
        finally:
            (tmp_path / "flag").touch()
        assert registered.result(60)["workers"] == ["READY"]
    running.unregister("echo", "waiting")
    waiting.unlink()


@pytest.mark.chain
def test_a_registration_that_times_out_is_taken_back(running: Server, canaries: Canaries):
    slow = make_archive(running.model_store, "slow", SLOW)
    before, own = running.models(), workers(running)
    try:
        with Callers(running, canaries, 2) as callers:
            with pytest.raises(ServerError, match=r"timed out.*; it was unregistered again"):
                running.register(slow, timeout=3.0)
            assert running.models() == before
            until(lambda: workers(running) == own)
            callers.wait_for(4)
        assert (callers.seen.wrong, callers.seen.lost) == (0, 0)
    finally:
        slow.unlink()


@pytest.mark.chain
@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGTERM])
def test_a_registration_that_is_interrupted_is_taken_back(running: Server, sent: signal.Signals):
    slow = make_archive(running.model_store, "slow", SLOW)
    before, own = running.models(), workers(running)
    command = [sys.executable, "-m", "skewless", "register", str(slow), "--state-dir", str(running.state_dir)]
    try:
        with subprocess.Popen(
            command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
        ) as process:
            until(lambda: len(running.models()) > len(before))
            process.send_signal(sent)
            assert process.wait(60) != 0
        assert running.models() == before
        until(lambda: workers(running) == own)
    finally:
        slow.unlink()


# --- starting and stopping --------------------------------------------------------------------------------------------


@pytest.mark.chain
@pytest.mark.parametrize("error", [psutil.NoSuchProcess, psutil.AccessDenied])
def test_a_process_table_that_changes_does_not_keep_a_server_from_stopping(
    store, archive, tmp_path, monkeypatch, error
):
    started = Server.start(store, tmp_path / "state", ports="free")
    started.register(archive)
    pids = [started.pid, *workers(started)]
    assert len(pids) == 2

    def refused(self, recursive=False):
        raise error(self.pid)

    monkeypatch.setattr(psutil.Process, "children", refused)
    started.stop()
    assert not [pid for pid in pids if faults.alive(pid)]
    assert {path.name for path in started.state_dir.iterdir()} == {MARKER, "load-errors", "lock", "logs"}


@pytest.mark.chain
def test_of_two_starts_at_once_in_one_folder_one_is_told(store: Path, archive: Path, tmp_path: Path):
    def begin(_: int) -> Server | UsageError:
        try:
            return Server.start(store, tmp_path / "state", ports="free")
        except UsageError as error:
            return error

    with ThreadPoolExecutor(2) as pool:
        begun = list(pool.map(begin, range(2)))
    (server,) = [each for each in begun if isinstance(each, Server)]
    try:
        (told,) = [each for each in begun if isinstance(each, UsageError)]
        assert f"a server is already running in {tmp_path / 'state'} (process {server.pid})" in str(told)
        assert server.register(archive)["workers"] == ["READY"]
    finally:
        server.stop()


@pytest.mark.chain
def test_a_broken_archive_keeps_no_other_from_being_served(archive: Path, tmp_path: Path):
    (tmp_path / "store").mkdir()
    good = Path(shutil.copy(archive, tmp_path / "store"))
    # Above the good one, so it would be the default.
    altered(good, tmp_path / "store" / "tiny-2.0.mar", "2.0", faults.scaled(good))
    (tmp_path / "store" / "cut-1.0.mar").write_bytes(good.read_bytes()[:1000])
    # What a killed retraining leaves: it would load, and be the highest version.
    altered(good, tmp_path / "store" / ".tiny-3.0.unproved.mar", "3.0", lambda _, content: content)
    where = ("--state-dir", tmp_path / "state", "--model-store", tmp_path / "store", "--ports", "free", "--json")
    command = [sys.executable, "-m", "skewless", "serve", "run", *map(str, where)]
    with (tmp_path / "out").open("w") as out, (tmp_path / "err").open("w") as err:
        process = subprocess.Popen(command, cwd=ROOT, stdout=out, stderr=err)
    try:
        until(lambda: process.poll() is not None or (tmp_path / "out").read_text().endswith("}\n"))
        shown = json.loads((tmp_path / "out").read_text())
        assert [(m["name"], m["version"], m["default"]) for m in shown["models"]] == [("tiny", "1.0", True)]
        assert set(shown["left_out"]) == {"cut-1.0.mar", "tiny-2.0.mar"}
        assert "is not a model archive" in shown["left_out"]["cut-1.0.mar"]
        assert "self-test: stage 'network' is not as built" in shown["left_out"]["tiny-2.0.mar"]
        with Client(Server.attach(tmp_path / "state")) as client:
            assert client.predict_rest("tiny", Canaries.of(good).references.payloads[0]).status == 200
    finally:
        process.terminate()
        assert process.wait(60) == 1
    assert "tiny-2.0.mar is left out: " in (tmp_path / "err").read_text()

    good.unlink()
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=120)
    assert (done.returncode, "no archive of" in done.stderr) == (1, True), done.stderr


# --- building ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def parts(store: Path) -> tuple[Path, Path, Path]:
    """What the archive was built from: definition, checkpoint, evaluation."""
    return store.parent / "tiny", store.parent / "run" / "best.pth", store.parent / "evaluation"


@pytest.mark.chain
def test_of_two_builds_at_once_one_is_told(parts: tuple[Path, Path, Path], archive: Path, tmp_path: Path):
    from skewless.packaging.reservation import reserved

    with (
        reserved(tmp_path, "tiny", "1.0"),
        pytest.raises(UsageError, match=r"another process is building .* tiny 1\.0"),
    ):
        build_archive(*parts, "1.0", tmp_path)
    assert list(tmp_path.iterdir()) == []
    assert build_archive(*parts, "1.0", tmp_path).path.read_bytes() == archive.read_bytes()
    assert [path.name for path in tmp_path.iterdir()] == ["tiny-1.0.mar"]


@pytest.mark.chain
def test_a_build_without_room_leaves_nothing(parts: tuple[Path, Path, Path], archive: Path, tmp_path: Path):
    definition, checkpoint, evaluation = parts
    where = ("--checkpoint", checkpoint, "--evaluation", evaluation, "--version", "1.0", "--out", tmp_path / "disk")
    try:
        with small_disk(tmp_path / "disk", 1) as disk:
            fill(disk)
            with open(disk / "filler", "r+b") as filler:
                filler.truncate((disk / "filler").stat().st_size - archive.stat().st_size // 2)
            done = call_skewless("build", definition, *where)
            assert (done.returncode, "No space left on device" in done.stderr) == (2, True), done
            assert [path.name for path in disk.iterdir()] == ["filler"]
            remount(disk, "ro")
            done = call_skewless("build", definition, *where)
            assert (done.returncode, "Read-only file system" in done.stderr) == (2, True), done
    except PermissionError as error:
        pytest.skip(str(error))

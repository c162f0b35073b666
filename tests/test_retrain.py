"""Retraining: what is merged, what a poller reads. The whole way is in test_archives.py, with a real server."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

import skewless.torchserve.retrain as module
from skewless.errors import LoadError, ServerError, UsageError
from skewless.packaging.build import Built
from skewless.torchserve.retrain import STATUS, Status, check_version, merged, next_version, read_status
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


def test_a_version_is_refused_before_the_training(tmp_path: Path):
    (tmp_path / "talent-3.0.mar").write_bytes(b"")
    server = SimpleNamespace(models=lambda: [{"name": "talent", "version": "2.0"}], model_store=tmp_path)
    check_version(server, "talent", "4.0-b")
    for version, message in (
        ("2.0", "exists already"),
        ("3.0", "exists already"),
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
    server = SimpleNamespace(models=lambda: models, model_store=tmp_path)
    assert next_version(server, "talent") == "4.0"
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


@pytest.mark.parametrize("fault", ["register", "smoke"])
def test_a_failed_retraining_leaves_nothing_that_would_be_served(tmp_path: Path, monkeypatch, fault: str):
    """Training, evaluation and building stand aside here: what matters is what becomes of their archive."""
    store, registered = tmp_path / "store", []
    store.mkdir()

    def build(*_, **__):
        (store / "talent-2.0.mar").write_bytes(b"archive")
        return Built(store / "talent-2.0.mar", ())

    def register(archive, default):
        registered.append({"name": "talent", "version": "2.0", "default": default})
        if fault == "register":
            registered.clear()
            raise LoadError("the self-test failed")
        return registered[-1]

    row = SimpleNamespace(path="gRPC", passed=False, max_dp=1.0)
    for name, stand_in in {
        "fit": lambda *_, **__: {},
        "evaluate": lambda *_: {},
        "build_archive": build,
        "smoke_test": lambda *_: [row],
    }.items():
        monkeypatch.setattr(module, name, stand_in)
    server = SimpleNamespace(
        model_store=store,
        register=register,
        models=lambda: registered,
        unregister=lambda name, version: registered.remove({"name": name, "version": version, "default": False}),
    )
    archive = ROOT / "archive" / "talent"
    with pytest.raises(ServerError):
        module.retrain(archive, [], Config(), "2.0", tmp_path / "run", server, tmp_path / "cache")
    assert (list(store.iterdir()), registered) == ([], [])
    status = read_status(tmp_path / "run")
    assert (status.state, status.step) == (
        "failed",
        {"register": "registering", "smoke": "proving what is served"}[fault],
    )
    assert {"register": "self-test failed", "smoke": "smoke test failed for gRPC"}[fault] in status.message

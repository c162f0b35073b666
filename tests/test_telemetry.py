"""What a worker records of its answers: counts, the journal, kept uploads; and that recording never fails an answer."""

from __future__ import annotations

import csv
import hashlib
import json
import os
import re
import subprocess
import sys
import threading
from io import FileIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import requests
import torch

from handler.entry import SkewlessHandler
from handler.record import Record
from skewless.core import telemetry
from skewless.core.request import BatchRequest, Request, RequestError
from skewless.core.telemetry import EDGES, JOURNAL, KEEP_UPLOADS, Answered, Bins, Journal, Telemetry
from skewless.evaluation.evaluate import evaluate
from skewless.evaluation.scores import score_histogram
from skewless.packaging.build import build_archive
from skewless.torchserve.client import Client
from skewless.torchserve.server import Server
from skewless.training.checkpoint import load_checkpoint
from skewless.training.manifest import read_manifest
from tests.conftest import until
from tests.test_guards import FILES, Context, Network, service_of, tone
from tests.tiny_model import TinyModel, recording, tiny_model  # noqa: F401

SERVICE = service_of(Network())  # its probability is the file's peak; the threshold is 0.6
MANIFEST = {"modelName": "cough", "modelVersion": "1.5"}


def lines_of(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for path in folder.glob("*.jsonl") for line in path.read_text().splitlines()]


def line(number: int = 0, **more: Any) -> Answered:
    known = {"time": 1.0, "model": "cough", "version": "1.5", "id": str(number), "sha256": None, "status": 200}
    known |= {"score": 0.5, "choice": "loud", "threshold": 0.6, "truncated": None, "seconds": 0.1}
    return Answered(**(known | more))


# --- what is recorded


def test_every_file_is_counted_and_has_a_line_of_its_own(tmp_path: Path):
    journal = Journal(tmp_path, "cough", "1.5")
    recorder = Telemetry(SERVICE, "cough", "1.5", journal)
    asked = [
        Request(FILES[0]),
        Request(FILES[3], threshold=0.8),
        BatchRequest({"a": FILES[3], "b": b"no sound", "c": RequestError(413, "too large")}),
        RequestError(400, "the request carries no file"),
    ]
    headers = [{"x-request-ID": "first"}, {"other": "x"}, {"X-Request-Id": "third"}, {}]
    counts = recorder.record(asked, SERVICE.predict(asked), headers, 0.25)
    journal.flush()
    assert {key: count for key, count in counts.items() if count} == {
        ("files", "200", "answered"): 3,
        ("files", "413", "too_large"): 1,
        ("files", "415", "unsupported"): 1,
        ("files", "400", "request"): 1,
        ("scores", "0.25"): 1,
        ("scores", "0.75"): 2,
        ("decisions", "quiet"): 2,
        ("decisions", "loud"): 1,
    }
    found = lines_of(tmp_path)
    assert [each["id"] for each in found] == ["first", None, "third", "third", "third", None]
    assert [each["status"] for each in found] == [200, 200, 200, 415, 413, 400]
    assert [each["score"] for each in found] == [0.25, 0.75, 0.75, None, None, None]
    assert [each["choice"] for each in found] == ["quiet", "quiet", "loud", None, None, None]
    assert [each["threshold"] for each in found] == [0.6, 0.8, 0.6, 0.6, 0.6, 0.6]
    digests = [hashlib.sha256(data).hexdigest() for data in (FILES[0], FILES[3], FILES[3], b"no sound")]
    assert [each["sha256"] for each in found] == [*digests, None, None]
    assert {(each["model"], each["version"], each["seconds"]) for each in found} == {("cough", "1.5", 0.25)}


def test_a_fault_of_ours_is_told_from_a_refusal():
    service = service_of(Network(), how="raises")
    counts = Telemetry(service, "cough", "1.5").record(
        [Request(FILES[2])], service.predict([Request(FILES[2])]), [{}], 0
    )
    assert counts["files", "500", "fault"] == 1


def test_live_scores_fall_into_the_bins_of_the_evaluation(tmp_path: Path):
    """Edges, too: a score is in the same bin wherever it is counted."""
    scores = [*EDGES, *np.random.default_rng(1).random(200).tolist(), 0.05 + 1e-12]
    with open(tmp_path / "predictions.csv", "w", newline="") as file:
        rows = [("file_path", "label", "split", "probability", "sha256")]
        rows += [("a.wav", "0", "test", repr(score), "") for score in scores] + [("b.wav", "0", "val", "0.5", "")]
        csv.writer(file).writerows(rows)
    histogram = score_histogram(tmp_path / "predictions.csv", "test", ["quiet", "loud"])
    bins = Bins(histogram["edges"])
    live = [bins(score) for score in scores]
    assert [live.count(name) for name in bins.names] == histogram["counts"]
    assert sum(histogram["counts"]) == len(scores)
    assert bins.names[0] == "0.05" and bins.names[-1] == "1" and bins(0.0) == "0.05" and bins(1.0) == "1"


def test_of_several_classes_the_score_is_the_chosen_ones(tmp_path: Path):
    with open(tmp_path / "predictions.csv", "w", newline="") as file:
        rows = [("file_path", "label", "split", "probability_a", "probability_b", "probability_c", "sha256")]
        csv.writer(file).writerows([*rows, ("a.png", "0", "test", "0.1", "0.72", "0.18", "")])
    histogram = score_histogram(tmp_path / "predictions.csv", "test", ["a", "b", "c"])
    assert histogram["counts"].index(1) == 14 and sum(histogram["counts"]) == 1


# --- on the way out of the handler


class Cache:
    """TorchServe's metrics cache, as far as the handler uses it."""

    def __init__(self, fails: bool = False):
        self.fails, self.seen = fails, []

    def add_metric_to_cache(self, name: str, unit: str, labels: list[str], kind: Any) -> Any:
        cache = self

        class Metric:
            def add_or_update(self, value: float, values: list[str]) -> None:
                if cache.fails:
                    raise OSError("no room")
                cache.seen.append((name, dict(zip(labels, values, strict=True)), value))

        return Metric()


def handler_with(cache: Cache) -> SkewlessHandler:
    handler = SkewlessHandler()
    handler.service = SERVICE
    handler.record = Record(SERVICE, MANIFEST, cache)
    return handler


def test_the_handler_exports_what_it_counted(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv(JOURNAL, raising=False)
    cache = Cache()
    handler = handler_with(cache)
    own = {"model_name": "cough", "model_version": "1.5"}
    assert ("skewless_decisions_total", {**own, "choice": "loud"}, 0) in cache.seen
    cache.seen.clear()
    context = Context([{}, {"describe": "True"}, {}])
    handler.handle([{"body": FILES[0]}, {}, {"body": FILES[3]}], context)
    (seconds,) = {value for name, _, value in cache.seen if name == "skewless_request_seconds"}
    assert seconds > 0
    assert sorted((each for each in cache.seen if each[2] != seconds), key=str) == [
        ("skewless_decisions_total", {**own, "choice": "loud"}, 1),
        ("skewless_decisions_total", {**own, "choice": "quiet"}, 1),
        ("skewless_files_total", {**own, "status": "200", "kind": "answered"}, 2),
        ("skewless_scores_total", {**own, "bin": "0.25"}, 1),
        ("skewless_scores_total", {**own, "bin": "0.75"}, 1),
    ]
    assert [name for name, _, _ in cache.seen].count("skewless_request_seconds") == 2


def test_what_cannot_be_recorded_fails_no_answer(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv(JOURNAL, raising=False)
    cache = Cache()
    handler = handler_with(cache)
    cache.fails = True
    context = Context([{}])
    (body,) = handler.handle([{"body": FILES[0]}], context)
    assert context.statuses == {0: 200} and json.loads(body)["probability"] == 0.25
    assert "could not be recorded" in caplog.text


def test_labels_hold_nothing_that_torchserve_takes_for_their_end():
    from handler.record import _label

    assert _label("a,b:c|d#e\nf g") == "a_b_c_d_e_f g"


def test_the_environment_says_whether_and_where(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv(JOURNAL, raising=False)
    assert Journal.of_environment("cough", "1.5") is None
    monkeypatch.setenv(JOURNAL, str(tmp_path))
    journal = Journal.of_environment("cough", "1.5")
    assert journal is not None
    journal.write(line(), b"upload")
    journal.flush()
    assert [path.name for path in tmp_path.iterdir()] == [f"cough-1.5-{os.getpid()}.jsonl"], "kept without being asked"
    monkeypatch.setenv(KEEP_UPLOADS, "many")
    with pytest.raises(
        ValueError, match=r"SKEWLESS_KEEP_UPLOADS is 'many', expected how many uploads to keep, such as 100"
    ):
        Journal.of_environment("cough", "1.5")


# --- the journal's files


def test_the_journal_has_a_bound(tmp_path: Path):
    size = len(json.dumps(vars(line(0)))) + 1
    journal = Journal(tmp_path, "cough", "1.5", max_bytes=4 * size)
    for number in range(17):
        journal.write(line(number % 10))
        journal.flush()
    name = f"cough-1.5-{os.getpid()}.jsonl"
    assert sorted(path.name for path in tmp_path.iterdir()) == [name, f"{name}.1", f"{name}.2"]
    assert all(path.stat().st_size <= 4 * size for path in tmp_path.iterdir())
    newest = [json.loads(text)["id"] for text in (tmp_path / name).read_text().splitlines()]
    before = [json.loads(text)["id"] for text in (tmp_path / f"{name}.1").read_text().splitlines()]
    assert before + newest == ["2", "3", "4", "5", "6"]
    assert journal.lost == 0


def test_of_ended_processes_the_newest_files_are_kept(tmp_path: Path):
    child = subprocess.Popen([sys.executable, "-c", ""])
    child.wait()
    sizes = {f"cough-1.5-{child.pid}.jsonl{end}": age for age, end in enumerate(("", ".1", ".2"))}
    others = {f"cough-1.5-{os.getppid()}.jsonl": 9, "cough-1.5.1-1.jsonl": 9, f"cough-2-{child.pid}.jsonl": 9}
    for name, age in (sizes | others).items():
        (tmp_path / name).write_bytes(bytes(900))
        os.utime(tmp_path / name, (1e9 - age, 1e9 - age))
    journal = Journal(tmp_path, "cough", "1.5", max_bytes=1000)
    journal.write(line())
    journal.flush()
    left = {path.name for path in tmp_path.iterdir()}
    assert left == {*others, f"cough-1.5-{os.getpid()}.jsonl", *list(sizes)[:2]}


def test_a_journal_that_cannot_be_written_loses_lines_and_goes_on(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    folder = tmp_path / "journal"
    folder.write_text("in the way")
    journal = Journal(folder, "cough", "1.5")
    for number in range(3):
        journal.write(line(number))
    journal.flush()
    assert journal.lost == 3
    assert caplog.text.count("the journal cannot be written") == 1
    folder.unlink()
    journal.write(line(3))
    journal.flush()
    assert [each["id"] for each in lines_of(folder)] == ["3"] and journal.lost == 3


def test_a_line_that_a_full_disk_cut_spoils_no_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    journal = Journal(tmp_path, "cough", "1.5")
    journal.write(line(0))
    journal.flush()

    class Full(FileIO):
        """The disk has room for a few bytes of the second line."""

        def write(self, data: bytes) -> int:
            monkeypatch.setattr(telemetry, "open", open)
            return super().write(data[:18])

    monkeypatch.setattr(telemetry, "open", lambda path, mode, buffering: Full(path, mode), raising=False)
    for number in (1, 2):
        journal.write(line(number))
        journal.flush()
    (path,) = tmp_path.iterdir()
    texts = path.read_text().splitlines()
    assert [json.loads(texts[n])["id"] for n in (0, 2)] == ["0", "2"] and texts[1] == '{"time": 1.0, "mod'
    assert journal.lost == 1


def test_a_slow_disk_delays_nobody(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    disk = threading.Event()
    monkeypatch.setattr(Journal, "_write", lambda self, data: disk.wait())
    monkeypatch.setattr(telemetry, "_MAX_WAITING", 10)
    journal = Journal(tmp_path, "cough", "1.5")
    for number in range(20):
        journal.write(line(number))
    # One may have been taken from the queue already.
    assert journal.lost in (9, 10)
    disk.set()
    journal.flush()


def test_the_last_uploads_are_kept_where_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(telemetry, "_MAX_UPLOAD_BYTES", 10)
    journal = Journal(tmp_path, "cough", "1.5", keep=2)
    uploads = [b"first", b"second", b"third", b"first", b"longer than ten", b"fourth"]
    for age, upload in enumerate(uploads):
        journal.write(line(sha256=hashlib.sha256(upload).hexdigest()), upload)
        journal.flush()
        for path in (tmp_path / "kept").iterdir():
            if path.read_bytes() == upload:
                os.utime(path, (1e9 + age, 1e9 + age))
    kept = {path.name: path.read_bytes() for path in (tmp_path / "kept").iterdir()}
    assert set(kept.values()) == {b"first", b"fourth"}
    assert all(hashlib.sha256(data).hexdigest() == name for name, data in kept.items())


# --- on a real server


@pytest.mark.chain
def test_a_server_exports_and_journals_by_version(tiny_model: TinyModel, tmp_path: Path):  # noqa: F811
    definition = tiny_model.definition
    recordings = read_manifest(tiny_model.manifest, tiny_model.manifest.parent, definition.classes)
    checkpoint, device = load_checkpoint(tiny_model.checkpoint), torch.device("cpu")
    evaluate(definition, checkpoint, tiny_model.checkpoint, recordings, "test", tmp_path / "test", device, references=3)
    store = tmp_path / "store"
    archives = [
        build_archive(tiny_model.archive, tiny_model.checkpoint, tmp_path / "test", version, store).path
        for version in ("1.0", "2.0")
    ]
    server = Server.start(store, tmp_path / "state", ports="free")
    try:
        for archive in archives:
            server.register(archive)
        client = Client(server)
        upload = recording(1, 3)
        answers = [client.predict_rest("tiny", upload, version) for version in ("1.0", "2.0", "2.0")]
        refused = client.predict_rest("tiny", tone(0.5)[:40], "2.0")
        assert [answer.status for answer in answers] == [200, 200, 200] and refused.status == 400
        page = requests.get(f"{server.metrics_url}/metrics", timeout=10).text
        found = {}
        for name, labels, value in re.findall(r"^(skewless_\w+){(.*?)} (\S+)$", page, re.MULTILINE):
            known = dict(re.findall(r'(\w+)="([^"]*)"', labels))
            found[name, known.pop("model_version"), *sorted(set(known.values()) - {known["Hostname"], "tiny"})] = float(
                value
            )
        assert found["skewless_files_total", "1.0", "200", "answered"] == 1
        assert found["skewless_files_total", "2.0", "200", "answered"] == 2
        assert found["skewless_files_total", "2.0", "400", "malformed"] == 1
        assert found["skewless_request_seconds_count", "2.0"] == 3
        for version in ("1.0", "2.0"):
            shares = [
                value for (name, of, *_), value in found.items() if (name, of) == ("skewless_reference_scores", version)
            ]
            assert len(shares) == 20 and sum(shares) == pytest.approx(1.0)
        decisions = {key[2]: value for key, value in found.items() if key[:2] == ("skewless_decisions_total", "2.0")}
        assert sorted(decisions.values()) == [0, 2] and set(decisions) == {"tone", "noise"}
        # Workers write it beside their answers, and not before them.
        until(lambda: len(lines_of(server.state_dir / "journal")) >= 4, "4 lines of the journal")
        journal = lines_of(server.state_dir / "journal")
        assert sorted((each["version"], each["status"]) for each in journal) == [
            ("1.0", 200),
            ("2.0", 200),
            ("2.0", 200),
            ("2.0", 400),
        ]
        assert {each["sha256"] for each in journal if each["status"] == 200} == {hashlib.sha256(upload).hexdigest()}
    finally:
        server.stop()
    # The journal outlives the server.
    assert len(lines_of(tmp_path / "state" / "journal")) == 4

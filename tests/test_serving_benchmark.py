"""The serving benchmark: its uploads, its statistics, its checks, and the whole of it on a small archive."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
import zipfile
from dataclasses import replace
from itertools import count
from types import SimpleNamespace
from typing import cast

import numpy as np
import psutil
import pytest

from benchmarks import serving
from benchmarks.figures import as_markdown, measures, percentiles, picture, ratios, summarize
from benchmarks.load import Cell, Lane, Load, WrongAnswer, run_cell
from benchmarks.peers import adapters
from benchmarks.processes import cpu_seconds, family, pause, peak_bytes, resume, stop_family
from benchmarks.uploads import KINDS, LONGEST_WHOLE, SHORT, Upload, make_uploads
from skewless.core.pipeline import Pipeline
from skewless.core.postprocess import build_postprocessor
from skewless.core.service import ModelService
from skewless.torchserve.client import Answer
from tests.conftest import ROOT, Demonstration
from tests.recordings import one_thread  # noqa: F401


@pytest.fixture(scope="module")
def uploads() -> list[Upload]:
    return make_uploads()


def test_each_upload_is_as_long_as_its_kind_says(uploads):
    pipeline = Pipeline.from_yaml(ROOT / "archive" / "cough" / "pipeline.yaml")
    decode, _ = pipeline.split(list(pipeline.stages)[1])
    assert [upload.kind for upload in uploads] == list(KINDS)
    for upload in uploads:
        how = KINDS[upload.kind]
        decoded = decode.run(upload.payload, whole=True)
        assert decoded.data.shape == (2, round(upload.seconds * how.rate)), upload.kind
        assert upload.kind.startswith(f"{upload.seconds:g} s ")
        assert 0.05 < decoded.data.abs().max() <= 1.0
        # Sounds all along, in both halves.
        assert min(half.std() for half in decoded.data.tensor_split(2, dim=1)) > 1e-4


def test_uploads_are_what_their_names_say(uploads):
    starts = {upload.kind: upload.payload[:12] for upload in uploads}
    assert starts["5 s WAV"][:4] == starts["17.5 s WAV"][:4] == b"RIFF"
    assert starts["5 s Ogg"][:4] == b"OggS"
    assert starts["9.8 s WebM"][:4] == b"\x1a\x45\xdf\xa3"
    assert starts["60 s MP3"][:3] == b"ID3"


def test_uploads_are_the_same_every_time(uploads):
    assert make_uploads() == uploads


def test_percentiles_by_hand():
    assert percentiles([float(n) for n in range(101)]) == {"p50_s": 50.0, "p95_s": 95.0, "p99_s": 99.0}
    assert percentiles([1.0, 3.0])["p50_s"] == 2.0


def cell(server: str, number: int = 0, **changed) -> Cell:
    """Ten requests of 0.1 to 1.0 s in 5 s, with 20 segments and 4 s of the processors."""
    latencies = {SHORT: [0.1, 0.2, 0.3, 0.4, 0.5], LONGEST_WHOLE: [0.6, 0.7, 0.8, 0.9, 1.0]}
    made = Cell(number, server, "REST", "mix", 4, 10, 20, 5.0, 4.0, 10**9, 1e-6, latencies)
    return replace(made, **changed)


def test_measures_by_hand():
    found = measures(cell("a"))
    assert found["requests_per_s"] == 2.0
    assert found["segments_per_s"] == 4.0
    assert found["cpu_s_per_request"] == 0.4
    assert found["peak_mb"] == 1000.0
    assert found["p50_s"] == pytest.approx(0.55)
    assert found["short_p99_s"] == pytest.approx(np.percentile([0.1, 0.2, 0.3, 0.4, 0.5], 99))


def test_ratios_are_formed_within_a_round():
    """The machine is four times slower in the second round; of the rounds' medians the ratio would be another one."""
    cells = [
        *(cell("a", 0, elapsed_s=1.0), cell("b", 0, elapsed_s=0.5)),
        *(cell("a", 1, elapsed_s=4.0), cell("b", 1, elapsed_s=2.0)),
        *(cell("a", 2, elapsed_s=1.0), cell("b", 2, elapsed_s=1.0)),
    ]
    found = ratios(cells, "a")
    assert found["b", "REST", "mix", 4]["requests_per_s"] == 2.0
    assert set(found["a", "REST", "mix", 4].values()) == {1.0}
    rows = {row["server"]: row for row in summarize(cells, "a")}
    assert rows["a"]["requests_per_s"] == 10.0
    assert rows["b"]["requests_per_s"] == 10.0
    assert rows["b"]["ratios"]["requests_per_s"] == 2.0


def test_the_reference_is_asked_over_rest():
    cells = [cell("a"), cell("a", protocol="gRPC", elapsed_s=2.5), cell("b", elapsed_s=1.0)]
    found = ratios(cells, "a")
    assert found["b", "REST", "mix", 4]["requests_per_s"] == 5.0
    assert found["a", "gRPC", "mix", 4]["requests_per_s"] == 2.0


def test_a_failed_cell_gives_no_figures(tmp_path):
    cells = [cell("a"), cell("b"), cell("a", 1), cell("b", 1, requests=0, latencies_s={}, failure="503: too much")]
    good, failed = summarize(cells, "a")
    assert good["failure"] is None and good["rounds"] == 2
    assert failed["failure"] == "503: too much" and "requests_per_s" not in failed
    table = as_markdown([good, failed], "a")
    assert "| a, REST | 2.00 (1.00) | 4.0 |" in table
    assert "| b, REST | failed: 503: too much |" in table
    picture([good, failed], tmp_path / "x.png")
    assert (tmp_path / "x.png").stat().st_size > 5000


SENT = [Upload("one", 1.0, b"1"), Upload("two", 1.0, b"2"), Upload("three", 1.0, b"3")]
RIGHT = {"one": (0.25,), "two": (0.5,), "three": (0.75,)}
SEGMENTS = {"one": 1, "two": 10, "three": 100}


def lane(send) -> Lane:
    return Lane("fake", "REST", send, RIGHT, RIGHT, 1e-4, time.process_time, lambda: 7)


def test_a_cell_is_whole_turns_of_the_uploads():
    asked = []

    def send(upload: Upload):
        asked.append(upload.kind)
        time.sleep(0.01)
        return [RIGHT[upload.kind][0] + 5e-5]

    done = run_cell(lane(send), Load("mix", SENT, 4), 0.05, SEGMENTS, 3)
    assert done.failure is None
    assert done.requests == len(asked) and done.requests % 3 == 0
    assert {kind: len(taken) for kind, taken in done.latencies_s.items()} == dict.fromkeys(RIGHT, done.requests // 3)
    assert done.segments == done.requests // 3 * 111
    assert done.max_deviation == pytest.approx(5e-5)
    assert (done.round, done.concurrency, done.peak_bytes) == (3, 4, 7)
    assert done.elapsed_s >= 0.05
    assert all(taken >= 0.01 for kind in done.latencies_s.values() for taken in kind)


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        ([0.5002], r"two: answered \[0.5002\], expected \[0.5\] within 0.0001"),
        ([float("nan")], "answered \\[nan\\]"),
        ([0.5, 0.5], "answered 2 scores, expected 1"),
        (WrongAnswer("503: busy"), "503: busy"),
        (ConnectionError("gone"), "ConnectionError: gone"),
    ],
)
def test_a_wrong_answer_makes_the_cell_fail(answer, said):
    """The fifth answer is wrong, and no more is asked for long after it."""
    numbers = count(1)

    def send(upload: Upload):
        if next(numbers) == 5:
            if isinstance(answer, Exception):
                raise answer
            return answer
        return RIGHT[upload.kind]

    done = run_cell(lane(send), Load("mix", SENT, 1), 30.0, SEGMENTS, 0)
    assert done.failure is not None
    assert re.search(said, done.failure)
    assert next(numbers) == 6


def archive_of_two_networks() -> serving.Archive:
    """What `Archive.read` needs of a decision-exact archive: its tiers, its decision, and a score of 0.6 that is expected."""
    exact, fast = SimpleNamespace(tier="exact", tolerance=1e-4), SimpleNamespace(tier="reduced", tolerance=0.02)
    postprocessor = build_postprocessor(
        {"bag_threshold": {"threshold": 0.5, "positive_field": "found", "classes": ["no", "yes"]}}, ROOT
    )
    service = SimpleNamespace(runtime=exact, cascade=SimpleNamespace(fast=fast), postprocessor=postprocessor)
    return serving.Archive("a", ROOT, ROOT, cast(ModelService, service), {}, {SHORT: [0.6]})


def answer_of(score: float, tier: str, threshold: float = 0.5, status: int = 200) -> Answer:
    body = {"file_probability": score, "found": score > threshold, "threshold_used": threshold, "tier": tier}
    return Answer(status, {**body, "message": "no"}, 0.1)


def test_each_answer_is_held_to_its_own_tier():
    archive = archive_of_two_networks()
    assert archive.read(SHORT, answer_of(0.60005, "exact")) == pytest.approx((0.60005,))
    assert archive.read(SHORT, answer_of(0.615, "reduced")) == pytest.approx((0.615,))
    for answer, said in (
        (answer_of(0.6002, "exact"), "in tier 'exact', expected .* within 0.0001"),
        (answer_of(0.63, "reduced"), "in tier 'reduced', expected .* within 0.02"),
        (answer_of(0.6, "guessed"), "answered in tier 'guessed', expected one of exact, reduced"),
        (answer_of(0.615, "reduced", threshold=0.61), "decided otherwise"),
        (answer_of(0.6, "exact", status=503), "503: no"),
    ):
        with pytest.raises(WrongAnswer, match=said):
            archive.read(SHORT, answer)


def test_what_processes_cost_and_that_they_end():
    """A process that starts one which computes and ends, and one which stays."""
    burn = "import time; t = time.process_time()\nwhile time.process_time() - t < 0.3: pass"
    script = (
        "import subprocess, sys, time\n"
        f"subprocess.run([sys.executable, '-c', {burn!r}])\n"
        "stays = subprocess.Popen([sys.executable, '-c', 'x = bytearray(50_000_000); import time; time.sleep(600)'])\n"
        "print(stays.pid, flush=True); time.sleep(600)"
    )
    started = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True)
    try:
        assert started.stdout is not None
        child = psutil.Process(int(started.stdout.readline()))
        assert cpu_seconds(started.pid) >= 0.3
        deadline = time.monotonic() + 30
        while peak_bytes(started.pid) < 50e6 and time.monotonic() < deadline:
            time.sleep(0.05)
        assert 50e6 < peak_bytes(started.pid) < 1e9
        pause(started.pid)
        assert {process.status() for process in family(started.pid)} == {psutil.STATUS_STOPPED}
        resume(started.pid)
        assert psutil.STATUS_STOPPED not in {process.status() for process in family(started.pid)}
        pause(started.pid)
    finally:
        stop_family(started.pid)
    assert started.wait(timeout=30) != 0
    assert not child.is_running() or child.status() == psutil.STATUS_ZOMBIE
    assert cpu_seconds(started.pid) == 0.0


def test_every_peer_is_pinned_and_has_its_file():
    for name, peer in adapters.PEERS.items():
        assert (ROOT / "benchmarks" / "peers" / f"{name}.py").is_file()
        assert all("==" in line for line in adapters.versions(name)), name
        assert peer.settings


def test_a_peer_that_ends_at_once_says_why(tmp_path, monkeypatch):
    broken = replace(
        adapters.PEERS["litserve"], command=lambda start: [sys.executable, "-c", "raise SystemExit('no such model')"]
    )
    monkeypatch.setattr(adapters, "install", lambda name: tmp_path / "bin" / "python")
    with pytest.raises(adapters.PeerError, match="ended with status 1: no such model"):
        adapters.start(broken, tmp_path, tmp_path, timeout=30)


def test_a_peer_that_cannot_be_installed_says_why(tmp_path, monkeypatch):
    monkeypatch.setattr(adapters, "ENVIRONMENTS", tmp_path / "environments")
    monkeypatch.setattr(adapters, "HERE", tmp_path)
    (tmp_path / "mine.txt").write_text("./no-such-package\n", encoding="utf-8")
    with pytest.raises(adapters.PeerError, match=r"pip install failed: .*no-such-package"):
        adapters.install("mine")
    assert not (tmp_path / "environments" / "mine" / "environment" / "made-from.txt").exists()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--archive", "no.mar"], "no archive: no.mar; build one with `skewless build`"),
        (["--archive", "A", "--peers", "litserve,flask"], "--peers names 'flask', expected some of documents,"),
        (["--archive", "A", "--rounds", "0"], "--rounds is 0, expected at least 1"),
        (["--archive", "A", "--seconds", "nan"], "--seconds is nan, expected a number of seconds, 0 or more"),
        (["--archive", "A", "--concurrency", "1,x"], "--concurrency is '1,x', expected numbers separated by commas"),
        (["--archive", "A", "--concurrency", "0"], "--concurrency has 0, expected at least 1"),
        (["--archive", "A", "--eager-archive", "no.mar"], "no archive: no.mar"),
    ],
)
def test_wrong_arguments(arguments, said, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(serving.zipfile, "is_zipfile", lambda path: str(path) == "A")
    with pytest.raises(SystemExit) as stopped:
        serving.main([*arguments, "--out", str(tmp_path / "out")])
    assert stopped.value.code == 2
    assert said in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_the_whole_benchmark(demonstration: Demonstration, uploads, tmp_path, monkeypatch, capsys):
    """One round of one turn of two uploads through a TorchServe that it starts and stops."""
    sent = [upload for upload in uploads if upload.kind in (SHORT, LONGEST_WHOLE)]
    monkeypatch.setattr(serving, "make_uploads", lambda: sent)
    monkeypatch.setattr(serving, "IDLE_SECONDS", 0.5)
    before = {process.pid for process in family(os.getpid())}
    arguments = ["--archive", str(demonstration.archive), "--peers", "none", "--rounds", "1", "--seconds", "0"]
    with pytest.raises(SystemExit) as ended:
        serving.main([*arguments, "--warm-up", "0", "--concurrency", "2", "--out", str(tmp_path)])
    printed = capsys.readouterr()
    assert ended.value.code == 0, printed.err
    assert {process.pid for process in family(os.getpid())} <= before
    report = json.loads((tmp_path / "serving.json").read_text(encoding="utf-8"))
    rows = {(row["protocol"], row["load"], row["concurrency"]): row for row in report["rows"]}
    assert set(rows) == {
        *((protocol, "mix", 2) for protocol in ("REST", "gRPC")),
        *((protocol, LONGEST_WHOLE, 1) for protocol in ("REST", "gRPC", "in process")),
    }
    for (protocol, load, _), row in rows.items():
        assert row["failure"] is None
        assert row["max_deviation"] <= 1e-4
        assert row["requests"] == (2 if load == "mix" else 1)
        assert row["segments_per_s"] == pytest.approx(row["requests_per_s"] * ((7 + 32) / 2 if load == "mix" else 32))
        assert row["cpu_s_per_request"] > 0
        assert (row["peak_mb"] is None) is (protocol == "in process")
        assert set(row["ratios"]) >= {"requests_per_s", "p99_s", "cpu_s_per_request"}
        assert row["ratios"]["requests_per_s"] == 1.0 or protocol != "REST"
    assert set(rows["REST", "mix", 2]["by_kind"]) == {SHORT, LONGEST_WHOLE}
    assert report["reference"] == "skewless cough-1.0"
    assert report["servers"]["skewless cough-1.0"]["workers"] == 1
    assert report["servers"]["skewless cough-1.0"]["idle_cores"] >= 0
    assert (tmp_path / "serving.md").read_text(encoding="utf-8") in printed.out
    assert (tmp_path / "serving.png").stat().st_size > 5000


def test_a_wrong_answer_fails_the_benchmark(demonstration: Demonstration, uploads, tmp_path, monkeypatch, capsys):
    """The expected scores are 2e-4 higher: the forward pass gives wrong ones. No server is started."""
    load_archive = serving.Archive.load

    def shifted(*args):
        loaded = load_archive(*args)
        return replace(loaded, expected={kind: [s + 2e-4 for s in scores] for kind, scores in loaded.expected.items()})

    monkeypatch.setattr(serving.Archive, "load", shifted)
    monkeypatch.setattr(serving, "make_uploads", lambda: uploads[:1])
    monkeypatch.setattr(serving, "start_archive", lambda *args: ([], {}, os.getpid()))
    arguments = ["--archive", str(demonstration.archive), "--peers", "none", "--rounds", "1", "--seconds", "0"]
    with pytest.raises(SystemExit) as ended:
        serving.main([*arguments, "--warm-up", "0", "--concurrency", "1", "--out", str(tmp_path)])
    assert str(ended.value.code).startswith("benchmarks.serving: no server is left to measure")
    assert "forward pass cough-1.0, in process: 5 s WAV: answered [" in str(ended.value.code)
    assert not list(tmp_path.iterdir())


def test_archives_have_to_be_of_one_checkpoint(demonstration: Demonstration, uploads, tmp_path):
    other = tmp_path / "cough-2.0.mar"
    with zipfile.ZipFile(demonstration.archive) as packed, zipfile.ZipFile(other, "w") as changed:
        for name in packed.namelist():
            data = packed.read(name)
            if name == "MAR-INF/MANIFEST.json":
                data = data.replace(b'"1.0"', b'"2.0"')
            if name == "metrics.json":
                data = json.dumps(json.loads(data) | {"checkpoint_sha256": "0" * 64}).encode()
            changed.writestr(name, data)
    with pytest.raises(ValueError, match=r"cough-2\.0\.mar is not of the same checkpoint as .*cough-1\.0\.mar"):
        serving.load_archives([demonstration.archive, other], None, tmp_path / "scratch", uploads[:1])
    with pytest.raises(
        ValueError, match=r"two archives have one name and version: skewless cough-1.0, skewless cough-1.0"
    ):
        serving.load_archives([demonstration.archive] * 2, None, tmp_path / "again", uploads[:1])

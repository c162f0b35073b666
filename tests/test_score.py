"""Scoring folders of files: the server's numbers bit for bit, and every file once, whatever happens on the way."""

from __future__ import annotations

import csv
import hashlib
import json
import os
import shutil
import subprocess
import sys
import time
import uuid
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from skewless.core.request import RequestError, parse_request
from skewless.core.service import ModelService
from skewless.errors import LoadError, ScoringError, UsageError
from skewless.scoring import run
from skewless.scoring.files import File, ListError, list_files
from skewless.scoring.parts import Parts
from skewless.torchserve.client import Client
from tests.conftest import ROOT, Demonstration, call_skewless

# --- what is to be scored ---------------------------------------------------------------------------------------------


def names(source: Path, root: Path | None = None, out: str = "none") -> list[str]:
    return [file.file_path for file in list_files(source, root, Path(out))]


def test_a_folder_is_listed_with_its_subfolders_but_without_the_result(tmp_path: Path):
    for name in ("b.wav", "a/ü.wav", "a/c.wav", "p.parquet", "p.parquet.parts/part-0.parquet"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    assert names(tmp_path, out=str(tmp_path / "p.parquet")) == ["a/c.wav", "a/ü.wav", "b.wav"]
    (found, *_) = list_files(tmp_path, None, Path("none"))
    assert found.path == str(tmp_path / "a" / "c.wav")
    with pytest.raises(ListError, match="--input is a folder"):
        names(tmp_path, root=tmp_path)
    (tmp_path / "empty").mkdir()
    with pytest.raises(ListError, match="there are no files"):
        names(tmp_path / "empty")
    with pytest.raises(ListError, match="expected a folder, or a file"):
        names(tmp_path / "nowhere")


def test_a_name_that_is_no_text_is_refused(tmp_path: Path):
    Path(os.fsdecode(os.fsencode(tmp_path) + b"/\xff.wav")).touch()
    with pytest.raises(ListError, match="not UTF-8"):
        names(tmp_path)


def test_a_list_is_a_manifest_or_paths_in_lines(tmp_path: Path):
    manifest, paths = tmp_path / "m.csv", tmp_path / "paths.txt"
    manifest.write_text("\ufefffile_path,label,split\na.wav,yes,test\nsub/b.wav,no,train\n", encoding="utf-8")
    paths.write_text("a.wav\n\n /x/b, c.wav \n")
    assert [*list_files(manifest, None, Path("none"))] == [
        File("a.wav", str(tmp_path / "a.wav")),
        File("sub/b.wav", str(tmp_path / "sub" / "b.wav")),
    ]
    assert [file.path for file in list_files(paths, Path("/root"), Path("none"))] == ["/root/a.wav", "/x/b, c.wav"]
    manifest.write_text("file_path\na.wav\na.wav\n")
    with pytest.raises(ListError, match=r"row 3: file_path 'a.wav' is repeated"):
        names(manifest)
    manifest.write_text("path\na.wav\n")
    with pytest.raises(ListError, match="no column file_path; it has path"):
        names(manifest)


@pytest.mark.parametrize(
    ("cores", "wanted", "threads", "expected"),
    [(8, None, 0, (8, 1)), (8, 2, 0, (2, 4)), (8, 16, 0, (16, 1)), (8, None, 3, (2, 3)), (2, None, 4, (1, 4))],
)
def test_workers_times_threads_is_what_there_are_cores_for(cores, wanted, threads, expected):
    assert run.Crew.of(cores, wanted, threads) == run.Crew(*expected)


# --- rows on the way --------------------------------------------------------------------------------------------------

FILES = [File(f"{number}.wav", f"/{number}.wav") for number in range(5)]
OPTIONS = {"archive": {"version": "1.0"}, "threshold": None}


def row(number: int, **more: Any) -> dict[str, Any]:
    return {"file_path": f"{number}.wav", "status": 200, **more}


def test_parts_become_one_table_whatever_columns_they_have(tmp_path: Path):
    out = tmp_path / "p.parquet"
    with Parts.opened(out) as parts:
        assert parts.begin(OPTIONS, iter(FILES)) == FILES
        parts.write(0, [{"file_path": "0.wav", "status": 415, "error": "no audio"}])
        parts.write(
            1, [row(1, score=0.1 + 0.2, width=3, mixed=1), row(2, score=0.25, width=2.5, mixed="two", late=True)]
        )
        parts.write(3, [row(3, mixed=2, score=1.0), row(4, late=False)])
        assert parts.count() == 5
        assert parts.merge() == [{"file_path": "0.wav", "status": 415, "error": "no audio"}]
    assert [path.name for path in tmp_path.iterdir()] == ["p.parquet"]
    found = pq.read_table(out).to_pydict()
    assert found["file_path"] == [file.file_path for file in FILES]
    assert found["score"] == [None, 0.1 + 0.2, 0.25, 1.0, None]
    assert (found["width"], found["late"]) == ([None, 3.0, 2.5, None, None], [None, None, True, None, False])
    assert found["mixed"] == [None, "1", "two", "2", None]


def test_an_interrupted_run_is_taken_up_with_its_own_list_and_options_only(tmp_path: Path):
    out = tmp_path / "p.parquet"
    with pytest.raises(KeyboardInterrupt), Parts.opened(out) as parts:
        parts.begin(OPTIONS, iter(FILES))
        parts.write(0, [row(0), row(1)])
        raise KeyboardInterrupt
    with Parts.opened(out) as parts:
        assert parts.begin(dict(OPTIONS), iter(FILES[:1])) == FILES
        assert parts.count() == 2
        with pytest.raises(UsageError, match="another run is writing"), Parts.opened(out):
            pass
        for changed in ({"threshold": 0.5}, {"archive": {"version": "2.0"}}):
            with pytest.raises(UsageError, match=f"another {next(iter(changed))} "):
                parts.begin(OPTIONS | changed, iter(FILES))
        parts.write(3, [row(3)])
        with pytest.raises(UsageError, match="lacks part-000000000002"):
            parts.count()


def test_nothing_is_left_of_what_did_not_begin_and_nothing_is_overwritten(tmp_path: Path):
    out = tmp_path / "p.parquet"
    with pytest.raises(ListError), Parts.opened(out) as parts:
        parts.begin(OPTIONS, list_files(tmp_path / "nowhere", None, out))
    assert not [*tmp_path.iterdir()]
    out.write_text("mine")
    with pytest.raises(UsageError, match="is there already"), Parts.opened(out):
        pass
    assert out.read_text() == "mine" and len([*tmp_path.iterdir()]) == 1


class Bar:
    def update(self, count: int) -> None:
        """Shows nothing."""


def collect(parts: Parts, batches: list[list[dict[str, Any]]]) -> None:
    mar = run.Mar(Path("m.mar"), "", "cough", "1.0", "", 0)
    run._collect(iter(batches), parts, FILES, parts.count(), mar, 1e9, Bar())


def test_rows_that_came_are_kept_and_no_other(tmp_path: Path):
    with Parts.opened(tmp_path / "p.parquet") as parts:
        parts.begin(OPTIONS, iter(FILES))
        with pytest.raises(LoadError, match=r"could not load m\.mar: SelfTestError: stage"):
            collect(parts, [[{"file_path": "0.wav", "fault": "SelfTestError: stage 'mel' differs"}]])
        assert parts.count() == 0
        with pytest.raises(ScoringError, match="out of their order"):
            collect(parts, [[row(0)], [row(2)]])
        assert parts.count() == 1
        with pytest.raises(ScoringError, match="with 3 of 5 files; run the same command again"):
            collect(parts, [[row(1), row(2)]])
        collect(parts, [[row(3)], [row(4)]])
        parts.merge()
    table = pq.read_table(tmp_path / "p.parquet")
    assert table["file_path"].to_pylist() == [file.file_path for file in FILES]
    assert set(table["model_name"].to_pylist()) == {"cough"}


def test_a_missing_extra_is_named_with_the_command(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setattr(run, "find_spec", lambda name: None if name == "ray" else True)
    done = call_skewless("score", "m.mar", "--input", ROOT, "--out", tmp_path / "p.parquet")
    assert (done.returncode, done.stdout) == (2, "")
    assert "needs the package 'ray'" in done.stderr and "pip install 'skewless[score]'" in done.stderr


# --- a real archive, killed in the middle and run again ---------------------------------------------------------------

# The process is killed, as by `kill -9`, right after the first rows are on disk.
KILLED = """
import os, signal, sys
from pathlib import Path
from skewless.scoring import parts, run

write = parts.Parts.write
def write_and_die(self, start, rows):
    write(self, start, rows)
    os.kill(os.getpid(), signal.SIGKILL)

parts.Parts.write = write_and_die
run.score(*map(Path, sys.argv[1:]), workers=2, part_seconds=0)
"""
MARK = "SKEWLESS_TEST_MARK"


@dataclass(frozen=True)
class Scored:
    """A run that was killed after its first rows, and the second one. left: processes of either that did not end."""

    manifest: Path
    out: Path
    kept: int
    refused: dict[str, subprocess.CompletedProcess[str]]
    done: subprocess.CompletedProcess[str]
    left: list[str]
    scratch: list[Path]

    @property
    def rows(self) -> list[dict[str, Any]]:
        return pq.read_table(self.out).to_pylist()

    def payload(self, file_path: str) -> bytes:
        return (self.manifest.parent / file_path).read_bytes()


def marked(mark: str, seconds: float) -> list[str]:
    """Processes with this mark in their environment that are still there after some seconds."""
    deadline = time.monotonic() + seconds
    while True:
        found = []
        for process in psutil.process_iter():
            try:
                if process.status() != psutil.STATUS_ZOMBIE and process.environ().get(MARK) == mark:
                    found.append(" ".join(process.cmdline()))
            except psutil.Error:
                continue
        if not found or time.monotonic() > deadline:
            return found
        time.sleep(0.1)


@pytest.fixture(scope="module")
def scored(demonstration: Demonstration, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Scored]:
    folder = tmp_path_factory.mktemp("scored")
    files = folder / "files"
    (files / "sub").mkdir(parents=True)
    recordings = sorted((demonstration.corpus / "audio").iterdir())[:10]
    for number, path in enumerate(recordings):
        shutil.copy(path, files / ("sub" if number % 2 else ".") / path.name)
    (files / "empty.wav").touch()
    (files / "notes.txt").write_text("no recording")
    (files / "several.json").write_text('{"files": {"a": "", "b": ""}}')
    with (files / "large.wav").open("wb") as large:
        large.truncate(50_000_001)  # takes no room on the disk
    listed = sorted(path.relative_to(files).as_posix() for path in files.rglob("*") if path.is_file())
    manifest = files / "manifest.csv"
    with manifest.open("w", newline="") as file:
        csv.writer(file).writerows([["file_path", "label"], *([name, ""] for name in [*listed, "gone.wav", "sub"])])

    out, mark = folder / "p.parquet", uuid.uuid4().hex
    before = {*Path("/tmp").glob("skewless-*")}
    environment = {**os.environ, MARK: mark}
    killed = subprocess.run(
        [sys.executable, "-c", KILLED, demonstration.archive, manifest, out], cwd=ROOT, env=environment, check=False
    )
    assert killed.returncode == -9
    left = marked(mark, 30)
    kept = sum(pq.read_metadata(part).num_rows for part in (folder / "p.parquet.parts").glob("part-*.parquet"))
    assert not out.exists()
    again = ("score", demonstration.archive, "--input", manifest, "--out", out)
    other = folder / "other.mar"
    shutil.copy(demonstration.archive, other)
    with zipfile.ZipFile(other, "a") as packed:
        packed.writestr("changed", "")
    refused = {
        "threshold None, now 0.5": call_skewless(*again, "--threshold", "0.5"),
        "archive {": call_skewless("score", other, *again[2:]),
        "input '": call_skewless("score", again[1], "--input", files, *again[4:]),
    }
    command = [sys.executable, "-m", "skewless", *map(str, again), "--workers", "2", "--json"]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    # Nothing is waited for: it has ended when the command has.
    left += marked(mark, 0)
    yield Scored(manifest, out, kept, refused, done, left, [*({*Path("/tmp").glob("skewless-*")} - before)])


@pytest.fixture(scope="module")
def service(demonstration: Demonstration, tmp_path_factory: pytest.TempPathFactory) -> ModelService:
    folder = tmp_path_factory.mktemp("unpacked")
    with zipfile.ZipFile(demonstration.archive) as packed:
        packed.extractall(folder)
    return ModelService.load(folder, torch.device("cpu"), replay=False)


REFUSED = {"empty.wav": 400, "notes.txt": 415, "several.json": 400, "large.wav": 413, "gone.wav": None, "sub": None}


def test_a_killed_run_is_gone_on_with_and_no_file_is_lost_or_repeated(scored: Scored):
    assert scored.done.returncode == 1, scored.done.stderr
    found = json.loads(scored.done.stdout)
    assert 0 < scored.kept < 16
    assert (found["files"], found["resumed"]) == (16, scored.kept)
    assert {entry["file_path"]: entry["status"] for entry in found["unreadable"]} == REFUSED
    assert (found["workers"], found["threads"] >= 1, found["seconds"] > 0) == (2, True, True)
    with scored.manifest.open(newline="") as file:
        assert [row["file_path"] for row in scored.rows] == [row["file_path"] for row in csv.DictReader(file)]
    assert sorted(path.name for path in scored.out.parent.iterdir()) == ["files", "other.mar", "p.parquet"]


def test_another_archive_threshold_or_input_is_refused(scored: Scored):
    for words, done in scored.refused.items():
        assert (done.returncode, done.stdout) == (2, ""), done.stderr
        assert f"with another {words}" in done.stderr and "remove the folder to begin anew" in done.stderr


def test_no_process_and_no_temporary_folder_is_left(scored: Scored):
    assert scored.left == []
    assert scored.scratch == []


def test_the_terminal_shows_how_far_it_is_and_nothing_of_ray(scored: Scored):
    shown = scored.done.stderr
    assert f"{scored.kept}/16" in shown and "16/16" in shown
    assert [line for line in shown.replace("\r", "\n").splitlines() if line and not line.startswith("scoring:")] == []


def test_every_number_is_the_services_own(scored: Scored, service: ModelService):
    """Bit for bit what the archive answers to each file by itself, and so what a run gives that nothing interrupted."""
    threads = torch.get_num_threads()
    torch.set_num_threads(json.loads(scored.done.stdout)["threads"])
    try:
        for found in scored.rows:
            if found["status"] is None:
                assert "cannot be read" in found["error"]
                continue
            payload = scored.payload(found["file_path"])
            try:
                request = parse_request({"data": payload}, {}, service.limits)
            except RequestError as error:
                request = error
            if found["file_path"] == "several.json":
                assert "several files" in found["error"]
                continue
            (answer,) = service.predict([request])
            assert (found["status"], json.loads(found["body"])) == (answer.status, answer.body)
            assert found["sha256"] == (None if answer.status == 413 else hashlib.sha256(payload).hexdigest())
            assert (found["model_name"], found["model_version"], found["tier"]) == ("cough", "1.0", "exact")
            if answer.status != 200:
                assert (found["error"], found["score"]) == (answer.body["message"], None)
                continue
            body = answer.body
            assert (found["score"], found["threshold"]) == (body["file_probability"], body["threshold_used"])
            assert found["decision"] == ("positive" if body["coughDetected"] else "negative")
            for name in ("coughDetected", "duration_s", "num_segments", "truncated", "runtime", "pipeline_fingerprint"):
                assert found[name] == body[name]
    finally:
        torch.set_num_threads(threads)


def test_a_server_gives_the_same_answers(scored: Scored, client: Client):
    for found in scored.rows:
        if found["status"] is None or found["file_path"] == "several.json":
            continue
        answer = client.predict_rest("cough", scored.payload(found["file_path"]))
        assert (answer.status, answer.body) == (found["status"], json.loads(found["body"])), found["file_path"]


def test_the_result_says_what_its_columns_are(scored: Scored):
    schema = pq.read_schema(scored.out)
    first, last = ["file_path", "status", "error", "sha256", "score", "decision", "threshold"], ["precision", "tier"]
    assert schema.names[:7] == first and schema.names[-2:] == last
    assert schema.field("score").type == pa.float64() and schema.field("coughDetected").type == pa.bool_()

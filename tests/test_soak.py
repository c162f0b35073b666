"""The soak: what it sends, what it takes for a defect, what it keeps, and two minutes of it against the four archives."""

from __future__ import annotations

import io
import json
import os
import socketserver
import subprocess
import sys
import threading
import time
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from random import Random
from types import SimpleNamespace

import numpy as np
import psutil
import pytest
import soundfile
from PIL import Image

from benchmarks.load import WrongAnswer
from benchmarks.soak import __main__ as soak
from benchmarks.soak.bombs import BOMBS, HEAVY, NEVER, bomb, wav
from benchmarks.soak.canaries import Archive, check
from benchmarks.soak.crowd import CROWD, Canary, Crowd, Pace, Phase, Sent
from benchmarks.soak.defects import KEPT_OF_A_SORT, Defect, Defects, kept_messages, verdict
from benchmarks.soak.figures import as_markdown, picture
from benchmarks.soak.hostile import BOMB, MUTATED, SHARES, Plan, Target, kinds
from benchmarks.soak.messages import GRPC, HTTP, LEFT, NO_ANSWER, Message, Wire
from benchmarks.soak.mutations import (
    AUDIO,
    FIELDS,
    IMAGE,
    MUTATIONS,
    make_files,
    mutate,
    ogg_with_checksums,
    places,
    with_checksums,
)
from benchmarks.soak.workers import Watch, Worker, slope
from skewless.core.postprocess import build_postprocessor
from skewless.core.stages.decode import identify as identify_audio
from skewless.core.stages.image import identify as identify_image
from skewless.packaging.build import build_archive
from skewless.torchserve.client import MESSAGES, Answer
from skewless.torchserve.server import Server, TokenKind
from skewless.torchserve.smoke import References
from tests.conftest import OTHERS, Demonstration
from tests.demonstration import trained
from tests.recordings import one_thread  # noqa: F401

# Of the run that ./scripts/test.sh makes, without starting the server: three calm phases and the crowd.
CALM_S, CROWD_S = 8.0, 96.0
# The most that a worker may have had in memory. Generous: what an idle one needs, and for each file that is read at once the worst
# that orca's limits accept.
WORKER_MB = 2000 + 1500 * (os.cpu_count() or 1)


# --- what is sent ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def files() -> dict[str, dict[str, list[bytes]]]:
    return make_files()


def test_there_is_a_file_of_every_format_that_is_read(files):
    read = {name: {identify_audio(data) for data in some} for name, some in files[AUDIO].items()}
    names = {"M4A": "MP4"}
    assert read == {name: {names.get(name, name)} for name in read}
    assert set(read) == {"WAV", "AIFF", "Ogg", "Opus", "FLAC", "MP3", "M4A", "AAC", "WebM"}
    assert {name: {identify_image(data) for data in some} for name, some in files[IMAGE].items()} == {
        name: {name} for name in ("JPEG", "PNG", "WebP")
    }


def test_files_are_the_same_every_time(files):
    assert make_files() == files


def test_every_field_is_in_a_file_of_its_format(files):
    for reads in (AUDIO, IMAGE):
        for name, some in files[reads].items():
            found = {field.marker for field in FIELDS[name] if any(field.marker in data for data in some)}
            assert found == {field.marker for field in FIELDS[name]}, name
            assert all(places(name, data) for data in some)


@pytest.mark.parametrize("mutation", MUTATIONS)
def test_a_mutation_is_another_file_and_always_the_same(files, mutation: str):
    for reads in (AUDIO, IMAGE):
        for name, (first, second, _) in files[reads].items():
            made = [mutate(mutation, name, first, second, Random(seed)) for seed in range(20)]
            assert made == [mutate(mutation, name, first, second, Random(seed)) for seed in range(20)]
            assert first not in made
            assert len(set(made)) > 10, name
            assert max(map(len, made)) < len(first) + len(second) + 600_000


def test_a_changed_header_keeps_checksums_that_fit(files):
    png = bytearray(files[IMAGE]["PNG"][0])
    png[16:20] = (1 << 19).to_bytes(4, "big")
    fixed = with_checksums("PNG", bytes(png))
    assert int.from_bytes(fixed[29:33], "big") == zlib.crc32(fixed[12:29])
    assert Image.open(io.BytesIO(fixed)).size[0] == 1 << 19
    # The encoder's own checksums are those that are computed.
    for name in ("Ogg", "Opus"):
        for data in files[AUDIO][name]:
            assert ogg_with_checksums(data) == data
            assert ogg_with_checksums(data[:22] + bytes(4) + data[26:]) == data


def test_bombs_are_small():
    for reads in (AUDIO, IMAGE):
        for name in BOMBS[reads]:
            assert 0 < len(bomb(reads, name)) < 4_000_000, name
        for name in HEAVY[reads]:
            assert 0 < len(bomb(reads, name)) < 20_000_000, name


def test_bombs_are_what_they_are_called():
    assert len(bomb(AUDIO, "2 GHz")) == 1044
    with soundfile.SoundFile(io.BytesIO(bomb(AUDIO, "2 GHz"))) as file:
        assert (file.samplerate, file.frames) == (2_000_000_000, 500)
    with soundfile.SoundFile(io.BytesIO(bomb(AUDIO, "8 channels of 655,350 Hz"))) as file:
        assert (file.samplerate, file.channels, file.frames) == (655_350, 8, 2 * 655_350)
    with soundfile.SoundFile(io.BytesIO(bomb(AUDIO, "5 hours of FLAC"))) as file:
        assert file.frames == 5 * 3600 * 8000
    for name, level, loud in (
        ("float 1e38", 1e38, 39_000),
        ("float 1e17", 1e17, 39_000),
        ("one sample of 1e38", 1e38, 1),
    ):
        samples = np.abs(soundfile.read(io.BytesIO(bomb(AUDIO, name)), dtype="float32")[0])
        assert np.isfinite(samples).all() and (samples > 1).sum() == loud
        assert 0.1 * level < samples.max() <= level, name
    assert soundfile.read(io.BytesIO(bomb(AUDIO, "5,000 chunks of WAV")))[0].shape == (16_000,)
    for name, pixels in (("400 Mpx PNG", 4e8), ("4 Gpx JPEG", 4.2e9), ("268 Mpx WebP", 2.6e8), ("49 Mpx PNG", 4.9e7)):
        width, height = _claimed(bomb(IMAGE, name))
        assert width * height >= pixels, name


def _claimed(data: bytes) -> tuple[int, int]:
    from PIL.JpegImagePlugin import JpegImageFile
    from PIL.PngImagePlugin import PngImageFile

    from skewless.core.stages.image import _webp_size

    if identify_image(data) == "WebP":
        return _webp_size(data)
    return {"PNG": PngImageFile, "JPEG": JpegImageFile}[identify_image(data)](io.BytesIO(data)).size


def test_five_hours_of_opus_decode_to_five_hours():
    import av

    # The whole would take a minute: its last position counts, and the first packets are heard.
    data = bomb(AUDIO, "5 hours of Opus")
    last = data.rindex(b"OggS")
    assert int.from_bytes(data[last + 6 : last + 14], "little") == pytest.approx(5 * 3600 * 48_000, rel=1e-3)
    with av.open(io.BytesIO(data)) as file:
        frames = [frame.samples for frame, _ in zip(file.decode(audio=0), range(20), strict=False)]
    assert sum(frames[2:]) > 15 * 5000


TARGETS = (
    Target("cough", "1.0", AUDIO, wav(bytes(range(256)) * 200, 16_000), 50_000_000),
    Target("portrait", "2.0", IMAGE, b"\xff\xd8\xff" + bytes(9000), 20_000_000),
)


@pytest.fixture(scope="module")
def plan() -> Plan:
    return Plan.make(TARGETS, 7)


def test_every_kind_makes_a_request(plan: Plan):
    for name, kind in plan.kinds.items():
        for target in TARGETS:
            if kind.reads not in (None, target.reads):
                continue
            message = kind.build(target, Random(3))
            assert message.model == target.name
            assert 0 < len(message.data) < 120_000_000, name
            if message.protocol == HTTP:
                head, _, _ = message.data.partition(b"\r\n\r\n")
                assert head.startswith(b"POST /predictions/"), name
                assert b"uthorization" not in head
            else:
                assert message.protocol == GRPC
            assert message.stop_after is None or 0 < message.stop_after <= len(message.data)


def test_requests_are_the_same_for_the_same_seed(plan: Plan):
    again = Plan.make(TARGETS, 7)
    some = [plan.message(number) for number in range(60)]
    assert [again.message(number) for number in range(60)] == some
    assert [Plan(TARGETS, 8, plan.kinds).message(number) for number in range(60)] != some
    # In any order, as threads ask.
    assert plan.message(41) == some[41]


def test_a_crowd_without_end_has_every_group(plan: Plan):
    drawn = Counter(plan.kinds[plan._draw(Random(f"7 {number}"))].group for number in range(3000))
    assert set(drawn) == set(SHARES)
    assert drawn[MUTATED] / 3000 == pytest.approx(SHARES[MUTATED] / sum(SHARES.values()), abs=0.05)


def test_a_counted_crowd_has_so_many_of_each():
    counted = Plan.make(TARGETS, 7, requests=500, bombs=3)
    order = [name for name, _ in counted.order]
    groups = Counter(counted.kinds[name].group for name in order)
    bombs = [name for name, kind in counted.kinds.items() if kind.group == BOMB]
    assert groups[MUTATED] == 500
    assert {Counter(order)[name] for name in bombs} == {3}
    assert set(groups) == set(SHARES)
    mutated = Counter(name for name in order if counted.kinds[name].group == MUTATED)
    assert len(mutated) == 12 * len(MUTATIONS) and max(mutated.values()) - min(mutated.values()) == 1
    with pytest.raises(IndexError):
        counted.message(len(counted))


def test_archives_take_turns(monkeypatch):
    monkeypatch.setattr("benchmarks.soak.hostile.ASTRAY", 0.0)
    three = [*TARGETS, replace(TARGETS[0], name="orca"), replace(TARGETS[0], name="talent")]
    counted = Plan.make(three, 7, requests=84, bombs=3)
    got = Counter((m.kind, m.model) for m in map(counted.message, range(len(counted))) if m.group == BOMB)
    assert {got["bomb: 2 GHz", name] for name in ("cough", "orca", "talent")} == {1}
    assert got["bomb: 4 Gpx JPEG", "portrait"] == 3


def test_kinds_of_files_that_nobody_reads_are_left_out(files):
    found = kinds(files, [IMAGE])
    assert {kind.reads for kind in found.values()} == {None, IMAGE}


# --- how it is sent ----------------------------------------------------------------------------------------------------


class _Server(socketserver.ThreadingTCPServer):
    """Answers what `reply` makes of the bytes that came until they contained `until`, or until the caller left."""

    allow_reuse_address = True
    daemon_threads = True
    reply: Callable[[bytes], bytes]
    until: bytes
    seen: list[bytes]
    pieces: list[int]


class _Handler(socketserver.BaseRequestHandler):
    server: _Server

    def handle(self) -> None:
        got = b""
        pieces = 0
        try:
            while self.server.until not in got and (piece := self.request.recv(1 << 16)):
                got += piece
                pieces += 1
        except ConnectionResetError:
            got += b"<reset>"
        self.server.seen.append(got)
        self.server.pieces.append(pieces)
        self.request.sendall(self.server.reply(got))


@pytest.fixture
def http() -> Iterator[_Server]:
    with _Server(("127.0.0.1", 0), _Handler) as server:
        server.seen, server.pieces, server.until = [], [], b"END"
        server.reply = lambda got: b'HTTP/1.1 200 OK\r\nContent-Length: 8\r\n\r\n{"a": 1}'
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield server
        server.shutdown()
        thread.join()


@pytest.fixture
def wire(http: _Server) -> Iterator[Wire]:
    port = http.server_address[1]
    with Wire(f"http://127.0.0.1:{port}", f"127.0.0.1:{port}", lambda: "s3cret", patience_s=5.0) as made:
        yield made


ASKED = Message("kind", "group", "cough", HTTP, b"POST /x HTTP/1.1\r\nHost: a\r\n\r\nbodyEND")


def test_a_message_is_sent_byte_for_byte_with_the_token(http: _Server, wire: Wire):
    answer = wire.send(ASKED)
    assert (answer.status, answer.body) == (200, {"a": 1})
    assert http.seen == [b"POST /x HTTP/1.1\r\nAuthorization: Bearer s3cret\r\nHost: a\r\n\r\nbodyEND"]


def test_a_body_is_sent_in_pieces_over_time(http: _Server, wire: Wire):
    started = time.monotonic()
    assert wire.send(replace(ASKED, seconds=0.6)).status == 200
    assert time.monotonic() - started >= 0.5
    assert http.pieces[0] > 3


def test_a_caller_that_leaves_resets_the_connection(http: _Server, wire: Wire):
    assert wire.send(replace(ASKED, stop_after=30)).status == LEFT
    deadline = time.monotonic() + 5
    while not http.seen and time.monotonic() < deadline:
        time.sleep(0.01)
    (got,) = http.seen
    assert got.endswith(b"<reset>") or len(got) == 30 + len(b"Authorization: Bearer s3cret\r\n")


@pytest.mark.parametrize(
    ("reply", "status", "body"),
    [
        (b"", NO_ANSWER, None),
        (b"garbage\r\n\r\n", NO_ANSWER, None),
        (b"HTTP/1.1 500 Oh\r\nContent-Length: 2\r\n\r\nno", 500, {"code": 0, "message": "no"}),
        (b'HTTP/1.1 200 OK\r\nContent-Length: 8\r\n\r\n{"a":NaN', 200, {"code": 0, "message": '{"a":NaN'}),
        (b'HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\n{"a":NaN}', 200, {"code": 0, "message": '{"a":NaN}'}),
        (
            b'HTTP/1.1 200 OK\r\nContent-Length: 16\r\n\r\n{"said":"s3cret"',
            200,
            {"code": 0, "message": '{"said":"TOKEN"'},
        ),
    ],
)
def test_what_comes_back(http: _Server, wire: Wire, reply: bytes, status: int, body: dict | None):
    http.reply = lambda got: reply
    answer = wire.send(ASKED)
    assert answer.status == status
    assert body is None or answer.body == body
    assert "s3cret" not in str(answer)


def test_nobody_listens(tmp_path: Path):
    with Wire("http://127.0.0.1:9", "127.0.0.1:9", lambda: "s3cret", patience_s=5.0) as wire:
        answer = wire.send(ASKED)
        assert answer.status == NO_ANSWER and "ConnectionRefusedError" in answer.body["message"]
        assert wire.send(replace(ASKED, protocol=GRPC, data=b"")).status == 503


def test_a_grpc_message_is_what_torchserve_reads(plan: Plan):
    message = plan.kinds["gRPC: no input"].build(TARGETS[0], Random(0))
    read = MESSAGES["PredictionsRequest"].FromString(message.data)
    assert (read.model_name, read.model_version) == ("cough", "1.0")


# --- what is a defect --------------------------------------------------------------------------------------------------

BUSY = {"code": 503, "type": "ServiceUnavailableException", "message": "no worker"}
NO_TIME = {"code": 503, "message": "this server had no time left for this file; send it again"}


@pytest.mark.parametrize(
    ("status", "body", "owed", "said"),
    [
        (200, {"label": "good"}, True, None),
        (400, {"code": 400, "message": "empty"}, True, None),
        (413, {"code": 0, "message": ""}, True, None),
        (503, BUSY, True, None),
        (503, NO_TIME, True, None),
        (
            503,
            {"code": 503, "type": "InternalServerException", "message": "Prediction failed"},
            True,
            "503: Prediction",
        ),
        (503, {"code": 503, "type": "ConnectionError", "message": "refused"}, True, "503: refused"),
        (500, {"code": 500, "type": "ErrorDataDecoderException", "message": "%zz"}, True, None),
        (500, {"code": 500, "type": "NullPointerException", "message": "null"}, True, "500: null"),
        (507, {"code": 507, "message": "Out of resources"}, True, "507: Out"),
        (NO_ANSWER, {"message": "TimeoutError: "}, True, "no answer: TimeoutError"),
        (NO_ANSWER, {"message": "ConnectionResetError: "}, False, None),
        (500, {"code": 500, "type": "X", "message": "x"}, False, "500: x"),
        (LEFT, {}, True, None),
        (200, {"code": 0, "message": '{"a": NaN}'}, True, "200 without a JSON object"),
        (200, {"results": {"a": {"x": 1}, "b": {"code": 415, "message": "m"}}}, True, None),
        (
            200,
            {"results": {"a": {"x": 1}, "b": {"code": 500, "message": "oh"}}},
            True,
            "500 for one file of several: oh",
        ),
        (200, {"results": {"a": {"x": 1}, "b": NO_TIME}}, True, None),
        (200, {"results": {"a": {"code": "abc"}, "b": 7}}, True, None),
    ],
)
def test_what_is_a_defect(status: int, body: dict, owed: bool, said: str | None):
    found = verdict(replace(ASKED, owed=owed), Answer(status, body, 0.1))
    assert found is None if said is None else (found or "").startswith(said)


def test_what_is_refused_before_a_handler_sees_it_is_none():
    form = b"POST /x HTTP/1.1\r\ncontent-type: multipart/form-data; boundary=\r\n\r\nEND"
    refused = Answer(500, {"code": 500, "type": "StringIndexOutOfBoundsException", "message": "0"}, 0.1)
    assert verdict(replace(ASKED, data=form), refused) is None
    assert verdict(ASKED, refused) is None, "a body without a content type is read as a form"
    octets = form.replace(b"multipart/form-data", b"application/octet-stream")
    assert verdict(replace(ASKED, data=octets), refused) == "500: 0"
    unknown = Answer(500, {"code": 500, "type": "UNKNOWN", "message": ""}, 0.1)
    assert verdict(replace(ASKED, protocol=GRPC, owed=False), unknown) is None
    assert verdict(replace(ASKED, protocol=GRPC), unknown) == "500: "


@pytest.mark.parametrize(
    ("body", "said"),
    [
        ({"label": "good"}, "200 to what has to be refused"),
        ({"results": {"good": {"x": 1}, "0": {"x": 1}, "1": {"code": 400}}}, "200 to what has to be refused"),
        ({"results": {"good": {"x": 1}, "0": {"code": 413}, "1": {"code": 400}}}, None),
    ],
)
def test_what_is_no_recording_has_to_be_refused(body: dict, said: str | None):
    bomb_ = replace(ASKED, refused=True)
    assert verdict(bomb_, Answer(200, body, 0.1)) == said
    assert verdict(bomb_, Answer(413, {"code": 413}, 0.1)) is None
    assert verdict(ASKED, Answer(200, body, 0.1)) is None


def test_files_that_nobody_could_record_are_marked(plan: Plan):
    message = plan.kinds["bomb: 2 GHz"].build(TARGETS[0], Random(1))
    assert message.refused
    assert not plan.kinds["bomb: 5,000 chunks of WAV"].build(TARGETS[0], Random(1)).refused
    assert {name for reads in BOMBS for name in BOMBS[reads]} >= NEVER


@pytest.fixture
def archive() -> Archive:
    postprocessor = build_postprocessor(
        {"label_threshold": {"threshold": 0.5, "classes": ["poor", "good"], "positive_field": "talented"}}
    )
    entries = [{"file": "01.wav", "scores": [0.75]}, {"file": "02.wav", "scores": [0.50004]}]
    references = References(postprocessor, entries, [b"1", b"22"], "f" * 64, 1e-4, {"exact": 1e-4})
    return Archive(Path("talent-1.0.mar"), "talent", "1.0", AUDIO, 1000, references)


def body_of(probability: float, threshold: float = 0.5, **changed) -> dict:
    talented = probability > threshold
    made = {
        "probability": probability,
        "talented": talented,
        "label": "good" if talented else "poor",
        "confidence": probability if talented else 1 - probability,
        "threshold_used": threshold,
        "model_version": "1.0",
        "pipeline_fingerprint": "f" * 64,
        "tier": "exact",
    }
    return made | changed


def test_a_right_canary(archive: Archive):
    assert check(archive, 0, body_of(0.75)) == 0.0
    assert check(archive, 0, body_of(0.75009)) == pytest.approx(9e-5)
    # So close to the threshold that either decision is within the tolerance.
    assert check(archive, 1, body_of(0.49998)) == pytest.approx(6e-5)


@pytest.mark.parametrize(
    ("body", "said"),
    [
        (body_of(0.7502), "expected"),
        (body_of(float("nan")), "expected"),
        (body_of(0.75, talented=False), "decided"),
        (body_of(0.75, model_version="2.0"), "version 2.0"),
        (body_of(0.75, pipeline_fingerprint="0" * 64), "pipeline 000000000000"),
        (body_of(0.75, tier="reduced"), "tier 'reduced'"),
        ({"code": 415, "message": "no audio"}, "no prediction"),
        ({}, "no prediction"),
    ],
)
def test_a_wrong_canary(archive: Archive, body: dict, said: str):
    with pytest.raises(WrongAnswer, match=said):
        check(archive, 0, body)


def test_defects_are_counted_kept_and_bounded(tmp_path: Path):
    (tmp_path / "001").mkdir()
    (tmp_path / "001" / "defect.json").write_text("{}")
    (tmp_path / "002").mkdir()
    defects = Defects(tmp_path)
    assert [each.name for each in tmp_path.iterdir()] == ["002"], "an earlier run's are removed, and nothing else"
    (tmp_path / "002").rmdir()
    for number in range(KEPT_OF_A_SORT + 2):
        message = replace(ASKED, data=ASKED.data + bytes([number]))
        reason = f"500: failed after {number} s"
        defects.add(Defect("wrong status", "kind", "cough", reason, 1.5, 7, 500, {"code": 500}), [message])
    defects.add(Defect("worker died", "", "cough", "process 17 ended", 2.0, 7), [ASKED, replace(ASKED, kind="other")])
    assert len(defects) == KEPT_OF_A_SORT + 3
    assert defects.counts == {"wrong status": KEPT_OF_A_SORT + 2, "worker died": 1}
    kept = sorted(each.name for each in tmp_path.iterdir())
    assert kept == [f"{number:03}" for number in range(1, KEPT_OF_A_SORT + 2)]
    (message,) = kept_messages(tmp_path / "002")
    assert message == replace(ASKED, data=ASKED.data + b"\x01")
    assert (tmp_path / "002" / "request-01.bin").read_bytes() == message.data
    assert [each.kind for each in kept_messages(tmp_path / kept[-1])] == ["kind", "other"]
    assert kept_messages(tmp_path / kept[-1] / "request-02.json")[0].kind == "other"
    known = json.loads((tmp_path / "001" / "defect.json").read_text())
    assert (known["kind"], known["seed"], known["status"], known["body"]) == ("kind", 7, 500, {"code": 500})
    with pytest.raises(ValueError, match="no request-"):
        kept_messages(tmp_path)


# --- the callers -------------------------------------------------------------------------------------------------------


class _Wire:
    """A server that fails for one kind."""

    def __init__(self, failing: str, asked: threading.Event) -> None:
        self.failing, self.asked = failing, asked

    def send(self, message: Message) -> Answer:
        # Or the crowd may have gone before the first canary is asked.
        assert self.asked.wait(60)
        if message.kind == self.failing:
            return Answer(500, {"code": 500, "message": "oh"}, 0.01)
        return Answer(400, {"code": 400, "message": "no"}, 0.01)


class _Client:
    def __init__(self, answer: Answer) -> None:
        self.answer = answer


def make_crowd(tmp_path: Path, archive: Archive, plan: Plan, failing: str, answer: Answer, monkeypatch) -> Crowd:
    """Callers of a server that is none."""

    asked = threading.Event()

    def ask(client: _Client, archive: Archive, number: int) -> tuple[Answer, float]:
        asked.set()
        time.sleep(0.01)
        return client.answer, check(archive, number, client.answer.body) if client.answer.status == 200 else 0.0

    monkeypatch.setattr("benchmarks.soak.crowd.WAYS", {"only": ask})
    monkeypatch.setattr("benchmarks.soak.crowd.LOOK_S", 0.02)
    server = SimpleNamespace(process=lambda: object(), stop=lambda: None)
    watch = SimpleNamespace(look=lambda now: [], workers=[])
    # Stands for what has more than a test needs.
    return Crowd(server, [archive], plan, _Client(answer), _Wire(failing, asked), watch, Defects(tmp_path), {})  # type: ignore[arg-type]


@pytest.fixture
def counted(plan: Plan) -> Plan:
    names = ["JSON: one key twice", "gRPC: no input", "form: nothing"] * 20
    return replace(plan, order=[(name, number // 3) for number, name in enumerate(names)])


def test_a_crowd_sends_every_request_once(tmp_path, archive, counted, monkeypatch):
    one = replace(archive, references=replace(archive.references, entries=archive.references.entries[:1]))
    crowd = make_crowd(tmp_path, one, counted, "gRPC: no input", Answer(200, body_of(0.75), 0.01), monkeypatch)
    phase = crowd.run(CROWD, 2, 3, 60.0, lambda elapsed: None)
    assert Counter(each.kind for each in phase.sent) == Counter(name for name, _ in counted.order)
    assert crowd.defects.counts == {"wrong status": 20}
    assert {canary.outcome for canary in phase.canaries} == {"right"}
    (kept,) = {message.kind for folder in tmp_path.iterdir() for message in kept_messages(folder)}
    assert kept == "gRPC: no input"


@pytest.mark.parametrize(
    ("answer", "outcome", "what"),
    [
        (Answer(200, body_of(0.6), 0.01), "wrong", {"wrong canary"}),
        (Answer(500, {"code": 500, "message": "oh"}, 0.01), "unanswered", {"canary unanswered"}),
        (Answer(504, {"code": 504, "type": "Timeout", "message": "late"}, 0.01), "unanswered", {"canary unanswered"}),
        (Answer(503, BUSY, 0.01), "busy", set()),
    ],
)
def test_canaries_that_are_not_answered_right(tmp_path, archive, counted, monkeypatch, answer, outcome, what):
    crowd = make_crowd(tmp_path, archive, counted, "", answer, monkeypatch)
    phase = crowd.run(CROWD, 2, 1, 60.0, lambda elapsed: None)
    assert phase.canaries and {canary.outcome for canary in phase.canaries} == {outcome}
    assert set(crowd.defects.counts) == what


def test_a_fault_of_a_caller_ends_the_run(tmp_path, archive, counted, monkeypatch):
    crowd = make_crowd(tmp_path, archive, counted, "", Answer(503, BUSY, 0.01), monkeypatch)
    crowd.wire = SimpleNamespace(send=lambda message: 1 / 0)  # type: ignore[assignment]
    with pytest.raises(ZeroDivisionError):
        crowd.run(CROWD, 1, 1, 60.0, lambda elapsed: None)


def test_a_dead_worker_is_a_defect_with_its_suspects(tmp_path, archive, counted, monkeypatch):
    crowd = make_crowd(tmp_path, archive, counted, "", Answer(503, BUSY, 0.01), monkeypatch)
    process = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    try:
        worker = Worker("cough", psutil.Process(process.pid))
        assert worker.look(0.0) and worker.samples[0][1] > 0 and worker.peak >= worker.samples[0][1]
    finally:
        process.kill()
    # Not waited for: to its parent it is a zombie.
    deadline = time.monotonic() + 10
    while worker.look(1.0) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not worker.look(1.0)
    process.wait()
    assert not worker.look(1.0)
    crowd.watch = SimpleNamespace(look=lambda now: [worker], workers=[worker])  # type: ignore[assignment]
    crowd._under_way[3] = (0.0, replace(ASKED, model="cough"))
    crowd._under_way[4] = (0.0, replace(ASKED, model="talent"))
    crowd.look()
    assert crowd.defects.counts == {"worker died": 1}
    assert [message.model for message in kept_messages(tmp_path / "001")] == ["cough"]


def test_workers_are_watched_and_their_replacements_found(tmp_path):
    sleep = [sys.executable, "-c", "import time; time.sleep(600)"]
    processes = [subprocess.Popen(sleep) for _ in range(3)]
    first, second, later = processes
    listed = {"cough": [first.pid], "talent": [second.pid]}

    def manage(method: str, path: str) -> SimpleNamespace:
        rows = [{"pid": pid} for pid in listed[path.split("/")[2]]]
        return SimpleNamespace(json=lambda: [{"workers": rows}])

    try:
        server = SimpleNamespace(pid=psutil.Process().pid, manage=manage)
        watch = Watch(server, [("cough", "1.0"), ("talent", "1.0")])  # type: ignore[arg-type]
        assert [(w.model, w.pid) for w in watch.workers] == [("cough", first.pid), ("talent", second.pid)]
        assert all(worker.idle > 0 for worker in watch.workers)
        assert watch.look(1.0) == []
        first.kill()
        first.wait()
        # TorchServe lists the ended one until there is another, which has no process id at first.
        assert [worker.pid for worker in watch.look(2.0)] == [first.pid]
        listed["cough"] = [-1]
        assert watch.look(3.0) == [] and watch.living("cough") == []
        listed["cough"] = [later.pid]
        assert watch.look(4.0) == []
        assert [worker.pid for worker in watch.living("cough")] == [later.pid]
        assert [worker.died_s for worker in watch.workers] == [2.0, None, None]
    finally:
        for process in processes:
            process.kill()
            process.wait()


def test_memory_over_the_bound_is_a_defect(tmp_path, archive, counted, monkeypatch):
    crowd = make_crowd(tmp_path, archive, counted, "", Answer(503, BUSY, 0.01), monkeypatch)
    worker = SimpleNamespace(model="talent", pid=7, peak=900_000_000)
    crowd.watch = SimpleNamespace(workers=[worker])  # type: ignore[assignment]
    crowd.bounds = {"talent": 900.0}
    crowd.check_memory()
    assert not len(crowd.defects)
    crowd.bounds = {"talent": 899.0}
    crowd.check_memory()
    assert crowd.defects.counts == {"memory": 1}


def test_a_pace_is_kept():
    over = threading.Event()
    pace = Pace(200.0)
    started = time.monotonic()
    assert all(pace.wait(over) for _ in range(2000 + 20))
    # The backlog of the first ten seconds comes at once, the rest at its rate.
    assert time.monotonic() - started >= 0.09
    over.set()
    assert not pace.wait(over)
    assert not Pace(None).wait(over)
    assert Pace(None).wait(threading.Event())


# --- figures -----------------------------------------------------------------------------------------------------------


def test_a_slope_and_its_error_by_hand():
    assert slope([(float(t), 3.0 * t + 5) for t in range(20)]) == pytest.approx((3.0, 0.0), abs=1e-9)
    # Residuals of +1 and -1 in turn around no slope: s^2 = 20 / 18, over the sum of squares of the times' deviations, 665.
    found = slope([(float(t), 1.0 if t % 2 else -1.0) for t in range(20)])
    assert found is not None
    assert found[0] == pytest.approx(10 / 665)
    assert found[1] == pytest.approx(((20 - 10**2 / 665) / 18 / 665) ** 0.5)
    assert slope([(0.0, 1.0)] * 9) is None


def test_the_report_says_what_was_seen(tmp_path, archive, monkeypatch, counted):
    crowd = make_crowd(tmp_path, archive, counted, "", Answer(503, BUSY, 0.01), monkeypatch)
    worker = Worker("talent", psutil.Process(), idle=10**8, peak=3 * 10**8)
    worker.samples = [(float(t), 2 * 10**8 + 10**6 * t) for t in range(100)]
    crowd.watch = SimpleNamespace(workers=[worker])  # type: ignore[assignment]
    for number, name in enumerate((soak.ALONE, soak.COMPANY, CROWD)):
        phase = Phase(name, began=100.0 * number, ended=100.0 * number + 100)
        phase.canaries = [Canary(100.0 * number + n, "talent", "only", "right", (number + 1) * 0.1) for n in range(50)]
        crowd.phases.append(phase)
    crowd.phases[-1].began, crowd.phases[-1].ended = 0.0, 100.0
    crowd.phases[-1].sent = [Sent(1.0, "a", "bombs", 200, 0.5), Sent(2.0, "b", "bombs", NO_ANSWER, 7.5)]
    crowd.defects.add(Defect("wrong status", "b", "talent", "500: oh | oh", 2.0, 7, 500), [ASKED])
    about = {"cpu": "a CPU", "cores": 2, "memory_mb": 1000}
    report = {"machine": about, "arguments": {"concurrency": 16, "seed": 7}, **soak.summarize(crowd)}
    json.dumps(report, allow_nan=False)
    assert report["workers"][0]["slope_mb_per_h"] == pytest.approx(3600.0)
    text = as_markdown(report)
    assert "**1 defects: 1 wrong status**" in text
    assert "2 hostile requests (of 60 planned) and 150 canaries" in text
    assert "| bombs | 2 | 200: 1, none: 1 | 7.5 |" in text
    assert "| hostile crowd | talent | 50 | 0 | 0 | 0 | 0.0e+00 | 0.30 (3.0, 1.5) |" in text
    assert "| 100 | 300 |  | +3600 ± 0 |" in text
    picture(report, tmp_path / "x.png")
    assert (tmp_path / "x.png").stat().st_size > 5000


# --- the command -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--archive", "no.mar", "--seconds", "5"], "no archive: no.mar; build one with `skewless build`"),
        (["--archive", "A"], "give --seconds or --requests"),
        (["--archive", "A", "--seconds", "nan"], "--seconds is nan, expected at least 1"),
        (["--archive", "A", "--seconds", "5", "--bombs", "3"], "--bombs counts beside --requests"),
        (["--archive", "A", "--requests", "0"], "--requests is 0, expected at least 1"),
        (["--archive", "A", "--seconds", "5", "--concurrency", "1"], "--concurrency is 1, expected at least 2"),
        (["--archive", "A", "--seconds", "5", "--pace", "0"], "--pace is 0, expected at least 0.01"),
        (["--archive", "A", "--seconds", "5", "--worker-mb", "cough"], "'cough' is not NAME=MB, such as cough=1500"),
        (["--archive", "A", "--repeat", "nothing.json"], "nothing.json is no kept request"),
    ],
)
def test_wrong_arguments(arguments, said, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(soak.zipfile, "is_zipfile", lambda path: str(path) == "A")
    with pytest.raises(SystemExit) as stopped:
        soak.main([*arguments, "--out", str(tmp_path / "out")])
    assert stopped.value.code == 2
    assert said in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


# --- two minutes -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def archives(demonstration: Demonstration, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """The four archives, in a store of this module: its server is its own."""
    store = tmp_path_factory.mktemp("soak")
    made = [trained(name, store) for name in OTHERS]
    for each in made:
        build_archive(each.definition, each.checkpoint, each.evaluation, "1.0", store)
    return [demonstration.archive, *(each.archive for each in made)]


def test_two_minutes_of_a_hostile_crowd(archives: list[Path], tmp_path, monkeypatch, capsys):
    """No worker dies, every canary is answered right, no answer says that the server failed."""
    tokens = set()
    own = Server.token

    def token(server: Server, kind: TokenKind) -> str:
        tokens.add(own(server, kind))
        return own(server, kind)

    monkeypatch.setattr(Server, "token", token)
    names = ["cough", *OTHERS]
    given = [word for path in archives for word in ("--archive", str(path))]
    given += [word for name in names for word in ("--worker-mb", f"{name}={WORKER_MB}")]
    with pytest.raises(SystemExit) as ended:
        soak.main([*given, "--seconds", str(CROWD_S), "--calm", str(CALM_S), "--out", str(tmp_path)])
    printed = capsys.readouterr()
    assert ended.value.code == 0, printed.out + printed.err
    report = json.loads((tmp_path / "soak.json").read_text(encoding="utf-8"))
    assert report["deaths"] == 0 and not report["defect_counts"]
    assert {worker["model"] for worker in report["workers"]} == set(names)
    rows = {(row["phase"], row["model"]): row for row in report["canaries"]}
    for name in names:
        assert rows[soak.ALONE, name]["right"] > 0
        assert rows[CROWD, name]["right"] > 0
        assert rows["afterwards", name]["right"] == rows["afterwards", name]["asked"]
    assert {group for group in SHARES if report["groups"].get(group, {}).get("sent")} >= {MUTATED, BOMB}
    assert (tmp_path / "soak.md").read_text(encoding="utf-8") in printed.out
    assert (tmp_path / "soak.png").stat().st_size > 5000
    assert not (tmp_path / "defects").exists()
    assert tokens
    written = b"".join(path.read_bytes() for path in tmp_path.rglob("*") if path.is_file())
    assert not [each for each in tokens if each.encode() in written]

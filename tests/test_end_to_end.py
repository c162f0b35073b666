"""A real TorchServe serving a real archive: the right numbers by every path, and a clear answer to every bad request."""

from __future__ import annotations

import base64
import io
import json
import os
import re
import struct
import subprocess
import sys
import wave
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial

import numpy as np
import psutil
import pytest
import soundfile

from skewless.torchserve.client import Answer, Client
from skewless.torchserve.server import Server, bearer, session
from tests.conftest import ROOT, SERVED, Demonstration, run_skewless

# Between a request alone and the same one in a batch: a convolution's last bits may change with the batch's size.
BATCH_TOLERANCE = 1e-6


def wav(samples: np.ndarray, rate: int = 16000, subtype: str = "PCM_16") -> bytes:
    """Samples `(N,)` or `(N, C)` as a WAV file."""
    file = io.BytesIO()
    soundfile.write(file, samples, rate, format="WAV", subtype=subtype)
    return file.getvalue()


def noise(seconds: float, rate: int = 16000, channels: int = 1, seed: int = 0) -> np.ndarray:
    return 0.3 * np.random.default_rng(seed).standard_normal((int(seconds * rate), channels)).clip(-3, 3)


@pytest.fixture(scope="module")
def good(demonstration: Demonstration) -> tuple[bytes, dict]:
    """A reference recording and what evaluation recorded for it."""
    entries = json.loads((demonstration.evaluation / "references" / "references.json").read_text())
    return (demonstration.evaluation / "references" / entries[-1]["file"]).read_bytes(), entries[-1]


def test_smoke_test_passes_on_every_path(server: Server):
    result = run_skewless("smoke", "cough", "--state-dir", server.state_dir)
    rows = re.findall(
        r"^(REST body|REST multipart|gRPC), (default|version 1\.0), .* (\d+)  +(\S+) +(\d+) ", result.stdout, re.M
    )
    assert len(rows) == 12, result.stdout
    for kind, where, clips, max_dp, flips in rows:
        assert (int(clips), int(flips)) == (8, 0), (kind, where)
        assert float(max_dp) <= SERVED, (kind, where)


def test_smoke_test_fails_on_another_number(server: Server, demonstration: Demonstration, tmp_path, monkeypatch):
    from skewless.torchserve import smoke

    whole = smoke.References.from_archive(demonstration.archive)
    references = replace(whole, entries=whole.entries[:2], payloads=whole.payloads[:2])
    references.entries[0]["scores"][0] += 2e-4
    monkeypatch.setattr(smoke.References, "from_archive", lambda path: references)
    rows = smoke.smoke_test(server, "cough")
    assert not any(row.passed for row in rows)
    assert "FAILED" in smoke.as_table(rows)


def test_response_fields(client: Client, good):
    audio, reference = good
    answer = client.predict_rest("cough", audio)
    assert answer.status == 200
    body = answer.body
    assert body["file_probability"] == pytest.approx(reference["scores"][0], abs=SERVED)
    assert body["segment_probabilities"] == pytest.approx([p for *_, p in reference["parts"]], abs=SERVED)
    segments = len(reference["parts"])
    assert body["num_segments"] == len(body["segment_timestamps"]) == len(body["segment_attention"]) == segments
    assert body["segment_timestamps"][0] == [0.0, 2.0]
    assert sum(body["segment_attention"]) == pytest.approx(1.0, abs=1e-5)
    assert body["max_segment_probability"] == max(body["segment_probabilities"])
    assert body["mean_segment_probability"] == pytest.approx(np.mean(body["segment_probabilities"]))
    assert body["coughDetected"] is (body["file_probability"] > body["threshold_used"])
    assert body["analyzed_s"] <= body["duration_s"]
    assert body["truncated"] is False
    assert body["model_version"] == "1.0"
    assert re.fullmatch(r"[0-9a-f]{64}", body["pipeline_fingerprint"])


@pytest.mark.parametrize("how", ["form", "header", "grpc"])
def test_the_caller_may_set_the_threshold(client: Client, good, how: str):
    audio, reference = good
    for threshold, expected in (("0", True), ("1", False)):
        answer = {
            "form": lambda t: client.predict_rest("cough", audio, fields={"threshold": t}, multipart=True),
            "header": lambda t: client.predict_rest("cough", audio, headers={"X-Threshold": t}),
            "grpc": lambda t: client.predict_grpc("cough", audio, inputs={"threshold": t}),
        }[how](threshold)
        assert answer.status == 200
        assert answer.body["threshold_used"] == float(threshold)
        assert answer.body["coughDetected"] is expected
        assert answer.body["file_probability"] == pytest.approx(reference["scores"][0], abs=SERVED)


def test_describe_returns_the_versioned_metrics(client: Client, demonstration: Demonstration):
    described = client.describe("cough")["customizedMetadata"]
    described = json.loads(described) if isinstance(described, str) else described
    measured = json.loads((demonstration.evaluation / "metrics.json").read_text())
    metrics = described["metrics"]
    assert metrics["evaluation"] == measured
    assert metrics["threshold"] == measured["threshold"]
    assert {"model_version", "checkpoint_sha256", "dataset_sha256", "git_commit", "library_versions"} <= set(metrics)
    assert described["precision"]["float32_matmul_precision"] == "highest"
    assert described["precision"]["cudnn_allow_tf32"] is False


def test_prometheus_metrics_are_served(client: Client, good):
    client.predict_rest("cough", good[0])
    assert re.search(r'ts_inference_requests_total\{.*model_name="cough"', client.metrics())


# --- bad and strange input --------------------------------------------------------------------------------------------

_SPEECH = noise(2.5)
_WHOLE = wav(_SPEECH)
_NAN = _SPEECH.copy()
_NAN[1000] = np.nan
_INF = _SPEECH.copy()
_INF[1000] = np.inf


def _header_only() -> bytes:
    file = io.BytesIO()
    with wave.open(file, "wb") as out:
        out.setnchannels(1)
        out.setsampwidth(2)
        out.setframerate(16000)
    return file.getvalue()


REFUSED = {
    "text": (b"this is no audio, whatever its name says", 415, "not a known audio format"),
    "png": (b"\x89PNG\r\n\x1a\n" + bytes(200), 415, "not a known audio format"),
    "truncated wav": (_WHOLE[: len(_WHOLE) // 2], 400, "truncated"),
    "header without data chunk": (_WHOLE[:36], 400, "no samples"),
    "zero samples": (_header_only(), 400, "no audio samples"),
    "nan": (wav(_NAN, subtype="FLOAT"), 400, "NaN or infinite"),
    "infinity": (wav(_INF, subtype="FLOAT"), 400, "NaN or infinite"),
    "garbage behind a wav header": (b"RIFF" + struct.pack("<I", 100) + b"WAVE" + bytes(range(100)), 400, "WAV"),
    "too long": (b"", 413, "longer than"),
    "a rate of 2 GHz": (
        _WHOLE[:24] + struct.pack("<I", 2_000_000_000) + _WHOLE[28:],
        413,
        "1,000 to 384,000 Hz are accepted",
    ),
    "a rate of 1 Hz": (_WHOLE[:24] + struct.pack("<I", 1) + _WHOLE[28:], 400, "1,000 to 384,000 Hz are accepted"),
    "too large": (bytes(50_000_001), 413, "at most 50,000,000"),
}


@pytest.fixture(scope="module")
def refused(client: Client) -> dict[str, tuple[bytes, int, str]]:
    # An hour and a minute of silence at 8 kHz are a small FLAC file.
    file = io.BytesIO()
    with soundfile.SoundFile(file, "w", 8000, 1, format="FLAC", subtype="PCM_16") as out:
        for _ in range(61):
            out.write(np.zeros(8000 * 60, dtype=np.int16))
    return REFUSED | {"too long": (file.getvalue(), *REFUSED["too long"][1:])}


@pytest.mark.parametrize("name", REFUSED)
def test_bad_audio_is_refused_by_rest_and_grpc(client: Client, refused, name: str):
    audio, status, message = refused[name]
    for answer in (
        client.predict_rest("cough", audio),
        client.predict_rest("cough", audio, multipart=True),
        client.predict_grpc("cough", audio),
    ):
        assert (answer.status, answer.body["code"]) == (status, status), answer
        assert message in answer.body["message"]


def _post(server: Server, **how) -> Answer:
    """A request that no well-behaved client would send."""
    headers = bearer(server.token("inference")) | how.pop("headers", {})
    with session() as connection:
        reply = connection.post(f"{server.inference_url}/predictions/cough", headers=headers, timeout=60, **how)
    return Answer(reply.status_code, reply.json(), 0.0)


def test_empty_body(server: Server, client: Client):
    for answer in (
        client.predict_rest("cough", b""),
        client.predict_rest("cough", b"", multipart=True),
        client.predict_grpc("cough", b""),
    ):
        assert answer.status == 400
        assert "the file is empty" in answer.body["message"]


def test_form_without_a_file(server: Server):
    answer = _post(server, files={"threshold": (None, "0.5")})
    assert answer.status == 400
    assert "carries no file" in answer.body["message"]


def test_body_mis_sent_as_a_form(server: Server):
    form = {"Content-Type": "application/x-www-form-urlencoded"}
    answer = _post(server, data=wav(np.zeros(40000)), headers=form)
    assert answer.status == 400
    assert "Content-Type: application/octet-stream" in answer.body["message"]
    # Where the bytes happen to contain a broken percent escape, TorchServe's own form parser answers, with a 500: such
    # a request never reaches a handler.
    answer = _post(server, data=_WHOLE, headers=form)
    assert (answer.status, answer.body["type"]) == (500, "ErrorDataDecoderException")


@pytest.mark.parametrize("threshold", ["abc", "nan", "1.5", "-0.1", ""])
def test_bad_threshold(client: Client, good, threshold: str):
    for answer in (
        client.predict_rest("cough", good[0], fields={"threshold": threshold}, multipart=True),
        client.predict_rest("cough", good[0], headers={"X-Threshold": threshold}),
        client.predict_grpc("cough", good[0], inputs={"threshold": threshold}),
    ):
        assert answer.status == 400
        assert "expected a number in [0, 1]" in answer.body["message"]


def test_unusual_recordings_get_an_answer(client: Client):
    eight_bit = (0.2 * noise(2.5) + 0.5).clip(-1, 1)
    for audio, duration in (
        (wav(np.zeros(40000)), 2.5),
        (wav(noise(0.01)), 0.01),
        (wav(eight_bit, subtype="PCM_U8"), 2.5),
        (wav(noise(2.5, 96000, 8), 96000), 2.5),
    ):
        answer = client.predict_rest("cough", audio)
        assert answer.status == 200, answer
        assert 0.0 <= answer.body["file_probability"] <= 1.0
        assert answer.body["duration_s"] == pytest.approx(duration)


def test_the_longest_recording_is_read_and_said_to_be_truncated(client: Client):
    file = io.BytesIO()
    with soundfile.SoundFile(file, "w", 8000, 1, format="FLAC", subtype="PCM_16") as out:
        for minute in range(15):
            out.write((1000 * np.sin(np.arange(8000 * 60) * (0.1 + minute / 200))).astype(np.int16))
    assert len(file.getvalue()) < 50_000_000
    answer = client.predict_rest("cough", file.getvalue())
    assert answer.status == 200
    assert answer.body["truncated"] is True
    assert answer.body["num_segments"] == 32
    assert (answer.body["analyzed_s"], answer.body["duration_s"]) == (17.5, 900.0)


def test_an_upload_beyond_torchserves_own_limit_is_refused(client: Client, good):
    answer = client.predict_rest("cough", bytes(70 * 2**20))
    assert answer.status == 413
    assert client.predict_rest("cough", good[0]).status == 200


def _worker_pids(server: Server) -> set[int]:
    return {child.pid for child in psutil.Process(server.pid).children(recursive=True)}


def test_bytes_that_would_make_ffmpeg_open_sockets_are_refused(client: Client):
    """An MPEG frame header in front of a session description: FFmpeg, left to guess, would wait for a stream."""
    session_description = b"v=0\no=- 0 0 IN IP4 127.0.0.1\ns=x\nc=IN IP4 127.0.0.1\nt=0 0\nm=audio 55004 RTP/AVP 0\n"
    for start in (b"\xff\xfb\n", b"\xff\xf1\n", b"fLaC\n", b"ID3\n"):
        answer = client.predict_rest("cough", start + session_description, timeout=30)
        assert answer.status == 400


def test_a_caller_cannot_turn_a_prediction_into_a_description(client: Client, good):
    answer = client.predict_rest("cough", good[0], headers={"describe": "True"})
    assert "file_probability" in answer.body
    answer = client.predict_rest("cough", good[0], fields={"describe": "True"}, multipart=True)
    assert "file_probability" in answer.body


def test_bad_requests_leave_their_neighbours_alone(client: Client, server: Server, refused, good):
    """Good and bad requests at once, so that batches mix them: each gets its own answer."""
    audio, reference = good
    bad = [(a, s) for name, (a, s, _) in refused.items() if name not in ("too large", "too long")]
    sent = [(audio, 200)] * 8 + bad + [(audio, 200)] * 8
    workers = _worker_pids(server)
    with ThreadPoolExecutor(len(sent)) as pool:
        answers = list(pool.map(lambda item: client.predict_rest("cough", item[0]), sent))
    assert [a.status for a in answers] == [status for _, status in sent]
    for answer in (a for a in answers if a.status == 200):
        assert answer.body["file_probability"] == pytest.approx(reference["scores"][0], abs=BATCH_TOLERANCE)
    assert _worker_pids(server) == workers
    assert "Prediction failed" not in (server.state_dir / "logs" / "model_log.log").read_text()


def test_tokens_are_required_and_never_logged(server: Server, good):
    with session() as connection:
        octets = {"Content-Type": "application/octet-stream"}
        reply = connection.post(f"{server.inference_url}/predictions/cough", data=good[0], headers=octets, timeout=60)
    assert (reply.status_code, reply.json()["type"]) == (400, "InvalidKeyException")
    logs = "".join(p.read_text(errors="replace") for p in (server.state_dir / "logs").iterdir())
    for kind in ("inference", "management"):
        assert server.token(kind) not in logs


def test_serve_run_serves_the_store_until_a_signal(demonstration: Demonstration, tmp_path):
    """What the container runs."""
    command = [
        sys.executable,
        "-m",
        "skewless",
        "serve",
        "run",
        "--ports",
        "free",
        "--state-dir",
        str(tmp_path / "state"),
    ]
    with subprocess.Popen(
        [*command, "--model-store", str(demonstration.store)], cwd=ROOT, stdout=subprocess.PIPE
    ) as process:
        shown = ""
        while "model " not in shown:
            line = process.stdout.readline().decode()
            assert line, shown
            shown += line
        assert "cough 1.0, default: workers READY" in shown
        pid = Server.attach(tmp_path / "state").pid
        process.terminate()
        assert process.wait(60) == 0
    assert not psutil.pid_exists(pid)


# --- JSON and several files -------------------------------------------------------------------------------------------


def test_json_in_base64(server: Server, client: Client, good):
    audio, reference = good
    text = base64.b64encode(audio).decode()
    octets = {"Content-Type": "application/octet-stream"}
    for answer in (
        client.predict_rest("cough", audio, json_key="audio"),
        client.predict_rest("cough", audio, json_key="file", fields={"threshold": "0.5"}),
        client.predict_grpc("cough", json.dumps({"audio": text}).encode()),
        _post(server, json={"audio": "data:audio/wav;base64," + text, "threshold": 0.5}),
        # As a command line puts it together, and with a content type that says nothing.
        _post(server, data=f'{{"audio": "{base64.encodebytes(audio).decode()}"}}', headers=octets),
    ):
        assert answer.status == 200, answer
        assert answer.body["file_probability"] == pytest.approx(reference["scores"][0], abs=SERVED)
    assert _post(server, json={"audio": text, "threshold": 1}).body["threshold_used"] == 1.0


def test_json_without_a_recording(server: Server, client: Client):
    for document, status, words in (
        ({"audio": "UklGRg=="}, 415, "not a known audio format"),
        ({"audio": "not base64"}, 400, "the key 'audio' is not base64"),
        ({"recording": "UklGRg=="}, 400, "unknown key 'recording'"),
        (["UklGRg=="], 400, "a JSON array"),
        ({"audio": base64.b64encode(bytes(50_000_001)).decode()}, 413, "50,000,001 bytes, at most 50,000,000"),
    ):
        answer = _post(server, json=document)
        assert (answer.status, answer.body["code"]) == (status, status), answer
        assert words in answer.body["message"]
    answer = client.predict_rest("cough", b"[" * 10_000_000)
    assert (answer.status, "commas and brackets" in answer.body["message"]) == (400, True)


BATCHES = {
    "form": lambda client: client.predict_batch_rest,
    "json": lambda client: partial(client.predict_batch_rest, as_json=True),
    "grpc": lambda client: client.predict_batch_grpc,
}


@pytest.mark.parametrize("how", BATCHES)
def test_several_files_in_one_request(client: Client, good, how: str):
    """Each file gets what it gets alone, under its name; a bad one fails alone."""
    audio, reference = good
    quiet = wav(0.01 * noise(2.5))
    alone = client.predict_rest("cough", quiet).body
    files = {"a.wav": audio, "b": b"this is no audio", "ü 3": quiet, "empty": b"", "it's (4)/\\%22": audio}
    answer = BATCHES[how](client)("cough", files)
    assert answer.status == 200, answer
    assert (answer.body["succeeded"], answer.body["failed"]) == (3, 2)
    results = answer.body["results"]
    assert set(results) == set(files)
    for name in ("a.wav", "it's (4)/\\%22"):
        assert results[name]["file_probability"] == pytest.approx(reference["scores"][0], abs=BATCH_TOLERANCE)
    assert results["ü 3"]["file_probability"] == pytest.approx(alone["file_probability"], abs=BATCH_TOLERANCE)
    assert (results["b"]["code"], results["empty"]["code"]) == (415, 400)
    assert "0 bytes" in results["empty"]["message"]


def test_one_threshold_for_a_batch(client: Client, good):
    files = {"1": good[0], "2": good[0]}
    for answer in (
        client.predict_batch_rest("cough", files, fields={"threshold": "1"}),
        client.predict_batch_rest("cough", files, fields={"threshold": "1"}, as_json=True),
        client.predict_batch_rest("cough", files, headers={"X-Threshold": "1"}),
        client.predict_batch_grpc("cough", files, inputs={"threshold": "1"}),
    ):
        assert [result["threshold_used"] for result in answer.body["results"].values()] == [1.0, 1.0]
    assert client.predict_batch_rest("cough", files, fields={"threshold": "2"}).status == 400


def test_a_batch_that_is_none(client: Client, good):
    audio = good[0]
    many = {str(i): b"x" for i in range(65)}
    for answer, words in (
        (client.predict_batch_rest("cough", many), "65 files, at most 64"),
        (client.predict_batch_rest("cough", many, as_json=True), "65 files, at most 64"),
        (client.predict_batch_grpc("cough", many), "65 files, at most 64"),
        (client.predict_batch_rest("cough", {}, as_json=True), "'files' is empty"),
        (client.predict_batch_rest("cough", {"": audio}), "named ''"),
        (client.predict_batch_grpc("cough", {"a\0": audio}), "named 'a\\x00'"),
        (client.predict_batch_grpc("cough", {"1": audio}, inputs={"data": audio}), "'data'"),
    ):
        assert (answer.status, answer.body["code"]) == (400, 400), answer
        assert words in answer.body["message"]


def test_the_client_sends_nothing_that_would_arrive_as_something_else(client: Client):
    with pytest.raises(ValueError, match="choose one"):
        client.predict_rest("cough", b"", multipart=True, json_key="audio")
    with pytest.raises(ValueError, match="fields travel"):
        client.predict_rest("cough", b"", fields={"threshold": "1"})
    for name in ('a"b', "a,b", "a:b", "a;b", "a=b", "a\nb", "a "):
        with pytest.raises(ValueError, match="as another name"):
            client.predict_batch_rest("cough", {name: b""})


def test_files_that_torchserve_drops_are_noticed(server: Server, good):
    """Of several form fields with one name it delivers the last: no answer must pass for that of all of them."""
    audio = wav(noise(1.0))
    for name, words in (("files", "-F files.1=@FILE"), ("data", "bytes only"), ("files.1", "bytes only")):
        answer = _post(server, files=[(name, ("a.wav", audio)), (name, ("b.wav", good[0]))])
        assert answer.status == 400, name
        assert words in answer.body["message"]
    answer = _post(server, files=[("fil", ("a.wav", audio))])
    assert (answer.status, "'fil'" in answer.body["message"]) == (400, True)


def test_a_long_file_name_is_no_dropped_file(server: Server, good):
    answer = _post(server, files={"data": ("ü" * 1000 + ".wav", good[0])})
    assert answer.status == 200, answer


def test_ten_thousand_form_fields(server: Server, client: Client, good):
    answer = _post(server, files=[(f"files.{i}", ("x", b"x")) for i in range(10_000)])
    assert (answer.status, "10,000 files, at most 64" in answer.body["message"]) == (400, True)
    assert client.predict_rest("cough", good[0]).status == 200


def test_predict_prints_a_command_that_does_the_same(server: Server, good, tmp_path):
    for name in ("a.wav", "it's; 100% b=c, ü.wav"):
        (tmp_path / name).write_bytes(good[0])
    (tmp_path / "bad.txt").write_bytes(b"this is no audio")
    paths = sorted(tmp_path.iterdir())
    for chosen, options, status in (
        (paths[:1], [], 0),
        (paths[:1], ["--json-body"], 0),
        ([paths[0], paths[2]], [], 0),
        (paths, [], 1),
        (paths, ["--json-body"], 1),
    ):
        asked = ("predict", *chosen, "--model", "cough", *options, "--state-dir", server.state_dir)
        sent = run_skewless(*asked, check=False)
        assert sent.returncode == status, sent.stdout + sent.stderr
        # The first line sets TOKEN.
        _, _, command = sent.stderr.partition("\n")
        command = command.partition("\n\n")[0]
        again = subprocess.run(
            ["bash", "-c", f"set -o pipefail; {command} -sS"],
            env=os.environ | {"TOKEN": server.token("inference")},
            capture_output=True,
            check=True,
        )
        if len(chosen) > 1:
            names = [re.sub("[;=,]", "_", path.name) for path in chosen]
            assert sorted(json.loads(sent.stdout)["results"]) == sorted(names)
        # A convolution's last bits may change with the requests that happen to be batched together.
        assert _rounded(json.loads(again.stdout)) == _rounded(json.loads(sent.stdout))


def _rounded(value):
    """Floats as approximations."""
    if isinstance(value, dict):
        return {key: _rounded(each) for key, each in value.items()}
    if isinstance(value, list):
        return [_rounded(each) for each in value]
    return pytest.approx(value, abs=BATCH_TOLERANCE) if isinstance(value, float) else value

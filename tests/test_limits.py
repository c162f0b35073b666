"""What one request may cost: memory by its rate, channels and samples, seconds of sound, processor time, and its batch's time.

Bombs are small files that would take much of these. Where time decides, the tests have clocks of their own.
"""

from __future__ import annotations

import json
import re
import resource
import shutil
import struct
import threading
import tracemalloc
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from multiprocessing.connection import Connection
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import yaml

from handler.entry import SkewlessHandler
from skewless.core import budget
from skewless.core.definition import MODEL, Definition, read_model
from skewless.core.pipeline import Pipeline
from skewless.core.postprocess import build_postprocessor
from skewless.core.request import BatchRequest, Limits, Request, RequestError
from skewless.core.service import ModelService, Response
from skewless.core.stages import STAGES, InputError, Payload, Signal
from skewless.core.stages import decode as decode_module
from skewless.core.stages.decode import BLOCK_SAMPLES, Samples
from skewless.packaging.build import DEFAULT_RESPONSE_TIMEOUT, TORCHSERVE, BuildError, check_times
from tests import recordings
from tests.conftest import ROOT, call_skewless
from tests.recordings import one_thread  # noqa: F401
from tests.test_decode import isolated

SOUND_ARCHIVES = ("cough", "orca", "talent")
MB = 1_000_000

# --- rate, channels, samples ------------------------------------------------------------------------------------------


def claiming(rate: int, samples: int = 500) -> bytes:
    """A WAV file of 16 bits, 1,044 bytes for 500 samples, whose header says that it was recorded at `rate` Hz."""
    data = recordings.wav(0.1 * np.ones((1, samples)), 16000)
    return data[:24] + struct.pack("<I", rate) + data[28:]


@pytest.fixture
def two_threads() -> Iterator[None]:
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(1)


@cache
def flac(rate: int, channels: int, seconds: float) -> bytes:
    """Silence: 0.2 % of the size of its samples."""
    silence = np.zeros((round(rate * seconds), channels), dtype=np.int16).tobytes()
    return recordings.ffmpeg(
        *("-f", "s16le", "-ar", str(rate), "-ac", str(channels), "-i", "-", "-f", "flac", "-"), data=silence
    )


BOMBS: dict[str, tuple[Callable[[], bytes], int, str]] = {
    "100 samples at 1 Hz": (lambda: claiming(1, 100), 400, "1 Hz, 1,000 to 384,000 Hz are accepted"),
    "30 MHz": (lambda: claiming(30_000_000), 413, "30,000,000 Hz, 1,000 to 384,000 Hz are accepted"),
    "2 GHz": (lambda: claiming(2_000_000_000), 413, "2,000,000,000 Hz, 1,000 to 384,000 Hz are accepted"),
    "FLAC of 8 channels at 655,350 Hz": (lambda: flac(655_350, 8, 2.0), 413, "655,350 Hz, 1,000 to 384,000 Hz are"),
    "60 channels": (lambda: recordings.wav(np.zeros((60, 500)), 16000), 413, "60 channels, at most 8 are accepted"),
}


def prepared(name: str, data: bytes) -> Any:
    """What an archive's service, which reads without a network, makes of one file."""
    service = ModelService(Definition.read(ROOT / "archive" / name), None, {})  # type: ignore[arg-type]
    (found,) = service.prepare([Request(data)])
    return found


@pytest.mark.parametrize("bomb", BOMBS)
@pytest.mark.parametrize("name", SOUND_ARCHIVES)
def test_bombs_are_refused_with_what_is_accepted(name: str, bomb: str):
    make, status, message = BOMBS[bomb]
    found = prepared(name, make())
    assert isinstance(found, RequestError)
    assert found.status == status
    assert message in found.message


@pytest.mark.parametrize("bomb", BOMBS)
def test_bombs_take_no_memory(bomb: str):
    """Of a whole process: what libraries take counts, too. 100 samples at 1 Hz took 6 MB of windows at once, 30 MHz 297 MB."""
    data = BOMBS[bomb][0]()
    prepared("orca", recordings.wav(0.1 * np.ones((1, 44100)), 44100))  # what is imported at first use
    prepared("orca", recordings.recording("flac"))

    def work(pipe: Connection) -> None:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        found = prepared("orca", data)
        pipe.send((found.status, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before))

    ((status, taken),), exit_code = isolated(work)
    assert (status, exit_code) == (BOMBS[bomb][1], 0)
    assert taken < 16_000  # kB


def decode(data: bytes, **limits: Any) -> Signal:
    return STAGES["decode"]()(Signal(Payload(data, **limits)))


@pytest.mark.parametrize("encoder", ["wav16", "aiff", "vorbis", "flac", "m4a", "webm"])
def test_a_refused_header_is_all_that_is_read(encoder: str, monkeypatch: pytest.MonkeyPatch):
    data = recordings.recording(encoder, 48000, 2, 0.5)

    def asked(*refused: object, **how: object) -> None:
        raise AssertionError("samples were decoded")

    monkeypatch.setattr("soundfile.SoundFile.read", asked)
    monkeypatch.setattr("skewless.core.stages.decode_ffmpeg._samples", asked)
    for limits, kind in (
        ({"min_rate_hz": 48001}, "malformed"),
        ({"max_rate_hz": 47999}, "too_large"),
        ({"max_channels": 1}, "too_large"),
    ):
        with pytest.raises(InputError) as caught:
            decode(data, **limits)
        assert caught.value.kind == kind
    with pytest.raises(AssertionError):
        decode(data, min_rate_hz=48000, max_rate_hz=48000, max_channels=2)


@pytest.mark.parametrize("encoder", ["wav16", "flac"])
def test_samples_to_keep_are_counted_over_all_channels(encoder: str):
    data = recordings.recording(encoder, 16000, 2, 1.5)
    assert decode(data, max_samples=48_000).data.shape == (2, 24_000)
    with pytest.raises(InputError, match=r"more than 47,999 samples .* all 2 channels counted") as caught:
        decode(data, max_samples=47_999)
    assert caught.value.kind == "too_large"
    # What is not kept is not counted.
    assert decode(data, max_samples=16_000, head_s=lambda rate: 0.5).data.shape == (2, 8_000)


def test_five_minutes_of_stereo_are_read_and_a_bomb_of_as_many_seconds_is_not():
    """By the limits that talent has: it keeps all of a recording."""
    limits = Definition.read(ROOT / "archive" / "talent").limits
    assert 300 * 48_000 * 2 <= limits.max_samples < 300 * 384_000 * 8
    data = flac(384_000, 8, 30.0)
    assert len(data) < MB
    found = prepared("talent", data)
    assert isinstance(found, RequestError)
    assert (found.status, "samples to keep in memory" in found.message) == (413, True)


# --- memory of what is read -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("channels", [1, 2, 5])
def test_blocks_of_any_length_become_one_array(channels: int):
    rng = np.random.default_rng(channels)
    for sizes in ([0], [7], [3, 0, 4], [1] * 30, list(rng.integers(0, 5000, 40))):
        blocks = [rng.standard_normal((channels, size)).astype(np.float32) for size in sizes]
        samples = Samples()
        for block in blocks:
            samples.append(block)
        joined = samples.joined()
        assert joined.flags.c_contiguous
        assert np.array_equal(joined, np.concatenate(blocks, axis=1))


@pytest.mark.parametrize("channels", [1, 8])
def test_decoding_takes_little_more_than_what_it_gives(channels: int):
    """Joined at the end, blocks take twice as much."""
    frames = 4_000_000 // channels
    data = recordings.wav(np.zeros((channels, frames)), 48000)
    tracemalloc.start()
    try:
        given = decode(data).data
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert given.shape == (channels, frames)
    assert peak < 1.4 * 4 * given.numel()


@pytest.mark.parametrize("channels", [1, 8])
@pytest.mark.parametrize("encoder", ["wav16", "flac"])
def test_a_block_is_as_large_whatever_the_channels(encoder: str, channels: int, monkeypatch: pytest.MonkeyPatch):
    sizes = []
    append = Samples.append
    monkeypatch.setattr(Samples, "append", lambda self, block: sizes.append(block.size) or append(self, block))
    decode(recordings.recording(encoder, 48000, channels, 2 * BLOCK_SAMPLES / channels / 48000))
    assert len(sizes) >= 2
    assert max(sizes) <= BLOCK_SAMPLES * 1.3  # FFmpeg's frames are taken whole


def test_a_codecs_frame_has_an_end(monkeypatch: pytest.MonkeyPatch):
    """The header of an ALAC file may promise frames of 16 million samples, and a few bytes are enough for silence."""
    from skewless.core.stages import decode_ffmpeg

    data = recordings.recording("alac", 48000, 2, 0.5)
    assert decode(data).data.shape == (2, 24_000)
    monkeypatch.setattr(decode_ffmpeg, "_LARGEST_FRAME", 4095)
    with pytest.raises(InputError, match="MP4"):
        decode(data)


# --- a service whose clocks stand still -------------------------------------------------------------------------------


class Clock:
    """Seconds that pass when somebody says so."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


class Network:
    """A runtime that keeps the first sample of every file that it is given, in order."""

    name, tier, precision, rows_at_once = "stub", "exact", "fp32", 1

    def __init__(self, each: Callable[[], object] = lambda: None):
        self.given: list[float] = []
        self._each = each

    def __call__(self, inputs: Sequence[torch.Tensor]) -> list[dict[str, torch.Tensor]]:
        for rows in inputs:
            self.given.append(round(float(rows.flatten()[0]), 4))
            self._each()
        return [{"probability": torch.tensor(0.9)} for _ in inputs]


def serving(network: Network, limits: Limits, run: Callable[..., Signal] | None = None) -> ModelService:
    """run: what reads a file; None for the decoder, whose samples are then the network's input."""
    definition = SimpleNamespace(
        postprocessor=build_postprocessor(
            {"label_threshold": {"threshold": 0.5, "positive_field": "loud", "classes": ["no", "yes"]}}
        ),
        prepared=SimpleNamespace(run=run) if run else Pipeline("sound", [STAGES["decode"]()]),
        limits=limits,
        pipeline=SimpleNamespace(fingerprint="f"),
    )
    return ModelService(definition, network, {"model_version": "1"})  # type: ignore[arg-type]


def sound(number: int, seconds: float = 1.0) -> bytes:
    """A recording whose samples are all `number` hundredths."""
    return recordings.wav(np.full((1, round(8000 * seconds)), number / 100), 8000, "FLOAT")


def codes(response: Response) -> list[int]:
    """Of a request with several files: each one's status."""
    return [each.get("code", 200) for each in response.body["results"].values()]


# --- seconds of sound -------------------------------------------------------------------------------------------------


def test_recordings_of_one_request_share_its_seconds(two_threads: None):
    """In the order of the files, whoever is read first: a file that no longer fits is refused, a shorter one after it fits."""
    limits, files = Limits(max_duration_s=2.5), {"a": sound(1), "b": sound(2, 2.0), "c": b"no sound", "d": sound(4)}
    for _ in range(5):
        service = serving(network := Network(), limits)
        (response,) = service.predict([BatchRequest(files)])
        assert codes(response) == [200, 413, 415, 200]
        assert network.given == [0.01, 0.04]
        assert response.body["results"]["b"]["message"] == (
            "the recording has 2 s, and the files before it in the request leave 1.5 of the 2.5 s that all recordings of one "
            "request may have together; send it in a request of its own"
        )
        assert (response.body["succeeded"], response.body["failed"]) == (2, 2)


def test_requests_do_not_share_their_seconds():
    service = serving(network := Network(), Limits(max_duration_s=2.5))
    responses = service.predict([Request(sound(1, 2.0)), Request(sound(2, 2.0)), BatchRequest({"c": sound(3, 2.0)})])
    assert [response.status for response in responses] == [200, 200, 200]
    assert network.given == [0.01, 0.02, 0.03]
    assert [each.signal.rate for each in service.prepare([Request(sound(1, 2.0))] * 3)] == [8000] * 3  # type: ignore[union-attr]


def test_files_may_fill_a_request_to_its_last_second():
    """Though a tenth of a second has no end in binary."""
    service = serving(Network(), Limits(max_duration_s=0.3))
    (response,) = service.predict([BatchRequest({str(k): sound(k, 0.1) for k in range(1, 5)})])
    assert codes(response) == [200, 200, 200, 413]


def test_pictures_have_no_seconds():
    service = serving(Network(), Limits(max_duration_s=0.1), lambda payload, **limits: Signal(torch.zeros(1, 3)))
    (response,) = service.predict([BatchRequest({"a": b"1", "b": b"2"})])
    assert codes(response) == [200, 200]


# --- processor time ---------------------------------------------------------------------------------------------------


def ticking(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each look at a reader's processor time finds that a second of it has passed."""
    seconds = threading.local()

    def thread_time() -> float:
        seconds.now = getattr(seconds, "now", 0.0) + 1.0
        return seconds.now

    monkeypatch.setattr(budget, "thread_time", thread_time)


def test_reading_ends_when_its_processor_time_is_over(monkeypatch: pytest.MonkeyPatch):
    ticking(monkeypatch)
    blocks = []
    append = Samples.append
    monkeypatch.setattr(Samples, "append", lambda self, block: blocks.append(block.size) or append(self, block))
    long = recordings.wav(np.zeros((1, 12 * BLOCK_SAMPLES)), 48000)
    service = serving(network := Network(), Limits(max_read_s=5))
    refused, answered = service.predict([Request(long), Request(sound(1))])
    assert (refused.status, answered.status) == (413, 200)
    assert refused.body["message"] == (
        "reading took more than 5 s of processor time, the most that one request may take; send a shorter excerpt or fewer files"
    )
    # One second before the first block, one after each.
    assert blocks == [BLOCK_SAMPLES] * 5 + [8000]
    assert network.given == [0.01]


def test_files_of_one_request_share_its_processor_time(monkeypatch: pytest.MonkeyPatch):
    """Three seconds each: before it, after its block, after its stage. What is left over is not read at all."""
    ticking(monkeypatch)
    read = []
    identify = decode_module.identify
    monkeypatch.setattr(decode_module, "identify", lambda data: read.append(data) or identify(data))
    service = serving(network := Network(), Limits(max_read_s=7))
    files = {str(k): sound(k) for k in range(1, 6)}
    several, one = service.predict([BatchRequest(files), Request(sound(9))])
    assert codes(several) == [200, 200, 413, 413, 413]
    assert one.status == 200
    assert network.given == [0.01, 0.09, 0.02]
    assert read == [files["1"], sound(9), files["2"], files["3"]]


def test_time_between_stages_counts(monkeypatch: pytest.MonkeyPatch):
    ticking(monkeypatch)
    pipeline = Pipeline("sound", [STAGES["decode"](), *(STAGES["downmix"]() for _ in range(5))])
    service = serving(Network(), Limits(max_read_s=6), pipeline.run)
    (response,) = service.predict([Request(sound(1))])
    assert response.status == 413
    assert serving(Network(), Limits(max_read_s=8), pipeline.run).predict([Request(sound(1))])[0].status == 200


def test_evaluation_and_training_have_all_the_time_they_need(monkeypatch: pytest.MonkeyPatch):
    ticking(monkeypatch)
    assert len(serving(Network(), Limits(max_read_s=1, max_batch_s=1)).score([sound(1)] * 3)) == 3


# --- the batch's time -------------------------------------------------------------------------------------------------


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    found = Clock()
    monkeypatch.setattr(budget, "monotonic", found)
    return found


def passing(clock: Clock, seconds: float) -> Callable[[], None]:
    def later() -> None:
        clock.now += seconds

    return later


def test_a_batch_ends_before_its_server_gives_it_up(clock: Clock):
    """40 s for every file: the third begins after 80 s."""
    service = serving(network := Network(passing(clock, 40.0)), Limits(max_batch_s=60))
    responses = service.predict([Request(sound(k)) for k in range(1, 8)])
    assert [response.status for response in responses] == [200, 200, 503, 503, 503, 503, 503]
    assert network.given == [0.01, 0.02]
    assert responses[2].body == {
        "code": 503,
        "message": "this server had no time left for this file: the requests that it came with took 60 s, the most that they "
        "may take together; send it again",
    }
    # The next batch begins anew.
    assert service.predict([Request(sound(1))])[0].status == 200


def test_files_that_there_is_no_time_for_are_not_read(clock: Clock):
    read = []

    def run(payload: bytes, **limits: Any) -> Signal:
        read.append(payload)
        return Signal(torch.zeros(1, 1))

    service = serving(Network(passing(clock, 100.0)), Limits(max_batch_s=60), run)
    responses = service.predict([Request(str(k).encode()) for k in range(20)])
    assert [response.status for response in responses] == [200] + [503] * 19
    assert len(read) <= 4  # those that were read ahead of the first answer


def test_a_file_that_is_being_read_when_the_time_ends_is_given_up(clock: Clock, two_threads: None):
    """By whoever waits for it, and by the thread that reads it, at its next block."""
    began, go_on, ended = threading.Event(), threading.Event(), []

    def run(payload: bytes, *, check: Callable[[], None], **limits: Any) -> Signal:
        if payload == b"slow":
            began.set()
            go_on.wait(30)
            try:
                check()
            except RequestError as error:
                ended.append(error.status)
                raise
        return Signal(torch.zeros(1, 1))

    def first_answer() -> None:
        assert began.wait(30)
        clock.now += 100.0

    service = serving(Network(first_answer), Limits(max_batch_s=60), run)
    try:
        responses = service.predict([Request(b"quick"), Request(b"slow"), Request(b"later")])
        assert ended == []  # answered while the thread was still at it
    finally:
        go_on.set()
    service._readers.shutdown()
    assert [response.status for response in responses] == [200, 503, 503]
    assert ended == [503]


def test_files_are_answered_in_turn_whatever_request_they_came_in():
    """So that one file waits for one file of another request, not for sixty-four."""
    service = serving(network := Network(), Limits())
    requests = [
        BatchRequest({"a": sound(1), "b": sound(2), "c": RequestError(413, "too large"), "d": sound(4)}, 0.95),
        RequestError(400, "no file"),
        Request(sound(10)),
        BatchRequest({"e": sound(21), "f": sound(22)}),
    ]
    responses = service.predict(requests)
    assert network.given == [0.01, 0.1, 0.21, 0.02, 0.22, 0.04]
    assert [response.status for response in responses] == [200, 400, 200, 200]
    assert list(responses[0].body["results"]) == ["a", "b", "c", "d"]
    assert codes(responses[0]) == [200, 200, 413, 200]
    assert [codes(responses[3]), list(responses[3].body["results"])] == [[200, 200], ["e", "f"]]
    assert responses[0].body["results"]["d"]["threshold_used"] == 0.95
    assert responses[2].body["threshold_used"] == 0.5


def test_the_handler_answers_late_files_and_their_neighbours(clock: Clock):
    handler = SkewlessHandler()
    handler.service = serving(Network(passing(clock, 100.0)), Limits(max_batch_s=60))
    statuses = {}
    context = SimpleNamespace(
        get_all_request_header=lambda number: {},
        set_response_content_type=lambda number, kind: None,
        set_response_status=lambda code, phrase, number: statuses.update({number: code}),
    )
    answers = handler.handle([{"body": sound(1)}, {"body": sound(2)}, {"body": b"no sound"}], context)
    assert statuses == {0: 200, 1: 503, 2: 503}
    assert [json.loads(answer).get("code", 200) for answer in answers] == [200, 503, 503]


# --- what is built ----------------------------------------------------------------------------------------------------

SERVED = [*sorted((ROOT / "archive").glob("*/model.yaml")), ROOT / "skewless" / "templates" / "sound" / "model.yaml"]


@pytest.mark.parametrize("model", SERVED, ids=lambda path: path.parent.name)
def test_our_own_models_end_before_their_server_gives_them_up(model: Path):
    config = model.parent / TORCHSERVE
    check_times(config if config.is_file() else model.parents[1] / TORCHSERVE, read_model(model)["limits"])


def config(folder: Path, text: str) -> Path:
    path = folder / TORCHSERVE
    path.write_text(text)
    return path


@pytest.mark.parametrize(
    ("text", "limits", "message"),
    [
        (
            "batchSize: 8\nresponseTimeout: 120\n",
            Limits(max_read_s=10),
            r"batchSize 8 x max_read_s 10 s is 80 s.*half of responseTimeout 120 s.*lower batchSize",
        ),
        ("batchSize: 4\n", Limits(max_read_s=10), "batchSize 4 x max_read_s 10 s is 40 s.*responseTimeout 60 s"),
        ("responseTimeout: 100\n", Limits(), "max_batch_s is 60 s, more than half of responseTimeout 100 s"),
        ("batchSize: many\n", Limits(), "batchSize is 'many', expected a whole number from 1"),
        ("responseTimeout: 0\n", Limits(), "responseTimeout is 0, expected a whole number from 1"),
        ("- 4\n", Limits(), r"is \[4\], expected keys and values"),
        ("batchSize: [\n", Limits(), "is not YAML"),
    ],
)
def test_a_batch_that_may_outlast_its_server_is_not_built(tmp_path: Path, text: str, limits: Limits, message: str):
    with pytest.raises(BuildError, match=message) as caught:
        check_times(config(tmp_path, text), limits)
    assert str(tmp_path / TORCHSERVE) in str(caught.value)


@pytest.mark.parametrize(
    ("text", "limits"),
    [
        ("batchSize: 6\nresponseTimeout: 120\n", Limits(max_read_s=10, max_batch_s=60)),
        ("", Limits(max_read_s=30, max_batch_s=30)),
    ],
)
def test_half_of_the_servers_patience_may_be_used(tmp_path: Path, text: str, limits: Limits):
    check_times(config(tmp_path, text), limits)


def test_torchserves_patience_is_as_its_configuration_says():
    stated = re.search(r"^default_response_timeout=(\d+)$", (ROOT / "config.properties").read_text(), re.MULTILINE)
    assert stated is not None
    assert int(stated[1]) == DEFAULT_RESPONSE_TIMEOUT


def test_the_build_ends_with_2_before_it_reads_a_checkpoint(tmp_path: Path):
    folder = tmp_path / "talent"
    shutil.copytree(ROOT / "archive" / "talent", folder)
    settings = yaml.safe_load((folder / TORCHSERVE).read_text())
    (folder / TORCHSERVE).write_text(yaml.safe_dump(settings | {"batchSize": 64}))
    (tmp_path / "best.pth").touch()
    (tmp_path / "metrics.json").write_text("{}")
    (tmp_path / "predictions.csv").touch()
    ended = call_skewless(
        *("build", folder, "--checkpoint", tmp_path / "best.pth", "--evaluation", tmp_path, "--version", "1.0"),
        *("--out", tmp_path / "store"),
    )
    assert ended.returncode == 2
    assert "batchSize 64 x max_read_s" in " ".join(ended.stderr.split())
    assert not (tmp_path / "store").exists()


@pytest.mark.parametrize(("low", "high"), [(2000, 1000), (0, 1000), (1000, -1)])
def test_a_range_of_rates_that_is_none_is_refused(tmp_path: Path, low: int, high: int):
    model = tmp_path / MODEL
    text = (ROOT / "archive" / "talent" / MODEL).read_text()
    model.write_text(re.sub(r"limits: \{", f"limits: {{min_rate_hz: {low}, max_rate_hz: {high}, ", text))
    with pytest.raises(ValueError, match=r"limit (min|max)_rate_hz is .* expected"):
        read_model(model)

"""What a pipeline runs against its plain stages: the same bits, whatever the recording and the parameters."""

import copy
import subprocess
import sys
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from numpy.typing import NDArray

from skewless.core.pipeline import Pipeline
from skewless.core.selftest.replay import SelfTestError, _Replay
from skewless.core.stages import Payload, Signal, fused
from tests import recordings
from tests.recordings import one_thread  # noqa: F401

ARCHIVE = Path(__file__).parents[1] / "archive"
FILE = ARCHIVE / "cough" / "pipeline.yaml"
PIPELINE = Pipeline.from_yaml(FILE)


def altered(**parameters: Any) -> Pipeline:
    """The cough pipeline with parameters set anew, as `stage__parameter`."""
    definition = copy.deepcopy(yaml.safe_load(FILE.read_text()))
    for name, value in parameters.items():
        stage, parameter = name.split("__")
        next(item for item in definition["stages"] if stage in item)[stage][parameter] = value
    return Pipeline.from_dict(definition)


def same(pipeline: Pipeline, data: bytes) -> None:
    """Asserts the same bits and metadata by both paths, and memory in order where the plain one has it."""
    fast, plain = pipeline.run(data), deque(pipeline.steps(data), maxlen=1).pop()[1]
    assert fast.data.dtype == plain.data.dtype
    assert torch.equal(fast.data, plain.data)
    assert fast.data.is_contiguous() or not plain.data.is_contiguous()
    assert (fast.rate, fast.metadata) == (plain.rate, plain.metadata)


def noise(rate: int, samples: int, channels: int = 1, level: float = 1.0) -> NDArray[np.float32]:
    rng = np.random.default_rng([rate, samples, channels])
    return (level * rng.uniform(-1, 1, (channels, samples))).astype(np.float32)


RATES = [8000, 11025, 16000, 22050, 32000, 44100, 48000, 96000, 176400]


@pytest.mark.parametrize("seconds", [0.01, 2.0, 3.3, 5.7])
@pytest.mark.parametrize("rate", RATES)
def test_any_rate_and_length(rate, seconds):
    same(PIPELINE, recordings.wav(noise(rate, round(seconds * rate) + 1, 2), rate, "FLOAT"))


@pytest.mark.parametrize("samples", [1, 479, 20480, 20481, 31999, 32000, 32001, 39999, 40000, 279999, 280000, 310000])
def test_any_number_of_samples(samples):
    same(PIPELINE, recordings.wav(noise(16000, samples), 16000, "FLOAT"))
    same(PIPELINE, recordings.wav(noise(48000, 3 * samples, 2), 48000))


@pytest.mark.parametrize("channels", range(1, 9))
def test_any_number_of_channels(channels):
    same(PIPELINE, recordings.wav(noise(44100, 130000, channels), 44100, "FLOAT"))


UNUSUAL = {
    "silence": lambda x: 0 * x,
    "clipped": lambda x: np.clip(5 * x, -1, 1),
    "tiny": lambda x: 1e-30 * x,
    "huge": lambda x: 2.0**31 * x,
    "one click": lambda x: np.where(np.arange(x.shape[1]) == 50000, x, 0),
    "silence at first": lambda x: np.where(np.arange(x.shape[1]) > 100000, x, 0),
}


@pytest.mark.parametrize("kind", UNUSUAL)
def test_any_level(kind):
    data = recordings.wav(UNUSUAL[kind](noise(44100, 150001, 2)), 44100, "FLOAT")
    same(PIPELINE, data)
    names = [name for name in PIPELINE.stages if name != "peak_normalize"]
    same(Pipeline("x", [PIPELINE.stages[name] for name in names]), data)


@pytest.mark.parametrize("encoder", ["vorbis", "mp3", "webm", "flac", "m4a"])
def test_any_codec(encoder):
    same(PIPELINE, recordings.recording(encoder, 48000, 2, 3.0))


PARAMETERS: dict[str, dict[str, Any]] = {
    "n_fft": {"mel__n_fft": 2048, "mel__win_length": 1024},
    "odd n_fft": {"mel__n_fft": 1023, "mel__win_length": 1000},
    "hop that does not divide the segment's": {"mel__hop_length": 161},
    "hop over half of n_fft": {"mel__hop_length": 800},
    "hop of half of n_fft": {"mel__hop_length": 500, "mel__n_fft": 1000, "mel__win_length": 1000},
    "window shorter than n_fft": {"segment__duration_s": 0.05},
    "windows side by side": {"segment__hop_s": 2.0},
    "windows apart": {"segment__hop_s": 3.0},
    "windows of odd length": {"segment__duration_s": 1.00007},
    "one segment": {"segment__max_segments": 1},
    "padded tail": {"segment__tail": "pad"},
    "maximum of the recording": {"decibel__max_over": "recording"},
    "other floor": {"decibel__top_db": 20.0, "decibel__amin": 1e-5},
    "magnitude": {"mel__power": 1.0},
    "odd power": {"mel__power": 1.5},
    "whole spectrum": {"mel__f_max": 8000.0, "mel__f_min": 0.0},
    "one filter": {"mel__n_mels": 1},
    "slaney": {"mel__norm": "slaney", "mel__mel_scale": "slaney"},
    "half precision": {"standardize__arithmetic": "float16"},
    "one channel": {"replicate__channels": 1},
    "other size": {"letterbox__size": 97},
    "other rate": {"resample__rate": 22050},
    "sharper resampler": {"resample__lowpass_filter_width": 64, "resample__rolloff": 0.95},
    "other resampler": {"resample__method": "resample_poly"},
    "other filter": {"highpass__cutoff_hz": 2000.0, "highpass__q": 3.0},
}


@pytest.mark.parametrize("name", PARAMETERS)
def test_any_parameter(name):
    same(altered(**PARAMETERS[name]), recordings.wav(noise(44100, 211111, 2), 44100))


@pytest.mark.parametrize("before", list(PIPELINE.stages)[1:])
def test_any_shortened_pipeline(before):
    first, _ = PIPELINE.split(before)
    same(first, recordings.wav(noise(44100, 150000, 2), 44100))


@pytest.mark.parametrize("archive", ["orca", "cough"])
def test_stages_that_cannot_be_computed_together_stay(archive):
    pipeline = Pipeline.from_yaml(ARCHIVE / archive / "pipeline.yaml")
    stages = [s for step in pipeline.plan for s in (step.stages if isinstance(step, fused.Fused) else (step,))]
    assert stages == list(pipeline.stages.values())
    same(pipeline, recordings.wav(noise(44100, 200000, 2), 44100))


def test_the_definition_stays():
    before = PIPELINE.to_dict()
    assert any(isinstance(step, fused.Fused) for step in PIPELINE.plan)
    assert PIPELINE.to_dict() == before
    assert all(not isinstance(stage, fused.Fused) for stage in PIPELINE.stages.values())


@pytest.mark.skipif(
    torch.backends.cpu.get_cpu_capability() != "AVX512", reason="other processors may sum in other orders"
)
@pytest.mark.parametrize("rate", [r for r in RATES if r != 176400])
def test_usual_recordings_take_the_fast_path(rate, monkeypatch):
    """Or else the tests above compare the plain stages with themselves."""
    data = recordings.wav(noise(rate, 3 * rate, 2), rate)
    PIPELINE.run(data)  # each step has proved itself
    taken = []
    for step in (s for s in PIPELINE.plan if isinstance(s, fused.Fused)):
        fast = type(step).fast
        monkeypatch.setattr(type(step), "fast", lambda self, x, fast=fast: (taken.append(type(self)), fast(self, x))[1])
    PIPELINE.run(data)
    expected = [type(s) for s in PIPELINE.plan if isinstance(s, fused.Fused)]
    assert taken == [t for t in expected if rate != 16000 or t is not fused._SincResample]


def test_a_step_that_differs_in_one_bit_is_not_used(monkeypatch):
    data = recordings.wav(noise(44100, 150000, 2), 44100)
    plain = deque(PIPELINE.steps(data), maxlen=1).pop()[1]
    right = fused._Highpass.fast

    def wrong(self: Any, signal: Signal) -> Signal:
        filtered = right(self, signal)
        filtered.data[0, -1] += 1e-3
        return filtered

    monkeypatch.setattr(fused._Highpass, "fast", wrong)
    fused._proved.cache_clear()
    try:
        assert torch.equal(PIPELINE.run(data).data, plain.data)
    finally:
        fused._proved.cache_clear()


def test_many_threads_at_once():
    pipeline = Pipeline.from_yaml(FILE)
    fused._proved.cache_clear()
    fused._bands.cache_clear()
    many = [recordings.wav(noise(rate, 2 * rate + k, 2), rate) for rate in (44100, 48000) for k in range(4)]
    expected = [deque(pipeline.steps(data), maxlen=1).pop()[1].data for data in many]
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda data: pipeline.run(data).data, many))
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_the_self_test_says_where_the_fast_path_differs():
    class Archive:
        pipeline = prepared = PIPELINE
        packages = ()

    replay = _Replay(Path(), {}, {}, Archive())  # type: ignore[arg-type]
    plain = torch.zeros(2, 3)
    replay.check_fast("01.wav", plain, plain.clone())
    with pytest.raises(SelfTestError, match=r"stage 'standardize' differs on 01.wav: .*up to 1.0e-06 away.*expected 0"):
        replay.check_fast("01.wav", plain, plain + 1e-6)
    with pytest.raises(SelfTestError, match=r"gives \(2, 2\) float32, not \(2, 3\) float32"):
        replay.check_fast("01.wav", plain, plain[:, :2])


MEMORY = """
import io, sys
import numpy as np, soundfile, torch
from skewless.core.pipeline import Pipeline

torch.set_num_threads(1)
pipeline = Pipeline.from_yaml(sys.argv[1])

def encoded(minutes):
    file = io.BytesIO()
    with soundfile.SoundFile(file, "w", 8000, 1, format=sys.argv[2], subtype="PCM_16") as out:
        for minute in range(minutes):
            out.write(np.random.default_rng(minute).uniform(-0.5, 0.5, 60 * 8000).astype(np.float32))
    return file.getvalue()

def peak():
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM")) * 1024

for minutes in (1, 1, 30):
    data = encoded(minutes)
    open("/proc/self/clear_refs", "w").write("5")
    pipeline.run(data)
    print(peak() - len(data))
    del data
"""


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="Linux tells a process its own peak memory")
@pytest.mark.parametrize("container", ["WAV", "FLAC"])
def test_memory_does_not_grow_with_the_recording(container):
    """30 minutes are 29 MB of PCM_16 and 58 MB of float32; the process without the bytes it was sent stays within 10 %."""
    run = subprocess.run(
        [sys.executable, "-c", MEMORY, FILE, container], capture_output=True, text=True, check=True, cwd=ARCHIVE.parent
    )
    _, minute, half_an_hour = map(int, run.stdout.split())
    assert half_an_hour < 1.1 * minute
    assert half_an_hour - minute < 25_000_000


def test_a_payload_is_left_alone():
    """The steps work in place, but not in what others hold."""
    data = recordings.wav(noise(16000, 40000), 16000, "FLOAT")
    decoded = PIPELINE.stages["decode"](Signal(Payload(data)))
    for step in PIPELINE.plan[1:]:
        before = decoded.data.clone()
        after = step(decoded)
        assert torch.equal(decoded.data, before)
        decoded = after

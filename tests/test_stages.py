"""Every stage against the float64 oracle: alone, fed the oracle's own previous output, and as a whole.

Alone, both sides get the same float32 numbers, so that what differs is one stage's arithmetic. Tolerances are a small
multiple of what float32 allows; `eps` below is its unit, 2**-24 = 6e-8 relative.
"""

from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
import torchaudio.transforms as AT
from numpy.typing import NDArray

from skewless.core.pipeline import Pipeline
from skewless.core.stages import STAGES, InputError, PipelineError, Signal
from tests import recordings
from tests.oracles import cough as oracle
from tests.recordings import one_thread  # noqa: F401

PIPELINE = Pipeline.from_yaml(Path(__file__).parents[1] / "archive" / "cough" / "pipeline.yaml")

# Levels, lengths and shapes that a stage may treat differently.
CASES: dict[str, tuple[int, Callable[[int], NDArray]]] = {
    "stereo 44.1 kHz": (44100, lambda rate: recordings.coughs(rate, 4.3, channels=2)),
    "mono 8 kHz": (8000, lambda rate: recordings.coughs(rate, 3.0)),
    "six channels 48 kHz": (48000, lambda rate: recordings.coughs(rate, 2.6, channels=6)),
    "mono 11.025 kHz": (11025, lambda rate: recordings.coughs(rate, 2.5)),
    "mono 96 kHz": (96000, lambda rate: recordings.coughs(rate, 2.1)),
    "already 16 kHz": (16000, lambda rate: recordings.coughs(rate, 3.7)),
    "shorter than a window": (22050, lambda rate: recordings.coughs(rate, 0.7)),
    "faint": (16000, lambda rate: 1e-4 * recordings.coughs(rate, 2.2)),
    "clipped": (16000, lambda rate: np.clip(8 * recordings.coughs(rate, 2.2), -1, 1)),
    "full-scale noise": (44100, lambda rate: np.random.default_rng(0).uniform(-1, 1, (2, 2 * rate + 1))),
    "one click": (16000, lambda rate: 0.8 * np.eye(1, 2 * rate + 999, rate)),
}
LONG = {"longer than the cap": (16000, lambda rate: recordings.coughs(rate, 18.7))}


@cache
def decoded(case: str) -> tuple[int, NDArray[np.float32]]:
    rate, make = {**CASES, **LONG}[case]
    return rate, make(rate).astype(np.float32)


@cache
def expected(case: str) -> dict[str, NDArray]:
    rate, samples = decoded(case)
    return {"decode": samples, **oracle.trace(samples, rate)}


def run(stage: str, data: NDArray, rate: int, /, **changes: object) -> Signal:
    """One stage of the pipeline, with parameters changed, on data whose metadata are those of a whole recording."""
    metadata = {
        "peak": float(np.abs(data).max()),
        "num_samples": data.shape[-1],
        "duration_s": data.shape[-1] / rate,
        "complete": True,
    }
    return replace(PIPELINE.stages[stage], **changes)(Signal(torch.from_numpy(data), rate, metadata))


def alone(case: str, stage: str) -> tuple[NDArray, NDArray]:
    """A stage's output, and the oracle's for the same input: the oracle's previous output as the stage gets it."""
    names = list(PIPELINE.stages)
    previous = expected(case)[names[names.index(stage) - 1]]
    given = previous if previous.dtype == np.float16 else previous.astype(np.float32)
    source = decoded(case)[0]
    rate = source if names.index(stage) <= names.index("resample") else 16000
    want = oracle.resample(given, source) if stage == "resample" else getattr(oracle, stage)(given)
    got = run(stage, given, rate).data.numpy()
    assert got.shape == want.shape
    return got, want


def largest_error(got: NDArray, want: NDArray) -> float:
    return float(np.abs(got.astype(np.float64) - want.astype(np.float64)).max())


# Largest absolute error of a stage alone.
TOLERANCES = {
    "peak_normalize": 1e-7,  # one division of numbers up to 1: eps
    "downmix": 1e-7,  # a mean of up to six numbers: a few eps of their size
    # torchaudio rounds the phase of each output to float32, which 441 phases (11.025 and 44.1 kHz) magnify to 441 eps
    # = 2.6e-5 of a zero crossing; at 8, 48 and 96 kHz the error is a few eps.
    "resample": 3e-5,
    "highpass": 1e-4,  # poles 0.02 from z = 1 amplify what each step rounds, by up to 1 / 0.02**2: 2500 eps = 1.5e-4
    "segment": 0.0,  # a copy
    "decibel": 3e-5,  # two roundings of numbers up to 100: 2 x 100 eps = 1.2e-5
    "scale": 5e-7,  # two roundings of numbers up to 1, doubled
    "letterbox": 5e-5,  # source positions up to 201 are float32: 201 eps = 1.2e-5 of a step between pixels, up to 2
    "cast": 0.0,  # the same rounding to nearest even
    "replicate": 0.0,  # a copy
    "standardize": 1e-6,  # one subtraction and one division, results up to 2.7
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("stage", TOLERANCES)
def test_stage_alone(stage, case):
    got, want = alone(case, stage)
    assert largest_error(got, want) <= TOLERANCES[stage]


@pytest.mark.parametrize("case", CASES)
def test_mel_alone(case):
    """Sums of 513 products of squares in float32: the error goes with the segment's loudest bin, not with each bin."""
    got, want = alone(case, "mel")
    loudest = want.max(axis=(1, 2), keepdims=True)
    assert float((np.abs(got - want) / loudest).max()) <= 5e-5


def test_every_stage_but_decode_is_compared():
    assert {"decode", "mel", *TOLERANCES} == set(PIPELINE.stages)


def compare_network_input(data: bytes, want: NDArray) -> None:
    """Whole pipeline against whole oracle. A float32 biquad is 1e-5 off, which decibels magnify in bins near silence
    (0.03 in one real recording): so the mean and the 99th percentile are bounded, not the largest error. A value
    that float32's last bits move over a rounding edge of float16 is 5e-4 / 0.45 = 1.1e-3 off."""
    got = PIPELINE(data).numpy()
    assert got.shape == want.shape
    error = np.abs(got - want)
    assert float(error.mean()) <= 1e-4
    assert float(np.quantile(error, 0.99)) <= 3e-3


@pytest.mark.parametrize("case", [*CASES, *LONG])
def test_whole_pipeline(case):
    rate, samples = decoded(case)
    compare_network_input(recordings.wav(samples, rate, "FLOAT"), expected(case)["standardize"])


REAL = recordings.esc10(6)


@pytest.mark.skipif(not REAL, reason="the ESC-10 recordings of ../shared/data/esc10 are not here")
@pytest.mark.parametrize("path", REAL, ids=lambda path: path.stem)
def test_whole_pipeline_on_real_recordings(path):
    samples, rate = soundfile.read(path, dtype="float32", always_2d=True)
    compare_network_input(path.read_bytes(), oracle.trace(samples.T, rate)["standardize"])


def test_silence_stays_silence():
    """No peak to divide by, and every bin at `amin`: the lowest value of the scale, -1, everywhere."""
    out = PIPELINE(recordings.wav(np.zeros((1, 40000)), 16000))
    lowest = (0.0 - np.array(oracle.IMAGENET_MEAN)) / np.array(oracle.IMAGENET_STD)
    image = out[0].numpy()
    np.testing.assert_allclose(image, np.broadcast_to(lowest[:, None, None], image.shape), atol=1e-6)


def test_peak_is_over_all_channels_and_the_whole_recording():
    """Not the channel's own, and not that of the samples at hand, which may be only the head."""
    data = torch.tensor([[0.1, -0.2], [0.05, 0.4]])
    out = STAGES["peak_normalize"]()(Signal(data, 16000, {"peak": 0.8}))
    torch.testing.assert_close(out.data, data / 0.8, atol=1e-7, rtol=0)


def test_highpass_clamps():
    """A step of full scale down from +1 overshoots -1: the output stops there, as in training."""
    step = np.ones((1, 4000), dtype=np.float32)
    step[0, 2000:] = -1.0
    got = run("highpass", step, 16000).data.numpy()
    assert got.min() == -1.0
    assert largest_error(got, oracle.highpass(step)) <= 1e-4


@pytest.mark.parametrize(("cutoff_hz", "q", "rate"), [(20.0, 0.707, 16000), (300.0, 2.0, 16000), (1000.0, 0.5, 44100)])
def test_highpass_parameters(cutoff_hz, q, rate):
    noise = np.random.default_rng(5).uniform(-0.2, 0.2, (1, 8000)).astype(np.float32)
    got = run("highpass", noise, rate, cutoff_hz=cutoff_hz, q=q).data.numpy()
    assert largest_error(got, oracle.highpass(noise, rate, cutoff_hz, q)) <= 1e-4


@pytest.mark.parametrize(("source", "target"), [(44100, 22050), (16000, 44100), (8000, 48000), (44100, 48000)])
def test_resample_to_other_rates(source, target):
    noise = np.random.default_rng(6).uniform(-1, 1, (2, 3001)).astype(np.float32)
    out = run("resample", noise, source, rate=target)
    assert out.rate == target
    assert largest_error(out.data.numpy(), oracle.resample(noise, source, target)) <= 3e-5


@pytest.mark.parametrize(("width", "rolloff"), [(12, 0.99), (6, 0.85), (64, 0.9475937167399596)])
def test_resample_parameters(width, rolloff):
    noise = np.random.default_rng(7).uniform(-1, 1, (1, 6000)).astype(np.float32)
    got = run("resample", noise, 44100, lowpass_filter_width=width, rolloff=rolloff).data.numpy()
    assert largest_error(got, oracle.resample(noise, 44100, 16000, width, rolloff)) <= 3e-5


def test_resample_refuses_a_rate_without_common_divisor():
    with pytest.raises(InputError, match="44099 Hz has too small a common divisor with 16000") as caught:
        run("resample", np.zeros((1, 1000), dtype=np.float32), 44099)
    assert caught.value.kind == "unsupported"


LENGTHS = [1, 15999, 31999, 32000, 32001, 39999, 40000, 40001, 279999, 280000, 287999, 288000, 288001, 400000]


@pytest.mark.parametrize("tail", ["drop", "pad"])
@pytest.mark.parametrize("length", LENGTHS)
def test_segments(length, tail):
    """Around one window, two windows and the cap of 32; the times and the cap's mark with them."""
    ramp = np.arange(1, length + 1, dtype=np.float32)[None]
    out = run("segment", ramp, 16000, tail=tail)
    want = oracle.segment(ramp, tail=tail)
    np.testing.assert_array_equal(out.data.numpy(), want)
    times = [(0.5 * i, 0.5 * i + 2.0) for i in range(len(want))]
    assert out.metadata["segment_times_s"] == times
    assert out.metadata["analyzed_s"] == min(times[-1][1], length / 16000)
    assert out.metadata["truncated"] == (len(oracle.segment(ramp, tail=tail, max_segments=10**6)) > 32)


def test_a_padded_tail_is_silence_after_the_sound():
    out = run("segment", np.ones((1, 36000), dtype=np.float32), 16000, tail="pad").data
    assert out.shape == (5, 32000)
    assert [float(row.sum()) for row in out] == [32000, 28000, 20000, 12000, 4000]


@pytest.mark.parametrize(("duration_s", "hop_s", "most"), [(1.0, 0.25, 5), (3.0, 3.0, 32), (0.5, 1.0, 3)])
def test_segment_parameters(duration_s, hop_s, most):
    ramp = np.arange(1, 70001, dtype=np.float32)[None]
    out = run("segment", ramp, 16000, duration_s=duration_s, hop_s=hop_s, max_segments=most)
    np.testing.assert_array_equal(out.data.numpy(), oracle.segment(ramp, 16000, duration_s, hop_s, most))


def test_segment_takes_one_channel():
    with pytest.raises(PipelineError, match="stage 'segment': it takes one channel, got 2; add a 'downmix'"):
        run("segment", np.zeros((2, 32000), dtype=np.float32), 16000)


@pytest.mark.parametrize(
    ("changes", "arguments"),
    [
        ({"n_mels": 64, "f_max": 7600.0}, {"n_mels": 64, "f_max": 7600.0}),
        ({"hop_length": 256, "n_fft": 2048, "win_length": 2048}, {"hop": 256, "n_fft": 2048}),
        ({"f_min": 0.0}, {"f_min": 0.0}),
        ({"rate": 14000}, {"rate": 14000}),
    ],
    ids=["bands", "frames", "from 0 Hz", "filterbank of another rate"],
)
def test_mel_parameters(changes, arguments):
    segments = expected("already 16 kHz")["segment"].astype(np.float32)
    got = run("mel", segments, 16000, **changes).data.numpy()
    want = oracle.mel(segments, **arguments)
    assert got.shape == want.shape
    assert largest_error(got, want) <= 5e-5 * want.max()


def test_mel_filterbank_follows_the_waveforms_rate():
    segments = expected("already 16 kHz")["segment"].astype(np.float32)
    want = oracle.mel(segments, rate=12000)
    assert largest_error(run("mel", segments, 12000).data.numpy(), want) <= 5e-5 * want.max()


def test_decibel_over_the_recording():
    """One floor for all segments, set by the loudest: with a quiet segment it is far from each segment's own."""
    power = expected("one click")["mel"].astype(np.float32)
    power = np.concatenate([power, 1e-6 * power])
    shared = run("decibel", power, 16000, max_over="recording").data.numpy()
    assert largest_error(shared, oracle.decibel(power, shared_maximum=True)) <= TOLERANCES["decibel"]
    own = run("decibel", power, 16000).data.numpy()
    assert largest_error(own, oracle.decibel(power)) <= TOLERANCES["decibel"]
    assert largest_error(own, shared) > 20


@pytest.mark.parametrize(("top_db", "amin"), [(40.0, 1e-10), (100.0, 1e-5)])
def test_decibel_parameters(top_db, amin):
    power = expected("stereo 44.1 kHz")["mel"].astype(np.float32)
    got = run("decibel", power, 16000, top_db=top_db, amin=amin).data.numpy()
    assert largest_error(got, oracle.decibel(power, top_db, amin)) <= TOLERANCES["decibel"]
    assert largest_error(got, oracle.decibel(power)) > 1


def test_scale_parameters():
    level = np.linspace(-120, 30, 301, dtype=np.float32).reshape(1, 7, 43)
    got = run("scale", level, 16000, low=-100.0, high=10.0, to=(0.0, 255.0)).data.numpy()
    want = (oracle.scale(level, -100.0, 10.0) + 1) / 2 * 255
    assert largest_error(got, want) <= 255 * TOLERANCES["scale"]
    assert got.min() == 0.0
    assert got.max() == 255.0


@pytest.mark.parametrize("shape", [(7, 10), (10, 7), (16, 16), (3, 40), (40, 3), (160, 201)])
@pytest.mark.parametrize("size", [16, 17])
def test_letterbox_shapes(shape, size):
    """Wide, tall and square, enlarged and reduced, with even and odd margins: the odd pixel is right or below."""
    images = np.random.default_rng(8).uniform(-1, 1, (2, *shape)).astype(np.float32)
    got = run("letterbox", images, 16000, size=size, pad_value=-3.0).data.numpy()
    want = oracle.letterbox(images, size, -3.0)
    assert got.shape == want.shape
    np.testing.assert_array_equal(got == -3.0, want == -3.0)
    assert largest_error(got, want) <= TOLERANCES["letterbox"]


def test_cast_rounds_ties_to_even():
    """Halfway between two halves of spacing 2**-11 near 0.5 and 2**-10 near 1, and what float16 cannot hold apart."""
    images = np.array([0.5 + 2**-12, 0.5 + 3 * 2**-12, 1 - 2**-12, -0.1, 1e-8, 6e-8], dtype=np.float32)
    out = run("cast", images.reshape(1, 2, 3), 16000).data
    assert out.dtype == torch.float16
    np.testing.assert_array_equal(out.numpy(), oracle.cast(images).reshape(1, 2, 3))
    assert out.flatten()[0] == 0.5


@pytest.mark.parametrize("channels", [1, 3, 4])
def test_replicate_channels(channels):
    images = np.random.default_rng(9).uniform(-1, 1, (2, 5, 6)).astype(np.float16)
    out = run("replicate", images, 16000, channels=channels).data
    np.testing.assert_array_equal(out.numpy(), oracle.replicate(images, channels))


def test_standardize_in_half_precision():
    """Rounds the map to [0, 1] as the seeds' backend did: equal to the oracle's, and apart from float32's."""
    images = expected("stereo 44.1 kHz")["replicate"]
    half = run("standardize", images, 16000, arithmetic="float16").data.numpy()
    assert half.dtype == np.float32
    assert largest_error(half, oracle.standardize(images, half_precision=True)) <= TOLERANCES["standardize"]
    assert 2e-4 < largest_error(half, oracle.standardize(images)) < 1.5e-3


def test_standardize_parameters():
    images = np.random.default_rng(10).uniform(0, 255, (2, 2, 5, 6)).astype(np.float32)
    got = run("standardize", images, 16000, mean=(0.1, 0.7), std=(0.5, 2.0), input_range=(0.0, 255.0)).data.numpy()
    want = oracle.standardize(images / np.float64(127.5) - 1, (0.1, 0.7), (0.5, 2.0))
    assert largest_error(got, want) <= TOLERANCES["standardize"]


@pytest.mark.parametrize("case", ["stereo 44.1 kHz", "longer than the cap"])
@pytest.mark.parametrize("stage", ["mel", "decibel", "scale", "letterbox"])
def test_a_batch_of_segments_equals_one_by_one(case, stage):
    """Bit for bit: a segment's numbers do not depend on how many others are processed with it."""
    names = list(PIPELINE.stages)
    given = expected(case)[names[names.index(stage) - 1]].astype(np.float32)
    batch = run(stage, given, 16000).data
    loop = torch.cat([run(stage, given[i : i + 1], 16000).data for i in range(len(given))])
    assert len(batch) > 4
    assert torch.equal(batch, loop)


def test_training_transforms_of_torchaudio_give_the_same_bits():
    """The training code called these transforms, segment by segment."""
    mel = AT.MelSpectrogram(
        sample_rate=16000, n_fft=1024, win_length=1024, hop_length=160, f_min=50.0, f_max=4000.0, n_mels=160, power=2.0
    )
    decibel = AT.AmplitudeToDB(stype="power", top_db=80.0)
    for case in ("stereo 44.1 kHz", "shorter than a window", "one click"):
        segments = expected(case)["segment"].astype(np.float32)
        power = run("mel", segments, 16000)
        level = run("decibel", power.data.numpy(), 16000)
        for i, one in enumerate(torch.from_numpy(segments)):
            assert torch.equal(power.data[i], mel(one[None])[0])
            assert torch.equal(level.data[i], decibel(mel(one[None]))[0])


@pytest.mark.parametrize("rate", [8000, 11025, 22050, 44100, 48000, 96000])
def test_training_resampler_of_torchaudio_gives_the_same_bits(rate):
    """`transforms.Resample` and `functional.resample` round their kernels differently; training used the transform."""
    samples = torch.from_numpy(recordings.coughs(rate, 0.6, channels=2).astype(np.float32))
    assert torch.equal(run("resample", samples.numpy(), rate).data, AT.Resample(rate, 16000)(samples))
